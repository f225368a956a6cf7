"""Load the components of a diffusers directory, for every family: devices, precisions, token tables."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils.checkpoint import checkpoint

from textual_inversion import model_files
from textual_inversion.families.base import MemorySaving
from textual_inversion.model_checks import read_config
from textual_inversion.tokens import TokenTable
from textual_inversion.weights import load_pretrained, load_single_file

SAMPLING_STEPS = 20
"""Denoising steps of a model that was not distilled and whose scheduler config gives none."""
DISTILLED_STEPS = 4
"""Denoising steps of a distilled model whose scheduler config gives none."""

log = logging.getLogger(__name__)

UNUSED_CLIP_PARTS = (r"^(text_projection|visual_projection|vision_model|logit_scale)\b",)
"""Parts of a whole CLIP that a text encoder saved with them has, and that a family without pooled vectors does not
read."""


def read_component(files: model_files.ModelFiles, component: str, cls: Any, **options: Any) -> Any:
    """Load a component (by its name in `model_index.json`) as a class of diffusers or transformers, on the CPU.

    `options`: handed to `load_pretrained`. Raises ValueError if it lacks weights or has unknown ones.
    """
    directory = str(files.directory)
    if files.checkpoint:
        dtype = options.get("dtype") or options["torch_dtype"]
        return load_single_file(cls, files.checkpoint, component, directory, dtype)
    if component not in files.variants:
        raise ValueError(f"model {directory}: folder {component!r} has no .safetensors weights")
    variant = files.variants[component]
    return load_pretrained(cls, directory, subfolder=component, variant=variant, local_files_only=True, **options)


def read_text_encoder(
    files: model_files.ModelFiles, component: str, cls: Any, dtype: torch.dtype, **options: Any
) -> Any:
    """Load a text encoder in this precision, on the CPU; see `read_component`."""
    return read_component(
        files,
        component,
        cls,
        dtype=dtype,  # else transformers loads in the config's precision and loses digits
        ignore_mismatched_sizes=True,  # so that the error can name them
        **options,
    )


def read_autoencoder(files: model_files.ModelFiles, component: str, cls: Any, dtype: torch.dtype) -> Any:
    """Load an autoencoder for a denoiser of this precision, on the CPU; see `read_component`.

    The autoencoder has the denoiser's precision, with one exception: the activations of most leave float16's range, so
    beside a float16 denoiser it is float32, unless `force_upcast` in its config is false, as in variants that were
    mended for float16.
    """
    keeps_range = read_config(files.directory, component).get("force_upcast", True) is False
    own = torch.float32 if dtype == torch.float16 and not keeps_range else dtype
    # torch_dtype and not dtype, which diffusers takes only from 0.42 on
    return read_component(files, component, cls, torch_dtype=own)


def replaced_table(text_encoder: Any, *, learns_rows: bool = True) -> TokenTable:
    """Put a token table in the place of a text encoder's vocabulary."""
    table = TokenTable(text_encoder.get_input_embeddings().weight, learns_rows=learns_rows)
    text_encoder.set_input_embeddings(table)
    return table


def scheduler_config(directory: Path) -> dict[str, Any]:
    """Return the scheduler's settings as its own class reads them, so that samplers of another class take over those
    that the file leaves to defaults."""
    config = read_config(directory, "scheduler")
    scheduler: Any = getattr(diffusers, config["_class_name"])
    whole = dict(scheduler.from_config(config).config)
    return {**whole, **{name: value for name, value in config.items() if name.startswith("_")}}


def drawing_defaults(scheduler: Mapping[str, Any], *, guidance_scale: float, steps: int) -> tuple[float, int]:
    """Return a model's own guidance scale and number of denoising steps: those that its scheduler's config gives as
    `_guidance_scale` and `_num_inference_steps`, else the given ones."""
    return float(scheduler.get("_guidance_scale", guidance_scale)), int(scheduler.get("_num_inference_steps", steps))


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Let text encoders multiply in bfloat16 within the block where the denoiser does: an accelerator is many times
    faster at that. Sums, norms and rows, with their gradients, stay float32; float16 could overflow."""
    return torch.autocast(device.type, dtype=dtype) if dtype == torch.bfloat16 else nullcontext()


def device_named(name: str) -> torch.device:
    """Return the torch device of a setting; `auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def dtype_named(precision: str, device: torch.device) -> torch.dtype:
    """Return the denoiser's precision for a setting. Raises ValueError for an unknown one."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if precision not in known:
        raise ValueError(f"precision {precision!r} must be 'auto' or one of {', '.join(map(repr, known))}")
    return known[precision]


def save_memory(saving: MemorySaving, denoiser: Any, autoencoder: Any, latent_shape: tuple[int, int, int]) -> None:
    """Run networks of diffusers in these ways; a warning names what an autoencoder has no code for, such as slices of
    VQModel."""
    if saving.checkpoints_gradients:
        denoiser.enable_gradient_checkpointing(_checkpoint)
    else:
        denoiser.disable_gradient_checkpointing()
    for way, wanted in (("slicing", saving.slices), ("tiling", saving.tiles)):
        if hasattr(autoencoder, f"use_{way}"):
            getattr(autoencoder, f"{'enable' if wanted else 'disable'}_{way}")()
        elif wanted:
            log.warning("%s has no %s: pictures are encoded and decoded without", type(autoencoder).__name__, way)
    if saving.tiles and hasattr(autoencoder, "use_tiling"):  # diffusers' tiles are of the size that a model draws
        tile = latent_shape[-1] // 2
        autoencoder.tile_latent_min_size = tile
        autoencoder.tile_sample_min_size = tile * 2 ** (len(autoencoder.config.block_out_channels) - 1)


def _checkpoint(module: Any, *args: Any) -> Any:
    """Call a module of a frozen network, which draws nothing at random, so that its activations are computed again."""
    return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False)
