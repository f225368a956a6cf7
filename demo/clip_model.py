"""Train the small CLIP of the demo world, which scores pictures and starts the diffusion model's text encoder.

Training is contrastive on the same scenes. A batch never holds two scenes that one caption could describe: at first all
names are distinct, so that names are learned first; then every name occurs four times with different attributes, so
that style, place, tint and size must be distinguished too.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.autoencoder import to_tensor
from demo.loop import Average, Budget, Randomness, Training, optimise
from demo.pool import Pool
from demo.tokenizer import encode
from demo.warm_start import transfer_clip
from demo.world import PICTURE_PX
from textual_inversion.weights import load_pretrained

WIDTH = 192
_LAYERS = 4
_BATCH = 128
_LEARNING_RATE = 1e-3
_NAMES_ONLY_FRACTION, _WARM_NAMES_ONLY_FRACTION = 0.4, 0.2
_SCENES_PER_NAME = 4


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Configure the text tower with the tokenizer's special ids: the default end id (2) selects a legacy pooling."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Make an untrained CLIP of about four million parameters."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "image_size": PICTURE_PX,
        "patch_size": 8,
        "projection_dim": WIDTH,
    }
    config = CLIPConfig(text_config=text_config(tokenizer).to_dict(), vision_config=vision, projection_dim=WIDTH)
    return CLIPModel(config)


def features(output: object) -> Tensor:
    """Return projected features of `get_*_features` at unit length (transformers 5 wraps them in an output object)."""
    tensor = output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]
    return F.normalize(tensor.float(), dim=-1)


class PairSampler:
    """Sampler of pool rows whose captions name their object, so that no two rows of a batch mean the same."""

    def __init__(self, pool: Pool) -> None:
        self.attributes = [
            (*attributes, *names[1:]) for attributes, names in zip(pool.attributes, pool.names, strict=True)
        ]
        rows_of: dict[str, list[int]] = {}
        for row, (text, names) in enumerate(zip(pool.captions, pool.names, strict=True)):
            if all(name in text for name in names):
                rows_of.setdefault(names[0], []).append(row)
        self.rows_of = [np.asarray(rows) for rows in rows_of.values()]

    def draw(self, batch: int, scenes_per_name: int, rng: np.random.Generator) -> np.ndarray:
        """Draw pool rows, int64 (about batch,): `scenes_per_name` scenes with distinct attributes for each name."""
        count = min(batch // scenes_per_name, len(self.rows_of))
        rows: list[int] = []
        for index in rng.choice(len(self.rows_of), count, replace=False):
            seen: set[tuple[str, ...]] = set()
            of_name = self.rows_of[index]
            for row in rng.choice(of_name, min(3 * scenes_per_name, len(of_name)), replace=False):
                if len(seen) < scenes_per_name and self.attributes[row] not in seen:
                    seen.add(self.attributes[row])
                    rows.append(int(row))
        return np.asarray(rows)


def contrastive_loss(text: Tensor, image: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return CLIP's symmetric loss (Radford et al. 2021) and the top-1 accuracy of pictures over captions."""
    logits = logit_scale.exp().clamp(max=100) * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)), accuracy


def train_clip(
    pool: Pool,
    tokenizer: CLIPTokenizer,
    folder: Path,
    checkpoint: Path,
    *,
    budget: Budget,
    device: torch.device,
    seed: int,
    init_from: Path | None = None,
) -> None:
    """Train the CLIP and save its averaged weights, with tokenizer and image processor, into `folder`.

    `init_from`: folder of a CLIP to start from, which may have another vocabulary.
    """
    torch.manual_seed(seed)
    if init_from:
        known = load_pretrained(CLIPModel, str(init_from))
        model = transfer_clip(known, CLIPTokenizer.from_pretrained(init_from), tokenizer)
    else:
        model = new_clip(tokenizer)
    model = model.float().to(device).train()
    batch = _BATCH if device.type == "cpu" else 2 * _BATCH
    names_only = _WARM_NAMES_ONLY_FRACTION if init_from else _NAMES_ONLY_FRACTION
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    randomness = Randomness(seed=seed, device=device)
    average = Average(model, decay=0.99)
    sampler = PairSampler(pool)
    ids = encode(tokenizer, pool.captions)

    def loss(fraction_done: float) -> tuple[Tensor, dict[str, float]]:
        scenes_per_name = 1 if fraction_done < names_only else _SCENES_PER_NAME
        rows = sampler.draw(batch, scenes_per_name, randomness.numpy)
        text = features(model.get_text_features(input_ids=ids[rows].to(device)))
        image = features(model.get_image_features(pixel_values=to_tensor(pool.pictures[rows], device)))
        total, accuracy = contrastive_loss(text, image, model.logit_scale)
        return total, {"loss": total.item(), "top1": accuracy.item()}

    def save(step: int) -> None:
        averaged = CLIPModel(model.config)
        average.copy_to(averaged)
        save_clip(averaged, tokenizer, folder)

    stateful = {"model": model, "average": average, "randomness": randomness}
    optimise(
        Training(
            name="judge",
            loss=loss,
            optimizer=optimizer,
            budget=budget,
            checkpoint=checkpoint,
            stateful=stateful,
            after_step=average.update,
            on_save=save,
            save_every_s=240,
            log_every_steps=20,
            warmup_steps=60,
        )
    )


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the directory that `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` load, in fp16."""
    model.half().save_pretrained(folder)
    declare_float32(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": PICTURE_PX, "width": PICTURE_PX}
    CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    ).save_pretrained(folder)


def declare_float32(folder: Path) -> None:
    """Let `from_pretrained` without a dtype load fp32 from the fp16 file.

    transformers follows `dtype` in the config, diffusers always loads fp32: without this a pipeline would mix both.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """Return the text tower alone, as a diffusion pipeline loads it, in fp32."""
    encoder = CLIPTextModel(clip.config.text_config)
    weights = clip.text_model.state_dict()
    prefix = "text_model." if any(key.startswith("text_model.") for key in encoder.state_dict()) else ""
    encoder.load_state_dict({prefix + key.removeprefix("text_model."): value for key, value in weights.items()})
    return encoder.float()
