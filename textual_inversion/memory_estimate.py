"""Estimate what memory a pass takes before it runs, by running it on tensors that have a shape and no data.

Torch's fake tensors go through the model's own code, and each operation tells which storages it reads and which it
makes. So the estimate holds for any family, setting and precision, and takes a few seconds and no memory. It counts
tensors: neither the scratch memory inside kernels nor what an allocator loses between blocks. Nothing is compiled; a
compiled pass may take less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig, SamplingConfig
from textual_inversion.families.base import Backbone, stack_prompts
from textual_inversion.generate import compares_prompts
from textual_inversion.knowledge import FrozenPrompts
from textual_inversion.objective import Batch, Trained, objective, per_concept
from textual_inversion.parameters import Layout
from textual_inversion.prompts import HOLE, encode_prompt
from textual_inversion.training_data import ImageFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class PassMemory:
    """Memory of one pass, in bytes."""

    weights: int
    """Size of the tensors that the pass reads and does not make: the weights of all networks that take part."""
    kept: int
    """Size of the tensors that the forward pass keeps for the backward pass, weights left out; 0 without gradients."""
    peak: int
    """Largest size, at any moment, of the tensors that the pass makes."""


def pass_settings(config: InversionConfig) -> InversionConfig:
    """Return the settings that a learning pass depends on, all others at their defaults. Two configurations for which
    they are equal have equal passes."""
    return InversionConfig(
        batch_size=config.batch_size,
        per_image_tokens=config.per_image_tokens,
        text_encoders=config.text_encoders,
        gradient_path=config.gradient_path,
        timesteps=config.timesteps,
        adapter=config.adapter,
        penalties=config.penalties,
        augment=config.augment,
    )


def learning_memory(
    backbone: Backbone, config: InversionConfig, slots: int, image_features: ImageFeatures | None = None
) -> PassMemory:
    """Estimate a learning pass of `slots` concepts, forward and backward, with the parameters and Adam's moments of all
    slots. Raises ValueError if the configuration does not go with the model, RuntimeError if an operation has no fake
    form."""
    return trace(lambda: learn_made_up(backbone, config, slots, image_features))


def drawing_memory(backbone: Backbone, config: SamplingConfig) -> PassMemory:
    """Estimate the drawing of a batch of pictures: a denoising step, then decoding. Raises RuntimeError if an operation
    has no fake form."""
    return trace(lambda: draw_made_up(backbone, config))


def trace(work: Callable[[], object], mode: FakeTensorMode | None = None) -> PassMemory:
    """Run work on fake tensors and return its memory; tensors that were there before count as weights.

    `mode`: that of the fake tensors among them, if there are any.
    """
    mode = mode or FakeTensorMode()
    accounts = _Accounts(mode)
    with (
        mode,
        accounts,
        torch.autograd.graph.saved_tensors_hooks(accounts.keep, lambda tensor: tensor),
    ):
        work()
    return PassMemory(weights=accounts.weights, kept=accounts.kept, peak=accounts.peak)


class _Accounts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sizes of the storages that operations read, make and free, in bytes. To be entered within `mode`."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = self.live = self.peak = self.kept = 0
        self._mode = mode
        self._known = weakref.WeakKeyDictionary[UntypedStorage, bool]()
        """Storages seen so far; true for those that the pass has made."""
        self._kept = weakref.WeakSet[UntypedStorage]()
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}
        """Identity of each tensor with data -> itself, and the tensor without data that stands in for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args = tuple(self._without_data(value) for value in args)
        kwargs = {name: self._without_data(value) for name, value in (kwargs or {}).items()}
        is_constant = func is torch.ops.aten.lift_fresh.default  # takes what torch.tensor has just made
        for storage in _storages((*args, *kwargs.values())):
            if storage not in self._known and not is_constant:
                self._known[storage] = False
                self.weights += storage.nbytes()
        outputs = func(*args, **kwargs)
        for storage in _storages(outputs):
            if storage not in self._known:
                self._known[storage] = True
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return outputs

    def _without_data(self, value: Any) -> Any:
        """Return an argument of an operation with tensors without data. Each stands in for the same tensor as long as
        this lives: views of a weight have its storage, and are recognised by that."""
        if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
            return [self._without_data(each) for each in value]
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in self._fakes:
            self._fakes[id(value)] = (value, self._mode.from_tensor(value))
        return self._fakes[id(value)][1]

    def _change(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps."""
        storage = tensor.untyped_storage()
        if self._known.get(storage) and storage not in self._kept:
            self._kept.add(storage)
            self.kept += storage.nbytes()
        return tensor


def _storages(values: object) -> Iterator[UntypedStorage]:
    """Yield the storages of an operation's arguments or outputs: tensors, lists of tensors, and others."""
    if isinstance(values, Tensor):
        yield values.untyped_storage()
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _storages(value)


def learn_made_up(
    backbone: Backbone, config: InversionConfig, slots: int, image_features: ImageFeatures | None = None
) -> list[Tensor]:
    """Run the learning pass of made-up concepts as an engine does, and return the gradients."""
    config = pass_settings(config)
    device = backbone.device
    layout = Layout.from_config(backbone, config, max_vectors=1)
    concept = Concept(concept_id="0", placeholder_token="<0>", images=("none",))
    values = {
        name: torch.zeros(slots, *shape, device=device, requires_grad=layout.is_learned(name))
        for name, shape in layout.shapes(concept, 1).items()
    }
    in_slots = [torch.zeros_like(value) for value in values.values() for _ in range(3)]  # values, Adam's two moments
    rows = {key: values[key] for key in backbone.token_tables}
    counts = torch.ones(slots, next(iter(rows.values())).shape[1], device=device)
    batch = _batch(backbone, config, slots * config.batch_size, rows, image_features)
    trained = Trained(
        rows=rows,
        start=rows,
        class_vector={key: row[:, :1] for key, row in rows.items()},
        is_placeholder_row=counts,
        adapters=layout.adapters(values, batch.ids, counts),
    )
    terms = objective(
        backbone,
        batch,
        trained,
        config.penalties,
        gradient_path=config.gradient_path,
        min_snr_gamma=config.timesteps.min_snr_gamma,
        image_features=image_features if config.penalties.clip else None,
    )
    learned = [value for value in values.values() if value.requires_grad]
    gradients = torch.autograd.grad(per_concept(terms, slots).sum(), learned)
    del in_slots
    return [*gradients]


@torch.no_grad()
def _batch(
    backbone: Backbone,
    config: InversionConfig,
    samples: int,
    rows: Mapping[str, Tensor],
    image_features: ImageFeatures | None,
) -> Batch:
    """Make up the samples of a learning pass: pictures and noise are zero, and all prompts are the same."""
    device = backbone.device
    prompt = encode_prompt(f"a photo of a {HOLE}", {HOLE: range(1)}, backbone.vocabularies)
    ids = {key: each.to(device) for key, each in stack_prompts([prompt] * samples).items()}
    latents = torch.zeros(samples, *backbone.latent_shape, device=device)
    others = None
    if config.penalties.knowledge:
        flat = {key: each.flatten(0, 1) for key, each in rows.items()}
        others = FrozenPrompts(ids=ids, conditioning=backbone.encode_prompts(ids, flat))
    features = None
    if config.penalties.clip and image_features:
        features = image_features(backbone.decode(latents[:1])).expand(samples, -1)
    return Batch(
        latents=latents,
        noise=torch.zeros_like(latents),
        timesteps=torch.zeros(samples, dtype=torch.long, device=device),
        ids=ids,
        features=features,
        others=others,
    )


@torch.no_grad()
def draw_made_up(backbone: Backbone, config: SamplingConfig) -> Tensor:
    """Predict once for a batch of made-up pictures, with their guidance, and decode it; return the pixels."""
    device = backbone.device
    prompt = encode_prompt(f"a photo of a {HOLE}", {HOLE: range(1)}, backbone.vocabularies)
    ids = {key: each.to(device) for key, each in stack_prompts([prompt]).items()}
    rows = {key: torch.zeros(1, table.dim, device=device) for key, table in backbone.token_tables.items()}
    samples = config.batch_size * (1 + compares_prompts(backbone, config))
    latents = torch.zeros(samples, *backbone.latent_shape, device=device)
    timesteps = backbone.noise.model_timesteps(torch.zeros(samples, dtype=torch.long, device=device))
    output = backbone.predict(latents, timesteps, backbone.encode_prompts(ids, rows).repeat(samples))
    return backbone.decode(output[: config.batch_size])
