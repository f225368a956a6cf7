"""Measure the demo model on fresh scenes of known objects: `python -m demo.evaluate`.

Scenes come from a seed that no training used. Accuracy on real scenes shows how good the CLIP is, which bounds the
other figures; accuracy on drawn pictures shows how well the diffusion model follows the name, the place, the style and
the view of a prompt, as the CLIP classifies them. A pair counts as named if each object is named among 100 on its own
half of the picture, so the CLIP need not understand texts about two. For nouns whose colour varies unsaid the figure is
the entropy of their colours. Results go to `demo/figures.json`, with the command, the versions and the time.
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

from demo.art import Atlas, load_atlas
from demo.autoencoder import to_tensor
from demo.clip_model import features
from demo.denoiser import GUIDANCE_SCALE
from demo.grid import load_pipeline
from demo.objects import TRAINING
from demo.questions import (
    ColourQuestion,
    PairQuestion,
    Question,
    colour_questions,
    mean_entropy_bits,
    name_questions,
    pair_questions,
    place_questions,
    style_questions,
    view_questions,
)
from demo.tokenizer import encode
from demo.views import VIEWS
from demo.world import PICTURE_PX, STYLES, Scene, draw, sample_scene
from textual_inversion.weights import load_pretrained

HERE = Path(__file__).parent
_SEED = 20_261_121
_NUM_NAMES = 100
AnyQuestion = Question | PairQuestion | ColourQuestion


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
        scene = sample_scene(TRAINING, rng)
        picture = to_tensor(np.asarray(draw(scene, atlas, rng))[None], torch.device("cpu"))
        decoded = pipeline.vae.decode(pipeline.vae.encode(picture).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - picture).pow(2).mean().item())
    per_picture = 10 * np.log10(4 / np.asarray(errors))
    return {"of_mean_error_db": float(10 * np.log10(4 / np.mean(errors))), "mean_db": float(per_picture.mean())}


def accuracy(classifier: CaptionClassifier, pictures: Sequence[Image.Image], question: Question) -> float:
    """Return the share of pictures for which CLIP chooses the right caption."""
    return float((classifier.choose(pictures, question.options) == question.answers).mean())


def halves(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return the middle square of the left half and of the right half, at the picture's size."""
    side, height = picture.width // 2, picture.height
    boxes = [(left, (height - side) // 2, left + side, (height + side) // 2) for left in (0, picture.width - side)]
    # cut out first: resizing a box of the whole picture reads a pixel of the other half
    left, right = (picture.crop(box).resize(picture.size, Image.Resampling.BICUBIC) for box in boxes)
    return left, right


def pair_accuracy(
    classifier: CaptionClassifier, pictures: Sequence[Image.Image], question: PairQuestion
) -> dict[str, float]:
    """Return the share of pictures in which CLIP names both objects rightly, each on a half of its own, and the share
    in which they are also on the sides that the prompt says, among prompts that say them."""
    cut = [half for picture in pictures for half in halves(picture)]
    named = classifier.choose(cut, [question.options] * len(cut)).reshape(-1, 2)
    are_named = (np.sort(named, 1) == np.sort(question.answers, 1)).all(1)
    are_in_place = (named == question.answers).all(1)[question.is_ordered]
    return {"both_named": float(are_named.mean()), "both_in_place": float(are_in_place.mean())}


def colour_entropy(classifier: CaptionClassifier, pictures: Sequence[Image.Image], question: ColourQuestion) -> float:
    """Return the entropy in bits of the colours that CLIP sees in pictures of one noun, averaged over nouns."""
    return mean_entropy_bits(classifier.choose(pictures, question.options), question.nouns)


def _measure(classifier: CaptionClassifier, pictures: Sequence[Image.Image], question: AnyQuestion) -> float | dict:
    if isinstance(question, PairQuestion):
        return pair_accuracy(classifier, pictures, question)
    if isinstance(question, ColourQuestion):
        return colour_entropy(classifier, pictures, question)
    return accuracy(classifier, pictures, question)


def all_questions(repeats: int) -> dict[str, AnyQuestion]:
    """Return the questions by the name of their figure."""
    order = np.random.default_rng(_SEED).permutation(len(TRAINING))
    things = [TRAINING[index] for index in order]
    return {
        f"name_of_{_NUM_NAMES}": name_questions(things[:_NUM_NAMES], repeats),
        "place_of_8": place_questions(things, 6 * repeats),
        f"style_of_{len(STYLES)}": style_questions(things, 7 * repeats),
        f"view_of_{1 + len(VIEWS)}": view_questions(things, 6 * repeats),
        f"pair_of_{_NUM_NAMES}_each": pair_questions(things[:_NUM_NAMES], 50 * repeats),
        "colour_entropy_bits": colour_questions(things, 8 * repeats, _SEED),
    }


def evaluate(options: argparse.Namespace) -> dict:
    """Compute all figures."""
    atlas = load_atlas(options.work)
    pipeline = load_pipeline(options.model)
    pipeline.set_progress_bar_config(disable=True)
    clip = load_pretrained(CLIPModel, str(options.clip)).eval()
    classifier = CaptionClassifier(clip, CLIPTokenizer.from_pretrained(options.clip))
    figures: dict = {"autoencoder_psnr": autoencoder_psnr(pipeline, atlas, 400), "real": {}, "drawn": {}}
    for key, question in all_questions(options.repeats).items():
        figures["real"][key] = _measure(classifier, real_pictures(question.scenes, atlas), question)
        if not options.is_real_only:
            pictures = drawn_pictures(pipeline, question.prompts, steps=options.steps, guidance=options.guidance)
            figures["drawn"][key] = _measure(classifier, pictures, question)
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
    parser.add_argument("--repeats", type=int, default=2, help="pictures of every name; other questions in step")
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
