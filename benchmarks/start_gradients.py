"""Measure how strongly the loss pulls a concept's row at two starts, a word's vector and the text encoder's output.

    python -m benchmarks.start_gradients tiger taxi koala tulip
    python -m benchmarks.start_gradients tiger taxi --learn --steps 150

For each concept of the manifest and each start: the row's length, the denoising loss over samples of one photo, the
length of its gradient, and what AdamW can do about it in a recipe's steps: a coordinate moves by at most the rate a
step, to be compared with the coordinates' root mean square. The penalty of Cross-Initialization has a gradient of its
weight's length wherever the row is. `--learn` also learns each concept by the recipe, without its penalty, and at ten
times its rate, and says how far the row went from its start. Prints markdown tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.config_file import RECIPES, load_config
from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.inputs.models import locate
from pipeline.store.addresses import absolute, read_bytes
from textual_inversion.augment_config import AugmentConfig
from textual_inversion.concept import Concept
from textual_inversion.config import InversionConfig
from textual_inversion.families import load_backbone
from textual_inversion.families.base import Backbone
from textual_inversion.initialise import class_vectors, encoder_output
from textual_inversion.latents import encode_views
from textual_inversion.learning import learn_outcomes
from textual_inversion.objective import denoising
from textual_inversion.photos import open_photo
from textual_inversion.prompts import HOLE, encode_prompt

SAMPLES = 16


def pull(backbone: Backbone, concept: Concept, rows: dict[str, Tensor], seed: int = 0) -> tuple[float, float]:
    """Return the denoising loss of "a photo of a" with these rows [dim], over `SAMPLES` samples of the concept's first
    photo, and the norm of its gradient with respect to them."""
    generator = torch.Generator().manual_seed(seed)
    photo = open_photo(read_bytes(absolute(concept.images[0])))
    views = encode_views(backbone, [photo], AugmentConfig(flip=False), concept.concept_id, seed)
    latents = views.moments[:, 0].expand(SAMPLES, *backbone.latent_shape)
    noise = torch.randn(SAMPLES, *backbone.latent_shape, generator=generator)
    timesteps = torch.randint(backbone.noise.num_timesteps, (SAMPLES,), generator=generator)
    noisy, target = backbone.noise.corrupt(latents, noise, timesteps)
    prompt = encode_prompt("a photo of a {}", {HOLE: [0]}, backbone.vocabularies)
    ids = {key: torch.tensor([prompt[key]] * SAMPLES) for key in prompt}
    leaves = {key: row[None].clone().requires_grad_() for key, row in rows.items()}
    conditioning = backbone.encode_prompts(ids, leaves)
    prediction = backbone.predict(noisy, backbone.noise.model_timesteps(timesteps), conditioning)
    loss = denoising(prediction, target).mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


def table(backbone: Backbone, concepts: list[Concept], reach: float) -> Iterator[str]:
    """Yield the lines of the table; `reach` is the most that a coordinate can move."""
    yield "| concept | start | norm | rms coordinate | most that a coordinate can move | loss | norm of dL/dv |"
    yield "|---|---|---|---|---|---|---|"
    for concept in concepts:
        outputs = {key: rows[0] for key, rows in encoder_output(concept, backbone).items()}
        for name, rows in (("word", class_vectors(concept, backbone)), ("encoder output", outputs)):
            row = torch.cat(list(rows.values()))
            loss, gradient = pull(backbone, concept, rows)
            yield (
                f"| {concept.concept_id} | {name} | {float(row.norm()):.3f} | {float(row.square().mean().sqrt()):.3f} "
                f"| {reach:.2f} | {loss:.3f} | {gradient:.2e} |"
            )


def moves(backbone: Backbone, concepts: list[Concept], inversion: InversionConfig) -> Iterator[str]:
    """Yield the lines of a table: how far each concept's first row goes, in units of its start's norm."""
    unpenalised = replace(inversion, penalties=replace(inversion.penalties, start_distance=0.0))
    variants = {
        "as it is": inversion,
        "without the penalty": unpenalised,
        "ten times the rate": replace(inversion, learning_rate=10 * inversion.learning_rate),
    }
    yield "| concept | recipe | moved by, of the start's norm | norm | mean loss of the last tenth |"
    yield "|---|---|---|---|---|"
    for concept in concepts:
        photos = [open_photo(read_bytes(absolute(image))) for image in concept.images]
        start = torch.cat([rows[0] for rows in encoder_output(concept, backbone).values()])
        for name, config in variants.items():
            (outcome,) = learn_outcomes(backbone, [(concept, photos)], config, slots=1, seed=0, extractor=None)
            assert outcome.embedding is not None
            row = torch.cat([rows[0] for rows in outcome.embedding.vectors.values()])
            moved = float((row - start).norm() / start.norm())
            last = float(outcome.curve[-(len(outcome.curve) // 10 or 1) :, 1].mean())
            yield f"| {concept.concept_id} | {name} | {moved:.3f} | {float(row.norm()):.3f} | {last:.3f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("concepts", nargs="+", help="ids of concepts of the manifest")
    parser.add_argument("--manifest", default="manifests/demo.parquet")
    parser.add_argument("--model", default=RunConfig().model)
    parser.add_argument("--recipe", default="cross-init", help="recipe whose rate, steps and penalty are compared")
    parser.add_argument("--steps", type=int, default=0, help="steps; 0 takes the recipe's")
    parser.add_argument("--learn", action="store_true", help="also learn the concepts and say how far their rows go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    inversion = load_config((RECIPES / f"{options.recipe}.toml").read_text()).inversion
    steps = options.steps or inversion.steps
    manifest = read_manifest(absolute(options.manifest))
    chosen = {row.concept.concept_id: row.concept for row in manifest if isinstance(row, ManifestRow)}
    backbone = load_backbone(locate(options.model), device="cpu", precision="float32")
    sys.stdout.write(
        f"{steps} steps at {inversion.learning_rate:g}; the penalty's gradient has the norm "
        f"{inversion.penalties.start_distance:g}\n\n"
    )
    concepts = [chosen[concept_id] for concept_id in options.concepts]
    lines: Iterable[str] = table(backbone, concepts, steps * inversion.learning_rate)
    if options.learn:
        lines = chain(lines, [""], moves(backbone, concepts, replace(inversion, steps=steps)))
    for line in lines:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
