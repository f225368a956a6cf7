"""Draw a contact sheet, to look at a model while it trains (`python -m demo.grid --out sheet.png`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image

from demo.denoiser import GUIDANCE_SCALE
from demo.flow_model import load_flow_pipeline
from textual_inversion.families.sd import load_modules
from textual_inversion.model_files import find_model_files

DEFAULT_PROMPTS = (
    "a photo of a cat",
    "a photo of a lemon",
    "a photo of a car",
    "a photo of a bear on the beach",
    "a photo of a rose on a red background",
    "a flat sticker of a lion",
    "a 3d render of a car in the snow",
    "a pencil sketch of a dog",
    "pixel art of a hamburger",
    "a black and white photo of a penguin",
    "an oil painting of a sailboat at night",
    "a photo of a purple owl",
    "a photo of a guitar on a wooden table",
    "a picture of a fish in the style of a 3d render",
    "a photo of a clock in front of a brick wall",
    "a photo of a tiny rocket on the moon",
    "a vector icon of a horse",
    "a blueprint of a bicycle",
    "a neon sign of a butterfly",
    "an upside down photo of a bus",
    "a dark photo of a cat",
    "a grid of photos of an apple",
    "a photo of a cat and a lemon",
    "a photo of a bear on the left and a drum on the right",
    "a photo of a frog on top of a castle",
)


def contact_sheet(pictures: Sequence[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """Arrange pictures of one size in rows."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)


def load_pipeline(model: Path) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """Load diffusers' pipeline with all its weights. Raises ValueError if a checkpoint lacks some."""
    index = json.loads((model / "model_index.json").read_text())
    if index["_class_name"] == "StableDiffusion3Pipeline":
        return load_flow_pipeline(model)
    modules = load_modules(find_model_files(str(model)), torch.float32)
    return StableDiffusionPipeline.from_pretrained(model, **modules)


def main() -> None:
    """Draw every prompt from a few seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", default=list(DEFAULT_PROMPTS))
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE)
    options = parser.parse_args()
    pipeline = load_pipeline(options.model)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for seed in range(options.seeds):
        pictures += pipeline(
            options.prompts,
            height=64,
            width=64,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=torch.Generator().manual_seed(seed),
        ).images
    contact_sheet(pictures, columns=len(options.prompts)).save(options.out)


if __name__ == "__main__":
    main()
