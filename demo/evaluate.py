"""Measure the demo model on fresh scenes of known objects: `python -m demo.evaluate`.

Scenes come from a seed that no training used. Accuracy on real scenes shows how good the CLIP is, which bounds the
other figures; accuracy on drawn pictures shows how well the diffusion model follows the name, the place and the style
of a prompt, as the CLIP classifies them. Results go to `demo/figures.json`, with the command, the versions and the
time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from demo import captions
from demo.art import Atlas, load_atlas
from demo.autoencoder import to_tensor
from demo.clip_model import features
from demo.denoiser import GUIDANCE_SCALE
from demo.grid import load_pipeline
from demo.objects import CORE, TRAINING, WorldObject
from demo.tokenizer import encode
from demo.world import PICTURE_PX, STYLES, Scene, draw, sample_scene
from textual_inversion.weights import load_pretrained

HERE = Path(__file__).parent
_SEED = 20_261_121
_NUM_NAMES = 100


@dataclass(frozen=True, slots=True)
class CaptionClassifier:
    """The small CLIP with its tokenizer, choosing among captions for each picture."""

    model: CLIPModel
    tokenizer: CLIPTokenizer

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return features of unit length (picture, width)."""
        batch = to_tensor(np.stack([np.asarray(picture) for picture in pictures]), torch.device("cpu"))
        return torch.cat([features(self.model.get_image_features(pixel_values=part)) for part in batch.split(100)])

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return features of unit length (text, width)."""
        return features(self.model.get_text_features(input_ids=encode(self.tokenizer, texts)))

    def choose(self, pictures: Sequence[Image.Image], options: Sequence[Sequence[str]]) -> np.ndarray:
        """Return the index of the text nearest to each picture; picture i chooses among options[i]."""
        images = self.image_features(pictures)
        distinct = sorted({text for row in options for text in row})
        scores = images @ self.text_features(distinct).T
        column = {text: index for index, text in enumerate(distinct)}
        columns = torch.tensor([[column[text] for text in row] for row in options])
        return scores.gather(1, columns).argmax(1).numpy()


def name_question(things: Sequence[WorldObject]) -> list[str]:
    """Return one neutral caption for each name."""
    return [captions.fill("a photo of a {}", thing.name) for thing in things]


def place_question(thing: WorldObject) -> list[str]:
    """Return captions of the same object in every place."""
    return [
        captions.fill("a photo of a {}", thing.name) + f" {phrases[0]}" for phrases in captions.PLACE_PHRASES.values()
    ]


def style_question(thing: WorldObject) -> list[str]:
    """Return captions of the same object in every style, the plain look first."""
    templates = ["a photo of a {}", *(options[0] for options in captions.STYLE_TEMPLATES.values())]
    return [captions.fill(template, thing.name) for template in templates]


@dataclass(frozen=True, slots=True)
class Question:
    """Pictures to make (prompts for the model, scenes for the world) with the captions to choose from and the right
    ones."""

    prompts: list[str]
    scenes: list[Scene]
    options: list[list[str]]
    answers: np.ndarray


def name_questions(things: Sequence[WorldObject], repeats: int) -> Question:
    """Make questions about the name."""
    question = name_question(things)
    indices = np.tile(np.arange(len(things)), repeats)
    return Question(
        prompts=[question[index] for index in indices],
        scenes=[Scene(things[index]) for index in indices],
        options=[question] * len(indices),
        answers=indices,
    )


def place_questions(things: Sequence[WorldObject], per_place: int) -> Question:
    """Make questions about the place, with the name given."""
    places = list(captions.PLACE_PHRASES)
    pairs = [(place, things[i * len(places) + place]) for i in range(per_place) for place in range(len(places))]
    return Question(
        prompts=[place_question(thing)[place] for place, thing in pairs],
        scenes=[Scene(thing, background=places[place]) for place, thing in pairs],
        options=[place_question(thing) for _, thing in pairs],
        answers=np.asarray([place for place, _ in pairs]),
    )


def style_questions(things: Sequence[WorldObject], per_style: int) -> Question:
    """Make questions about the style, with the name given."""
    pairs = [(style, things[i * len(STYLES) + style]) for i in range(per_style) for style in range(len(STYLES))]
    return Question(
        prompts=[style_question(thing)[style] for style, thing in pairs],
        scenes=[Scene(thing, style=STYLES[style]) for style, thing in pairs],
        options=[style_question(thing) for _, thing in pairs],
        answers=np.asarray([style for style, _ in pairs]),
    )


def real_pictures(scenes: Sequence[Scene], atlas: Atlas) -> list[Image.Image]:
    """Return the world's own drawings of the scenes."""
    return [draw(scene, atlas, np.random.default_rng((_SEED, index))) for index, scene in enumerate(scenes)]


def drawn_pictures(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], *, steps: int, guidance: float, batch: int = 50
) -> list[Image.Image]:
    """Return the model's drawings of the prompts."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        pictures += pipeline(
            list(prompts[start : start + batch]),
            height=PICTURE_PX,
            width=PICTURE_PX,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(_SEED + start),
        ).images
    return pictures


@torch.no_grad()
def autoencoder_psnr(pipeline: StableDiffusionPipeline, atlas: Atlas, count: int) -> dict[str, float]:
    """Return the PSNR in dB of fresh scenes: of the mean error, and the mean over pictures."""
    errors = []
    for start in range(count):
        rng = np.random.default_rng((_SEED, 1, start))
        picture = to_tensor(np.asarray(draw(sample_scene(TRAINING, rng), atlas, rng))[None], torch.device("cpu"))
        decoded = pipeline.vae.decode(pipeline.vae.encode(picture).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - picture).pow(2).mean().item())
    per_picture = 10 * np.log10(4 / np.asarray(errors))
    return {"of_mean_error_db": float(10 * np.log10(4 / np.mean(errors))), "mean_db": float(per_picture.mean())}


def accuracy(classifier: CaptionClassifier, pictures: Sequence[Image.Image], question: Question) -> float:
    """Return the share of pictures for which CLIP chooses the right caption."""
    return float((classifier.choose(pictures, question.options) == question.answers).mean())


def evaluate(options: argparse.Namespace) -> dict:
    """Compute all figures."""
    atlas = load_atlas(options.work)
    pipeline = load_pipeline(options.model)
    pipeline.set_progress_bar_config(disable=True)
    clip = load_pretrained(CLIPModel, str(options.clip)).eval()
    tokenizer = CLIPTokenizer.from_pretrained(options.clip)
    classifier = CaptionClassifier(clip, tokenizer)
    order = np.random.default_rng(_SEED).permutation(len(CORE))
    things = [CORE[index] for index in order]
    questions = {
        "name_of_100": name_questions(things[:_NUM_NAMES], options.repeats),
        "place_of_8": place_questions(things, 6 * options.repeats),
        "style_of_7": style_questions(things, 7 * options.repeats),
    }
    figures: dict = {"autoencoder_psnr": autoencoder_psnr(pipeline, atlas, 400), "real": {}, "drawn": {}}
    for key, question in questions.items():
        figures["real"][key] = accuracy(classifier, real_pictures(question.scenes, atlas), question)
        if not options.is_real_only:
            pictures = drawn_pictures(pipeline, question.prompts, steps=options.steps, guidance=options.guidance)
            figures["drawn"][key] = accuracy(classifier, pictures, question)
        figures[f"num_{key}"] = len(question.prompts)
        print(json.dumps(figures), flush=True)
    figures["sampler"] = {"scheduler": "DDIM", "steps": options.steps, "guidance": options.guidance}
    return figures


def main() -> None:
    """Measure the figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--clip", type=Path, default=HERE / "clip")
    parser.add_argument("--out", type=Path, default=HERE / "figures.json")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--repeats", type=int, default=2, help="pictures of every name; places and styles in step")
    parser.add_argument(
        "--real-only", dest="is_real_only", action="store_true", help="only real scenes and the autoencoder"
    )
    options = parser.parse_args()
    start_s = time.monotonic()
    figures = evaluate(options)
    figures["seconds"] = round(time.monotonic() - start_s)
    figures["command"] = " ".join(["python -m demo.evaluate", *sys.argv[1:]])
    figures["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
