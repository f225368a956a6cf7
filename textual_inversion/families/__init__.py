"""Model families: each module turns a diffusers checkpoint into a `Backbone`. Importing this loads none of them."""

from __future__ import annotations

from textual_inversion import model_files
from textual_inversion.families.base import Backbone


def load_backbone(model: str, *, device: str = "auto", precision: str = "auto") -> Backbone:
    """Load a frozen model from a diffusers directory or hub id, from safetensors only and without running its code.

    `device`: a torch device; `auto` is CUDA where there is one. `precision`: `float32`, `bfloat16` or `float16` of
    the denoiser; `auto` is bfloat16 on CUDA, float32 elsewhere. Raises ValueError for a model it cannot serve.
    """
    files = model_files.find_model_files(model)
    if files.pipeline_class == "StableDiffusionPipeline":
        from textual_inversion.families import sd

        return sd.load(files, device=device, precision=precision)
    raise ValueError(
        f"model {model!r} is a {files.pipeline_class}; families known here: StableDiffusionPipeline "
        "(Stable Diffusion 1.x and 2.x)"
    )
