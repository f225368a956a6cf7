"""Checks of a model's directory before it is loaded, from JSON and the headers of weight files alone, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from textual_inversion.model_files import ModelFiles
from textual_inversion.schedule_checks import discrete_problem, unsupported_flow
from textual_inversion.weight_files import is_lfs_pointer, missing_parts, not_finite

PACKED_RESOLUTION = 1024
"""Side of the pictures of a transformer that reads packed latents, px, where the autoencoder's config is silent: the
default of FluxPipeline."""
NO_UP_PATH = (
    "inversion.gradient_path = 'up_path': this model's denoiser is no U-Net, so it has no up path; set it to 'whole'"
)
"""Error of a model that cannot learn by the gradients that a setting asks for."""
NO_MIDDLE_BLOCK = (
    "encoder.network.denoiser_side is over 0, but this model's denoiser is no U-Net, so it has no middle block; set it "
    "to 0"
)
"""Error of a model without the features that an encoder is to read."""
_UNET_LAYERS = ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_norm_out", "conv_out")
_TEXT_LAYER = re.compile(r"(?!vision_model\.)(?:.*\.)?layers\.(\d+)\.")
_OTHER_INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim")
"""Settings of a U-Net that reads more than latents, a timestep and text states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFolder:
    """Folder of a text encoder."""

    name: str
    """Name of the folder."""
    classes: tuple[str, ...]
    """Classes of text encoders that can be loaded, by the names in `model_index.json`."""
    token_table: str
    """End of the name of the token table's weights."""
    width: str
    """Setting of the text encoder's config with the width of its states."""
    min_positions: int = 0
    """Smallest number of positions that the text encoder must have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetLayout:
    """Folders of a diffusers pipeline with text encoders, a U-Net with cross-attention and an autoencoder."""

    has_up_path: ClassVar[bool] = True
    """That of the family's backbones (`base.Backbone`)."""
    text_encoders: tuple[TextFolder, ...]
    """Text encoders whose states the U-Net reads side by side."""
    autoencoder: str
    """Folder of the autoencoder."""
    autoencoder_classes: tuple[str, ...]
    """Classes of autoencoders that can be loaded."""
    reads_pooled: bool = False
    """True if the U-Net also reads six numbers and the pooled vector of the last text encoder (SDXL)."""

    def check(self, files: ModelFiles) -> None:
        """Raise ValueError, with a remedy, for a model that cannot be loaded or is no plain text-to-image model."""
        for folder in self.text_encoders:
            check_class(files.directory, folder.name, folder.classes)
        check_class(files.directory, self.autoencoder, self.autoencoder_classes)
        check_class(files.directory, "unet", ("UNet2DConditionModel",))
        texts = {folder: read_config(files.directory, folder.name) for folder in self.text_encoders}
        unet = read_config(files.directory, "unet")
        _check_unet(files, unet, read_config(files.directory, self.autoencoder))
        if problem := discrete_problem(read_config(files.directory, "scheduler")):
            raise _refusal(files, problem)
        widths: list[Any] = [text.get(folder.width) for folder, text in texts.items()]
        states = unet.get("cross_attention_dim")
        if isinstance(states, int) and all(isinstance(width, int) for width in widths) and states != sum(widths):
            made = " and ".join(map(str, widths))
            raise _refusal(
                files, f"the U-Net reads text states of width {states} but the text encoder makes {made}; "
                "the folders belong to different models"
            )  # fmt: skip
        for folder, text in texts.items():
            positions = text.get("max_position_embeddings", folder.min_positions)
            if positions < folder.min_positions:
                raise _refusal(
                    files, f"the text encoder has {positions} positions; prompts have {folder.min_positions} ids"
                )  # fmt: skip
        self._check_added(files, unet, next(reversed(texts.values())))
        if files.checkpoint:
            self._check_single_file(files, unet, texts)
            return
        for folder, text in texts.items():
            shapes = weight_shapes(files, folder.name)
            _check_shape(
                files, folder.name, shapes, folder.token_table, [text.get("vocab_size"), text.get(folder.width)]
            )
            _check_layers(files, folder.name, shapes, text.get("num_hidden_layers", text.get("encoder_layers")))
        shapes = weight_shapes(files, "unet")
        _check_names(files, "unet", shapes, _unet_weights(unet))
        _check_shape(files, "unet", shapes, "conv_in.weight", [None, unet.get("in_channels")])
        weight_shapes(files, self.autoencoder)

    def _check_single_file(
        self, files: ModelFiles, unet: dict[str, Any], texts: Mapping[TextFolder, dict[str, Any]]
    ) -> None:
        """Raise ValueError unless a single file has weights of every component, of the sizes that the configs say."""
        for folder, text in texts.items():
            shapes = weight_shapes(files, folder.name)
            sizes = [text.get("vocab_size"), text.get(folder.width)]
            _check_shape(files, folder.name, shapes, folder.token_table, sizes)
        shapes = weight_shapes(files, "unet")
        _check_shape(files, "unet", shapes, "input_blocks.0.0.weight", [None, unet.get("in_channels")])
        _check_shape(files, "unet", shapes, "attn2.to_k.weight", [None, unet.get("cross_attention_dim")])
        weight_shapes(files, self.autoencoder)

    def _check_added(self, files: ModelFiles, unet: dict[str, Any], text: dict[str, Any]) -> None:
        """Raise ValueError for a U-Net that reads more, or less, than states and, of SDXL, pooled vectors and sizes."""
        found, wanted = unet.get("addition_embed_type"), "text_time" if self.reads_pooled else None
        if found != wanted:
            raise _refusal(
                files, f"the U-Net's addition_embed_type is {found!r} where {wanted!r} is needed; it is another "
                "pipeline's"
            )  # fmt: skip
        if unet.get("time_cond_proj_dim"):
            raise _refusal(
                files, "the U-Net reads the guidance scale (a latent consistency model, distilled), which is not "
                "supported; learn with the model that it was distilled from, and draw with the result in both"
            )  # fmt: skip
        if not self.reads_pooled:
            return
        made = 6 * (unet.get("addition_time_embed_dim") or 0) + text.get("projection_dim", 512)
        read = unet.get("projection_class_embeddings_input_dim")
        if read != made:
            raise _refusal(
                files, f"the U-Net reads {read} values besides text states, but six numbers and the pooled vector make "
                f"{made}; the folders belong to different models, or it is a refiner"
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowLayout:
    """Folders of a diffusers pipeline with CLIPs, T5, a transformer, an autoencoder and rectified flow."""

    has_up_path: ClassVar[bool] = False
    clips: tuple[str, ...]
    """Folders of the CLIP text encoders, whose pooled vectors the transformer reads side by side."""
    clip_class: str
    """Class of the CLIPs, by the name in `model_index.json`: with a projection of the pooled vectors, or without."""
    t5: str
    """Folder of the T5 text encoder."""
    needs_t5: bool
    """False if a model may do without T5."""
    transformer_class: str
    """Class of the transformer, by the name in `model_index.json`."""
    first_layer: str
    """End of the name of the transformer's weights that read the latents."""
    packs_latents: bool = False
    """True if the transformer reads squares of 2 x 2 latents, with a multiple of their channels, and the pictures' size
    is the autoencoder's."""
    shifts_by_size: bool = False
    """True if the shift of the noise levels may depend on the pictures' size."""

    def check(self, files: ModelFiles) -> None:
        """Raise ValueError, with a remedy, for a model that cannot be loaded or is no plain text-to-image model."""
        directory = files.directory
        has_t5 = self.needs_t5 or bool(component_class(directory, self.t5))
        for folder in self.clips:
            check_class(directory, folder, (self.clip_class,))
            check_class(directory, _tokenizer_of(folder), ("CLIPTokenizer", "CLIPTokenizerFast"))
        if has_t5:
            check_class(directory, self.t5, ("T5EncoderModel",))
            check_class(directory, _tokenizer_of(self.t5), ("T5Tokenizer", "T5TokenizerFast"))
        check_class(directory, "transformer", (self.transformer_class,))
        check_class(directory, "vae", ("AutoencoderKL",))
        check_class(directory, "scheduler", ("FlowMatchEulerDiscreteScheduler",))
        if problem := unsupported_flow(read_config(directory, "scheduler"), shifts_by_size=self.shifts_by_size):
            raise _refusal(files, problem)
        self._check_sizes(files, read_config(directory, "transformer"), has_t5=has_t5)

    def _check_sizes(self, files: ModelFiles, transformer: dict[str, Any], *, has_t5: bool) -> None:
        """Raise ValueError for folders whose sizes do not fit together, or differ from their weights'."""
        directory = files.directory
        vae = read_config(directory, "vae")
        texts = {folder: read_config(directory, folder) for folder in self.clips}
        width = "projection_dim" if self.clip_class.endswith("Projection") else "hidden_size"
        self._check_size(files, "pooled_projection_dim", transformer,
                         sum(text.get(width, 512) for text in texts.values()))  # fmt: skip
        self._check_size(files, "in_channels", transformer,
                         vae.get("latent_channels", 4) * (4 if self.packs_latents else 1))  # fmt: skip
        tables = {folder: ("token_embedding.weight", text.get("hidden_size")) for folder, text in texts.items()}
        if has_t5:
            texts[self.t5] = read_config(directory, self.t5)
            self._check_size(files, "joint_attention_dim", transformer, texts[self.t5].get("d_model"))
            tables[self.t5] = "shared.weight", texts[self.t5].get("d_model")
        for folder, (name, dim) in tables.items():
            shapes = weight_shapes(files, folder)
            _check_shape(files, folder, shapes, name, [texts[folder].get("vocab_size"), dim])
        shapes = weight_shapes(files, "transformer", is_uniform=False)  # the last block of SD3 has fewer
        _check_shape(files, "transformer", shapes, self.first_layer, [None, transformer.get("in_channels")])
        if transformer.get("guidance_embeds"):
            _check_shape(files, "transformer", shapes, "guidance_embedder.linear_1.weight", [])
        weight_shapes(files, "vae")
        if self.packs_latents:
            _check_packing(files, vae)

    def _check_size(self, files: ModelFiles, name: str, transformer: dict[str, Any], made: Any) -> None:
        """Raise ValueError unless the transformer reads as much as the other folders make."""
        if name in transformer and transformer[name] != made:
            raise _refusal(
                files, f"the transformer's {name} is {transformer[name]}, but the other folders make {made}; they "
                "belong to different models, or it is no plain text-to-image checkpoint"
            )  # fmt: skip


def read_config(directory: Path, component: str) -> dict[str, Any]:
    """Read a component's configuration. Raises ValueError, naming the file, if it is not there or no JSON object."""
    path = directory / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        is_pointer = path.is_file() and is_lfs_pointer(path)
        why = "it is a pointer of Git LFS, not the file itself: run `git lfs pull`" if is_pointer else error
        raise ValueError(f"model {directory}: {component}/{path.name} cannot be read: {why}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model {directory}: {component}/{path.name} is no JSON object")
    return content


def component_class(directory: Path, component: str) -> str:
    """Return the class of a component, as `model_index.json` names it; empty if it names none."""
    entry = json.loads((directory / "model_index.json").read_text()).get(component)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else ""


def check_class(directory: Path, component: str, known: Sequence[str]) -> None:
    """Raise ValueError unless the model has this component, of one of these classes."""
    found = component_class(directory, component)
    if found not in known:
        raise ValueError(
            f"model {directory}: model_index.json names {found or 'nothing'} as {component!r}; "
            f"{' or '.join(known)} is needed"
        )


def _tokenizer_of(text_encoder: str) -> str:
    """Return the folder of a text encoder's tokenizer."""
    return text_encoder.replace("text_encoder", "tokenizer")


def weight_shapes(files: ModelFiles, component: str, *, is_uniform: bool = True) -> dict[str, tuple[int, ...]]:
    """Read the headers of a component's weight files: name of each tensor -> its shape.

    `is_uniform`: all its layers of a kind have the same weights. Raises ValueError if there are no such files, if one
    was cut short, is no safetensors file or is missing, if a layer lacks a weight that another one has, or if a sample
    of the values has NaN or infinity.
    """
    try:
        tensors = files.tensors(component)
    except ValueError as error:
        raise _refusal(files, str(error)) from error
    if not tensors:
        if files.checkpoint:
            raise _refusal(
                files, f"it has no weights of {component!r} under the names of the original Stable Diffusion; give the "
                "model's directory in the diffusers layout"
            )  # fmt: skip
        raise _refusal(files, f"folder {component!r} has no .safetensors weights")
    if not files.checkpoint:
        _check_depth(files, component, len(tensors))
    if is_uniform and (missing := missing_parts(tensors)):
        raise _refusal(
            files, f"the weights in {component!r} have no {missing[0]!r}, but other layers have one; without it the "
            "model would be partly random: copy or download it again"
        )  # fmt: skip
    if broken := not_finite(tensors):
        raise _refusal(
            files, f"{broken[0]!r} in {component!r} has values that are NaN or infinite ({len(broken)} of the tensors "
            "sampled); the training or merging that made it failed"
        )  # fmt: skip
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_unet(files: ModelFiles, unet: dict[str, Any], autoencoder: dict[str, Any]) -> None:
    """Raise ValueError for a U-Net that does not fit the autoencoder, or draws pictures that are not square."""
    # what diffusers' classes take where a config is silent: 4, and 3 for a VQ model
    silent = 3 if autoencoder.get("_class_name") == "VQModel" else 4
    latent = autoencoder.get("vq_embed_dim") or autoencoder.get("latent_channels", silent)
    taken = unet.get("in_channels", 4)
    if taken != latent:
        raise _refusal(
            files, f"the U-Net takes {taken} channels but the autoencoder has {latent} (an inpainting or depth "
            "model?); a plain text-to-image checkpoint is needed"
        )  # fmt: skip
    given = unet.get("out_channels", 4)
    if given != latent:
        raise _refusal(files, f"the U-Net returns {given} channels but the autoencoder has {latent}")
    for name in _OTHER_INPUTS:
        if unet.get(name) is not None:
            raise _refusal(
                files, f"the U-Net's {name} is {unet[name]!r}: it reads more than a prompt; a plain text-to-image "
                "checkpoint is needed"
            )  # fmt: skip
    side = unet.get("sample_size") or 1
    if not isinstance(side, int):
        raise _refusal(files, f"the U-Net's sample_size {side!r} is not one number; only square pictures are supported")


def _check_packing(files: ModelFiles, autoencoder: dict[str, Any]) -> None:
    """Raise ValueError unless the pictures of an autoencoder are cut into whole squares of 2 x 2 latents."""
    side = autoencoder.get("sample_size", PACKED_RESOLUTION)
    square = 2 ** len(autoencoder.get("block_out_channels", (64,)))
    if not isinstance(side, int) or side % square:
        raise _refusal(
            files, f"the autoencoder's sample_size, which is the side of a picture, is {side!r}; it must be a multiple "
            f"of {square} px"
        )  # fmt: skip


def _check_shape(
    files: ModelFiles, component: str, shapes: Mapping[str, tuple[int, ...]], ending: str, expected: Sequence[Any]
) -> None:
    """Raise ValueError unless the weights have a tensor of this name whose first sizes are as expected; None fits."""
    name = next((name for name in sorted(shapes) if name == ending or name.endswith(f".{ending}")), None)
    if name is None:
        raise _refusal(
            files, f"the weights in {component!r} have no {ending!r}; they are another model's, or saved by another "
            "library: without it the model would be partly random"
        )  # fmt: skip
    found = shapes[name][: len(expected)]
    if any(want is not None and want != have for want, have in zip(expected, found, strict=True)):
        raise _refusal(
            files, f"{name!r} in {component!r} has shape {list(shapes[name])}, which is not what its config.json says "
            f"({list(expected)}); the two files belong to different models"
        )  # fmt: skip


def _check_layers(files: ModelFiles, component: str, names: Iterable[str], expected: Any) -> None:
    """Raise ValueError unless the weights have as many layers of a text encoder as its config says; None fits."""
    layers = {match[1] for name in names if (match := _TEXT_LAYER.match(name))}
    if expected is not None and len(layers) != expected:
        raise _refusal(
            files, f"the weights in {component!r} have {len(layers)} layers, but its config.json says {expected}; the "
            "two files belong to different models"
        )  # fmt: skip


def _check_depth(files: ModelFiles, component: str, num_tensors: int) -> None:
    """Raise ValueError for more layers than the weights have tensors: to build them all might take for ever."""
    for name, value in read_config(files.directory, component).items():
        deepest = max(_numbers(value), default=0)
        if "layers" in name and deepest > num_tensors:
            raise _refusal(
                files, f"the weights in {component!r} have {num_tensors} tensors, but its config.json says {deepest} "
                f"in {name}; the two files belong to different models"
            )  # fmt: skip


def _numbers(value: Any) -> list[float]:
    """Return the numbers in nested lists."""
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def _unet_weights(unet: Mapping[str, Any]) -> list[str]:
    """Return names of weights that a U-Net of this config has: those outside its blocks, and one of each block."""
    names = [f"{layer}.{kind}" for layer in _UNET_LAYERS for kind in ("weight", "bias")]
    down, up = unet.get("down_block_types", ()), unet.get("up_block_types", ())
    layers = unet.get("layers_per_block", 2)
    counts = layers if isinstance(layers, list) else [layers] * len(down)
    for i in range(len(down)):
        names += [f"down_blocks.{i}.resnets.{j}.conv1.weight" for j in range(counts[i])]
    for i, count in zip(range(len(up)), reversed(counts), strict=False):
        names += [f"up_blocks.{i}.resnets.{j}.conv1.weight" for j in range(count + 1)]
    return names


def _check_names(files: ModelFiles, component: str, names: Collection[str], expected: Iterable[str]) -> None:
    """Raise ValueError unless the weights have all these names."""
    for name in expected:
        if name not in names:
            raise _refusal(
                files, f"the weights in {component!r} have no {name!r}, which its config.json calls for; the two files "
                "belong to different models, or weights are missing"
            )  # fmt: skip


def _refusal(files: ModelFiles, problem: str) -> ValueError:
    return ValueError(f"model {files.checkpoint or files.directory}: {problem}")
