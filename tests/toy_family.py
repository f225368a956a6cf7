"""A family as the next ones will be: two text encoders with vocabularies, widths and lengths of their own, a pooled
vector taken at the true end of the text, extras, and rectified flow.

Its models are directories in the diffusers layout; `register` adds the family's row to the table, in any process.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from textual_inversion import families, model_files
from textual_inversion.compiled import Compiled
from textual_inversion.conditioning import Conditioning
from textual_inversion.errors import BadInput
from textual_inversion.families import Family
from textual_inversion.families.base import MemorySaving, sized_latents
from textual_inversion.lora import AdaptableLayers, AdapterBatch
from textual_inversion.noise import Noise, from_scheduler_config
from textual_inversion.prompts import Vocabularies
from textual_inversion.tokens import TokenTable
from textual_inversion.weights import load_pretrained

PIPELINE_CLASS = "TwoEncoderToyPipeline"
START, END, PADDING = 0, 1, 2
WIDTHS = {"words": 24, "letters": 16}
LENGTHS = {"words": 20, "letters": 56}
VOCAB_SIZES = {"words": 97, "letters": 40}
LATENT_SHAPE = (2, 4, 4)
RESOLUTION = 8
_JOINT_WIDTH = 12


ROW = Family(description="two text encoders, for tests", module="tests.toy_family", vocabularies="tests.toy_family")


def register() -> None:
    """Add the family to the table of this process, for good."""
    families.FAMILIES[PIPELINE_CLASS] = ROW


def write_model(directory: Path, seed: int = 0, **scheduler: Any) -> Path:
    """Save a random model; returns its directory."""
    torch.manual_seed(seed)
    network = _Network()
    files: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": PIPELINE_CLASS,
            "network": ["tests.toy_family", "_Network"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        },
        "network/config.json": {"kind": "toy"},
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            **scheduler,
        },
    }
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    weights = {name: weight.contiguous() for name, weight in network.state_dict().items()}
    save_file(weights, directory / "network/model.safetensors", metadata={"format": "pt"})
    return directory


class Words:
    """Hashed words between a start and an end, padded with the end: ids of whole words up to the vocabulary's size."""

    size, end_of_text, unknown, max_tokens = VOCAB_SIZES["words"], END, END, LENGTHS["words"] - 2

    def tokenize(self, text: str) -> list[int]:
        return [3 + zlib.crc32(word.encode()) % (self.size - 3) for word in text.split()]

    def assemble(self, ids: Sequence[int]) -> list[int]:
        if len(ids) > self.max_tokens:
            raise BadInput(f"{len(ids)} words are more than {self.max_tokens}")
        return [START, *ids, *[END] * (self.max_tokens - len(ids) + 1)]


class Letters:
    """Letters without a start, padded with a word of its own, as T5 has it."""

    size, end_of_text, unknown, max_tokens = VOCAB_SIZES["letters"], END, END, LENGTHS["letters"] - 1

    def tokenize(self, text: str) -> list[int]:
        return [3 + ord(letter) % (self.size - 3) for letter in text.replace(" ", "")]

    def assemble(self, ids: Sequence[int]) -> list[int]:
        if len(ids) > self.max_tokens:
            raise BadInput(f"{len(ids)} letters are more than {self.max_tokens}")
        return [*ids, END, *[PADDING] * (self.max_tokens - len(ids))]


def load_vocabularies(_directory: Path) -> Vocabularies:
    return {"words": Words(), "letters": Letters()}


def load(files: model_files.ModelFiles, *, device: str, precision: str) -> ToyFamily:
    """`precision` is float32 in any case."""
    del precision
    network = load_pretrained(_Network, str(files.directory), subfolder="network")
    scheduler = json.loads((files.directory / "scheduler/scheduler_config.json").read_text())
    place = torch.device("cpu" if device == "auto" else device)
    return ToyFamily(network.to(place), scheduler, model_files.model_hash(str(files.directory)))


class _TextEncoder(nn.Module):
    """A causal encoder: each state is made of the mean of what stands before it."""

    def __init__(self, key: str) -> None:
        super().__init__()
        width = WIDTHS[key]
        self.embeddings: nn.Module = nn.Embedding(VOCAB_SIZES[key], width)
        self.positions = nn.Parameter(torch.randn(LENGTHS[key], width))
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.fc1(self.embeddings(ids) + self.positions).tanh()
        steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        states: Tensor = self.fc2(inner.cumsum(1) / steps)
        return states


class _Denoiser(nn.Module):
    """One layer that sees the picture, the noise level, the states, the pooled vector and the time ids."""

    def __init__(self) -> None:
        super().__init__()
        size = 2 * 4 * 4
        self.see = nn.Linear(size, size)
        self.attend = nn.Parameter(torch.randn(sum(LENGTHS.values())) / 5)
        self.read = nn.Linear(_JOINT_WIDTH, size)
        self.summary = nn.Linear(WIDTHS["words"], size)
        self.time_ids = nn.Linear(2, size)

    def forward(self, x: Tensor, t: Tensor, hidden: Tensor, pooled: Tensor, time_ids: Tensor) -> tuple[Tensor]:
        seen = self.see(x.flatten(1)) + t[:, None] / 1000
        text = self.read((hidden * self.attend[:, None]).sum(1).tanh()) + self.summary(pooled).tanh()
        return ((seen + text + self.time_ids(time_ids)).view_as(x),)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleDict({key: _TextEncoder(key) for key in WIDTHS})
        self.project = nn.ModuleDict({key: nn.Linear(width, _JOINT_WIDTH) for key, width in WIDTHS.items()})
        self.denoiser = _Denoiser()
        self.autoencoder = nn.Parameter(torch.randn(64, 3 * RESOLUTION**2) / 14)

    @classmethod
    def from_pretrained(
        cls, model: str, *, subfolder: str, use_safetensors: bool, output_loading_info: bool
    ) -> tuple[_Network, Any]:
        """In the manner of diffusers."""
        from safetensors.torch import load_file

        assert use_safetensors
        assert output_loading_info
        network = cls()
        weights = load_file(Path(model) / subfolder / "model.safetensors")
        found = network.load_state_dict(weights, strict=False)
        info = {"missing_keys": found.missing_keys, "unexpected_keys": found.unexpected_keys, "mismatched_keys": []}
        return network, info


class ToyFamily:
    """The `Backbone`."""

    def __init__(self, network: _Network, scheduler: Mapping[str, Any], digest: str) -> None:
        self._network = network.requires_grad_(False).eval()
        self._denoiser: Any = network.denoiser
        self._digest = digest
        self.device = network.autoencoder.device
        self.dtype = torch.float32
        self.resolution = RESOLUTION
        self.latent_shape = LATENT_SHAPE
        self.guidance_scale = 3.0
        self.embeds_guidance = False
        self.has_up_path = False
        self.sampling_steps = 20
        self.guides_by_zeros = False
        self.noise: Noise = from_scheduler_config(scheduler, self.device)
        self.vocabularies: Vocabularies = load_vocabularies(Path())
        self.token_tables: Mapping[str, TokenTable] = {}
        self._adaptable: dict[str, AdaptableLayers] = {}
        for key, encoder in network.text.items():
            table = TokenTable(encoder.embeddings.weight)
            encoder.embeddings = table
            self.token_tables = {**self.token_tables, key: table}
            self._adaptable[key] = AdaptableLayers(encoder, key, prefix=f"{key}.")
        layers = [adaptable.layers for adaptable in self._adaptable.values()]
        self.adapter_layers: Mapping[str, tuple[int, int]] = {**layers[0], **layers[1]}

    def latent_shape_for(self, width: int, height: int) -> tuple[int, int, int]:
        return sized_latents(self, width, height, multiple_px=self.resolution, most_px=self.resolution)

    def single_token_words(self) -> list[str]:
        return ["animal", "cat", "clock", "dog", "toy", "tree"]

    def _states(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch]
    ) -> dict[str, Tensor]:
        states = {}
        for key, encoder in self._network.text.items():
            with self.token_tables[key].reading(rows.get(key)), self._adaptable[key].using(adapters):
                states[key] = encoder(ids[key])
        return states

    def encode_prompts(
        self, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor], adapters: Sequence[AdapterBatch] = ()
    ) -> Conditioning:
        """States one text encoder after the other; the pooled vector at the first encoder's true end of the text."""
        states = self._states(ids, rows, adapters)
        end = (ids["words"] == END).int().argmax(1)
        pooled = states["words"][torch.arange(len(end), device=end.device), end]
        size = torch.full((len(end), 2), RESOLUTION / 100, device=self.device)
        hidden = torch.cat([self._network.project[key](states[key]) for key in WIDTHS], dim=1)
        return Conditioning(hidden=hidden, pooled=pooled, extras={"time_ids": size})

    def encoder_states(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._states(ids, {}, ())

    def encode_images(self, pixels: Tensor) -> Tensor:
        moments = pixels.flatten(1) @ self._network.autoencoder.T
        mean, log_std = moments.unflatten(1, (2, *LATENT_SHAPE)).unbind(1)
        return torch.stack([mean, (0.1 * log_std).exp()], dim=1)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None
        output: Tensor = self._denoiser(
            noisy_latents, timesteps, conditioning.hidden, conditioning.pooled, conditioning.extras["time_ids"]
        )[0]
        return output

    def middle_features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        raise NotImplementedError(f"the toy has no middle ({noisy_latents.shape}, {timesteps}, {conditioning})")

    def compile(self, *, backend: str = "inductor", or_plain: bool = False, graphs: bool = False) -> None:
        self._denoiser = Compiled(self._network.denoiser, backend=backend, or_plain=or_plain, graphs=graphs)

    def uncompile(self) -> None:
        self._denoiser = self._network.denoiser

    def save_memory(self, saving: MemorySaving) -> None:
        """Do nothing: the denoiser is one layer, and the autoencoder has no tiles."""

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.flatten(1) @ self._network.autoencoder[:32]).unflatten(1, (3, RESOLUTION, RESOLUTION)).tanh()

    def model_hash(self) -> str:
        return self._digest
