"""Model families: a table of rows, each a diffusers pipeline class and the modules that serve it.

Importing this package loads no family and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from textual_inversion import model_files
from textual_inversion.errors import first_line
from textual_inversion.model_checks import NO_MIDDLE_BLOCK, NO_UP_PATH, FlowLayout, TextFolder, UNetLayout

if TYPE_CHECKING:
    from textual_inversion.config import GradientPath
    from textual_inversion.families.base import Backbone
    from textual_inversion.prompts import Vocabularies


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row of the table of families."""

    description: str
    """The models it serves, for messages."""
    module: str
    """Import path of a module with `load(files, *, device, precision) -> Backbone`."""
    vocabularies: str
    """Import path of a module, free of torch, with `load_vocabularies(directory) -> Vocabularies`."""
    layout: FlowLayout | UNetLayout | None = None
    """Folders that a model must have, whose `check(files)` refuses without torch what `load` could not use; None for a
    family that checks nothing beforehand."""


def _clip(name: str, *classes: str) -> TextFolder:
    return TextFolder(name=name, classes=classes, token_table="token_embedding.weight", width="hidden_size")


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        description="Stable Diffusion 1.x and 2.x",
        module="textual_inversion.families.sd",
        vocabularies="textual_inversion.tokenizer",
        layout=UNetLayout(
            text_encoders=(_clip("text_encoder", "CLIPTextModel", "CLIPTextModelWithProjection"),),
            autoencoder="vae",
            autoencoder_classes=("AutoencoderKL",),
        ),
    ),
    "StableDiffusionXLPipeline": Family(
        description="Stable Diffusion XL",
        module="textual_inversion.families.sdxl",
        vocabularies="textual_inversion.text_encoders",
        layout=UNetLayout(
            text_encoders=(
                _clip("text_encoder", "CLIPTextModel", "CLIPTextModelWithProjection"),
                _clip("text_encoder_2", "CLIPTextModelWithProjection"),
            ),
            autoencoder="vae",
            autoencoder_classes=("AutoencoderKL",),
            reads_pooled=True,
        ),
    ),
    "LDMTextToImagePipeline": Family(
        description="latent diffusion with a BERT text encoder",
        module="textual_inversion.families.ldm",
        vocabularies="textual_inversion.wordpiece",
        layout=UNetLayout(
            text_encoders=(
                TextFolder(
                    name="bert",
                    classes=("LDMBertModel",),
                    token_table="embed_tokens.weight",
                    width="d_model",
                    min_positions=77,  # the length of every prompt
                ),
            ),
            autoencoder="vqvae",
            autoencoder_classes=("AutoencoderKL", "VQModel"),
        ),
    ),
    "StableDiffusion3Pipeline": Family(
        description="Stable Diffusion 3 and 3.5",
        module="textual_inversion.families.sd3",
        vocabularies="textual_inversion.text_encoders",
        layout=FlowLayout(
            clips=("text_encoder", "text_encoder_2"),
            clip_class="CLIPTextModelWithProjection",
            t5="text_encoder_3",
            needs_t5=False,
            transformer_class="SD3Transformer2DModel",
            first_layer="pos_embed.proj.weight",
        ),
    ),
    "FluxPipeline": Family(
        description="FLUX.1",
        module="textual_inversion.families.flux",
        vocabularies="textual_inversion.text_encoders",
        layout=FlowLayout(
            clips=("text_encoder",),
            clip_class="CLIPTextModel",
            t5="text_encoder_2",
            needs_t5=True,
            transformer_class="FluxTransformer2DModel",
            first_layer="x_embedder.weight",
            packs_latents=True,
            shifts_by_size=True,
        ),
    ),
}
"""Diffusers pipeline class, as `model_index.json` names it -> the family that serves it."""


def load_backbone(model: str, *, device: str = "auto", precision: str = "auto") -> Backbone:
    """Load a frozen model from a diffusers directory or hub id, from safetensors only and without running its code.

    `device`: a torch device; `auto` is CUDA where there is one. `precision`: `float32`, `bfloat16` or `float16` of
    the denoiser; `auto` is bfloat16 on CUDA, float32 elsewhere. Raises ValueError for a model it cannot serve.
    """
    with _naming(model):
        files, family = _checked(model)
    module = import_module(family.module)
    with _naming(model, but=(ImportError, MemoryError, RuntimeError)):  # of the device, or of what is installed
        backbone: Backbone = module.load(files, device=device, precision=precision)
    return backbone


def load_vocabularies(model: str) -> Vocabularies:
    """Check a model by its configurations and the headers of its weights, and read its vocabularies, without torch.

    Raises ValueError for a model that `load_backbone` would refuse by these files, and if they cannot be read.
    """
    with _naming(model):
        files, family = _checked(model)
        module = import_module(family.vocabularies)
        vocabularies: Vocabularies = module.load_vocabularies(files.directory)
    return vocabularies


def check_model(model: str) -> None:
    """Check a model by its configurations and the headers of its weights, without torch, as `load_backbone` does first.
    Raises ValueError for one that it would refuse."""
    with _naming(model):
        _checked(model)


def check_gradient_path(model: str, path: GradientPath) -> None:
    """Raise ValueError for a path of the gradients that the model's denoiser does not have, as an engine does later. A
    family without a layout is left to the engine."""
    if path == "up_path" and _lacks_up_path(model):
        raise ValueError(NO_UP_PATH)


def check_denoiser_features(model: str, denoiser_side: int) -> None:
    """Raise ValueError if an encoder is to read features that the model's denoiser does not have, as
    `encoder.PhotoFeatures` does later. A family without a layout is left to that."""
    if denoiser_side and _lacks_up_path(model):
        raise ValueError(NO_MIDDLE_BLOCK)


def _lacks_up_path(model: str) -> bool:
    """Return True if the model's files show that its denoiser is no U-Net."""
    with _naming(model):
        layout = _family(model, model_files.find_model_files(model)).layout
    return layout is not None and not layout.has_up_path


@contextmanager
def _naming(model: str, but: tuple[type[Exception], ...] = (ImportError, MemoryError)) -> Iterator[None]:
    """Turn every error of reading a model's files, which may hold anything, into a ValueError that names the model in
    one line. Errors of the kinds `but` are passed on."""
    try:
        yield
    except ValueError as error:
        line = first_line(error)
        if model in line and line == str(error):
            raise
        raise ValueError(line if model in line else f"model {model}: {line}") from error
    except but:
        raise
    except Exception as error:
        raise ValueError(
            f"model {model} cannot be read: {type(error).__name__}: {first_line(error)}; a file of it is damaged, or "
            "of a kind that is not known here: copy or download it again"
        ) from error


def _checked(model: str) -> tuple[model_files.ModelFiles, Family]:
    """Find a model's files and its family, and check that the family can serve it. Raises ValueError if not."""
    files = model_files.find_model_files(model)
    family = _family(model, files)
    if family.layout:
        family.layout.check(files)
    return files, family


def _family(model: str, files: model_files.ModelFiles) -> Family:
    """Look a model's family up in the table. Raises ValueError, listing the families, if it has none."""
    if files.pipeline_class in FAMILIES:
        return FAMILIES[files.pipeline_class]
    known = "; ".join(f"{name} ({family.description})" for name, family in FAMILIES.items())
    raise ValueError(f"model {model!r} is a {files.pipeline_class}; families known here: {known}")
