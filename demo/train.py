"""Train the demo model from packages alone, stage by stage: `python -m demo.train`.

    pool         art packages -> captioned scenes in the work folder
    tokenizer    captions -> byte-pair vocabulary
    autoencoder  scenes -> KL autoencoder                        | these two are independent
    judge        scenes and captions -> small CLIP, `demo/clip`  | and may run side by side
    moco         scenes alone -> small ResNet, `demo/moco`; may run beside all others
    latents      autoencoder + scenes -> latents with zero mean and unit deviation, features of unnamed objects
    denoiser     latents, captions, the CLIP's text tower -> `demo/model`
    decoder      the autoencoder's decoder is trained further; may run beside the denoiser
    flow         scenes, `demo/model`, the text tower of `demo/clip` -> `demo/flow`, a rectified-flow transformer in
                 Stable Diffusion 3's layout that draws as `demo/model` does; runs only when it is named
    bert         `demo/model` -> `demo/bert`, a BERT text encoder for the same U-Net; runs only when it is named

A stage that was stopped continues from its checkpoint in the work folder. `--init-from demo/model` starts the
autoencoder and the denoiser from committed weights, `--init-from demo/clip` the CLIP. The committed vocabulary and
U-Net may be smaller ones (`demo.warm_start`).
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel

from demo.autoencoder import encode_pool, normalise_latents, train_autoencoder
from demo.bert_training import train_bert
from demo.clip_model import train_clip
from demo.denoiser import train_denoiser
from demo.flow_training import train_flow
from demo.latent_pool import LatentPool, assemble
from demo.loop import Budget
from demo.pool import build_pool, build_unnamed_pool, load_pool, load_unnamed_pool
from demo.self_supervised import train_self_supervised
from demo.tokenizer import load_tokenizer, make_tokenizer
from demo.unnamed import features_of
from textual_inversion.weights import load_pretrained

HERE = Path(__file__).parent
STAGES = ("pool", "tokenizer", "autoencoder", "judge", "moco", "latents", "denoiser", "decoder")
OTHER_LAYOUTS = ("flow", "bert")
"""Stages that run only when they are named: the same world for models of other layouts."""
DEFAULT_STEPS = {
    "autoencoder": 2000,
    "judge": 1200,
    "moco": 600,
    "denoiser": 3000,
    "decoder": 1000,
    "flow": 6000,
    "bert": 600,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Folders and budgets of the trainings."""

    work: Path
    model: Path
    clip: Path
    flow: Path
    moco: Path
    bert: Path
    device: torch.device
    scenes: int
    seed: int
    steps: int
    """Steps of the chosen training, 0 for the stage's default."""
    minutes: float
    """Wall-clock budget instead of steps, 0 for none."""
    init_from: Path | None
    decay_from: float
    """Part of the denoiser's budget at whose end its learning rate begins to fall."""

    def budget(self, stage: str) -> Budget:
        """Return a budget of minutes where they are given, and of steps otherwise."""
        if self.minutes:
            return Budget(minutes=self.minutes)
        return Budget(steps=self.steps or DEFAULT_STEPS[stage])

    def run(self, stage: str) -> None:
        """Run one stage."""
        getattr(self, f"_{stage}")()

    def _pool(self) -> None:
        build_pool(self.work, count=self.scenes, seed=self.seed + 1, workers=os.cpu_count() or 1)
        build_unnamed_pool(self.work, objects=self.scenes * 9 // 100, seed=self.seed + 3)

    def _tokenizer(self) -> None:
        make_tokenizer(load_pool(self.work).captions, self.work / "tokenizer")

    def _autoencoder(self) -> None:
        train_autoencoder(
            load_pool(self.work).pictures,
            self.work / "vae",
            self.work / "vae.ckpt",
            budget=self.budget("autoencoder"),
            device=self.device,
            seed=self.seed,
            init_from=self.init_from / "vae" if self.init_from else None,
        )

    def _judge(self) -> None:
        is_warm = self.init_from is not None
        train_clip(
            load_pool(self.work),
            load_tokenizer(self.work / "tokenizer"),
            self.clip,
            self.work / ("clip-warm.ckpt" if is_warm else "clip.ckpt"),
            budget=self.budget("judge"),
            device=self.device,
            seed=self.seed + is_warm,
            init_from=self.init_from,
        )

    def _moco(self) -> None:
        train_self_supervised(
            load_pool(self.work).pictures,
            self.moco,
            self.work / "moco.ckpt",
            budget=self.budget("moco"),
            device=self.device,
            seed=self.seed,
        )

    def _latents(self) -> None:
        path = self.work / "latents.pt"
        if path.exists():
            return
        model = load_pretrained(AutoencoderKL, str(self.work / "vae")).float().to(self.device).eval()
        unnamed = load_unnamed_pool(self.work)
        pictures = (load_pool(self.work).pictures, unnamed.pictures, unnamed.portraits)
        parts = [encode_pool(model, each, self.device) for each in pictures]
        means = normalise_latents(model.cpu(), torch.cat(parts)).split([len(part) for part in parts])
        model.save_pretrained(self.work / "vae-normalised")
        clip = load_pretrained(CLIPModel, str(self.clip)).float().eval()
        stored = {"named": means[0], "unnamed": means[1], "features": features_of(clip, unnamed.portraits, means[2])}
        torch.save(stored, path)

    def _latent_pool(self) -> LatentPool:
        stored = torch.load(self.work / "latents.pt")
        return assemble(
            load_pool(self.work),
            stored["named"],
            load_unnamed_pool(self.work),
            stored["unnamed"],
            stored["features"],
            load_tokenizer(self.work / "tokenizer"),
        )

    def _denoiser(self) -> None:
        train_denoiser(
            self._latent_pool(),
            load_tokenizer(self.work / "tokenizer"),
            load_pretrained(AutoencoderKL, str(self.work / "vae-normalised")).float(),
            self.model,
            self.work / "denoiser.ckpt",
            budget=self.budget("denoiser"),
            device=self.device,
            seed=self.seed,
            clip=self.clip,
            init_from=self.init_from,
            decay_from=self.decay_from,
        )

    def _decoder(self) -> None:
        folder = self.work / "vae-decoder"
        train_autoencoder(
            load_pool(self.work).pictures,
            folder,
            self.work / "decoder.ckpt",
            budget=self.budget("decoder"),
            device=self.device,
            seed=self.seed + 2,
            init_from=self.work / "vae-normalised",
            is_decoder_only=True,
        )
        if (self.model / "vae").exists():
            load_pretrained(AutoencoderKL, str(folder)).half().save_pretrained(self.model / "vae")

    def _flow(self) -> None:
        train_flow(
            load_pool(self.work),
            self.model,
            self.clip,
            self.flow,
            self.work,
            budget=self.budget("flow"),
            device=self.device,
            seed=self.seed + 4,
            decay_from=self.decay_from,
        )

    def _bert(self) -> None:
        train_bert(
            self.model,
            self.bert,
            self.work,
            budget=self.budget("bert"),
            device=self.device,
            seed=self.seed,
        )


def _parse() -> tuple[list[str], int, Recipe]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, in order")
    parser.add_argument(
        "--work", type=Path, default=HERE / ".work", help="archives, pool, checkpoints (ignored by git)"
    )
    parser.add_argument("--model", type=Path, default=HERE / "model", help="folder for the pipeline")
    parser.add_argument("--clip", type=Path, default=HERE / "clip", help="folder for the CLIP")
    parser.add_argument("--moco", type=Path, default=HERE / "moco", help="folder for the self-supervised ResNet")
    parser.add_argument("--flow", type=Path, default=HERE / "flow", help="folder for the rectified-flow pipeline")
    parser.add_argument("--bert", type=Path, default=HERE / "bert", help="folder for the BERT text encoder")
    parser.add_argument("--steps", type=int, default=0, help="steps of each chosen training; 0: its default")
    parser.add_argument("--minutes", type=float, default=0.0, help="wall-clock budget of each training, not steps")
    parser.add_argument("--scenes", type=int, default=48_000, help="size of the pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--init-from", type=Path, default=None, help="warm start from committed weights")
    parser.add_argument(
        "--decay-from", type=float, default=0.0, help="part of the denoiser's budget with the full learning rate"
    )
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = options.stages.split(",")
    if unknown := set(stages) - {*STAGES, *OTHER_LAYOUTS}:
        parser.error(f"unknown stages {sorted(unknown)}")
    recipe = Recipe(
        work=options.work,
        model=options.model,
        clip=options.clip,
        flow=options.flow,
        moco=options.moco,
        bert=options.bert,
        device=torch.device(device),
        scenes=options.scenes,
        seed=options.seed,
        steps=options.steps,
        minutes=options.minutes,
        init_from=options.init_from,
        decay_from=options.decay_from,
    )
    return stages, options.threads, recipe


def main() -> None:
    """Run the chosen stages in order."""
    stages, threads, recipe = _parse()
    if threads:
        torch.set_num_threads(threads)
    recipe.work.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        print(json.dumps({"stage": stage, "device": str(recipe.device)}), flush=True)
        recipe.run(stage)


if __name__ == "__main__":
    main()
