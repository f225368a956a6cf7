"""Implement Textual Inversion as it is commonly written, for comparison with the engine only.

Written from a description of what widely used training scripts do, in plain torch:

- the vocabulary is resized by the new word, and AdamW steps the WHOLE token table (gradient, two moments and decay for
  every word); after each step all rows but the new one are copied back from a clone;
- every step resizes its photos, tokenises its prompts, and runs the autoencoder on its pixels;
- every step copies the loss to the CPU, for the progress bar;
- a process learns one concept at a time.

In favour of this algorithm, photos are decoded once, not at every step, and the model stays loaded between concepts.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPTokenizer

from textual_inversion.concept import Concept
from textual_inversion.families.sd import load_modules
from textual_inversion.model_files import find_model_files
from textual_inversion.prompts import training_templates

WORD = "<new-word>"


class CommonAlgorithm:
    """Frozen Stable Diffusion with one new word, and its training."""

    def __init__(
        self,
        *,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
        vae: Any,
        scheduler: Any,
        learning_rate: float,
        batch_size: int,
        weight_decay: float = 1e-2,
    ) -> None:
        """Take modules that are on their device. The denoiser's precision decides whether the text encoder, which stays
        in float32, runs under autocast. The tokenizer and the text encoder are changed."""
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._unet = unet
        self._vae = vae
        self._scheduler = scheduler
        self._batch_size = batch_size
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        for module in (text_encoder, unet, vae):
            module.requires_grad_(False).eval()
        self._vocabulary = text_encoder.get_input_embeddings().weight.detach().clone()
        tokenizer.add_tokens([WORD])
        self._word_id: int = tokenizer.convert_tokens_to_ids(WORD)
        text_encoder.resize_token_embeddings(max(len(tokenizer), len(self._vocabulary)), mean_resizing=False)
        self._table = text_encoder.get_input_embeddings().weight.requires_grad_()
        self._others = torch.arange(len(self._table), device=unet.device) != self._word_id

    @classmethod
    def load(cls, model: str, *, learning_rate: float, batch_size: int, device: str = "cpu") -> CommonAlgorithm:
        """Load a diffusers directory in float32."""
        modules = load_modules(find_model_files(model), torch.float32)
        return cls(
            tokenizer=CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
            scheduler=DDPMScheduler.from_pretrained(model, subfolder="scheduler"),
            learning_rate=learning_rate,
            batch_size=batch_size,
            **{name: module.to(device) for name, module in modules.items()},
        )

    def begin(self, concept: Concept, photos: Sequence[Image.Image], seed: int = 0) -> None:
        """Restore the token table and set up for a concept. Raises ValueError unless it has one vector and an
        initializer that is one token."""
        ids = self._tokenizer(concept.initializer, add_special_tokens=False).input_ids
        if concept.num_vectors != 1 or len(ids) != 1:
            raise ValueError(
                f"concept {concept.concept_id!r} has {concept.num_vectors} vectors and an initializer "
                f"({concept.initializer!r}) of {len(ids)} tokens; the common algorithm knows one of each"
            )
        with torch.no_grad():
            self._table[: len(self._vocabulary)] = self._vocabulary
            self._table[self._word_id] = self._vocabulary[ids[0]]
        self._frozen = self._table.detach().clone()
        self._optimizer = torch.optim.AdamW([self._table], lr=self._learning_rate, weight_decay=self._weight_decay)
        self._photos = photos
        self._templates = training_templates(concept, class_cue=False)
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def learn(self, steps: int, on_row: Callable[[int, Tensor], None] | None = None, every: int = 0) -> Tensor:
        """Take `steps` steps and return the new row [1, dim] on the CPU; call `on_row(step, row)` every `every`
        steps."""
        for step in range(1, steps + 1):
            self._step()
            if on_row is not None and every and step % every == 0:
                on_row(step, self.row())
        return self.row()

    def row(self) -> Tensor:
        """Return a copy of the new row on the CPU, [1, dim]."""
        return self._table[self._word_id].detach().clone().cpu()[None]

    def _step(self) -> float:
        device = self._unet.device
        dtype = self._unet.dtype
        pixels, ids = self._samples()
        with torch.no_grad():
            posterior = self._vae.encode(pixels.to(device, self._vae.dtype)).latent_dist
        latents = (posterior.sample() * self._vae.config.scaling_factor).to(dtype)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(self._scheduler.config.num_train_timesteps, (len(latents),), device=device)
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        half = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with half:
            hidden = self._text_encoder(ids.to(device))[0].to(dtype)
            prediction = self._unet(noisy, timesteps, hidden).sample
        if self._scheduler.config.prediction_type == "v_prediction":
            noise = self._scheduler.get_velocity(latents, noise, timesteps)
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            self._table[self._others] = self._frozen[self._others]
        return loss.item()

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Return pixels [batch, 3, side, side] in [-1, 1] and token ids of prompts [batch, length]."""
        side = self._unet.config.sample_size * 2 ** (len(self._vae.config.block_out_channels) - 1)
        pixels = []
        texts = []
        for number in torch.randint(len(self._photos), (self._batch_size,), generator=self._generator).tolist():
            photo = self._photos[number].resize((side, side), Image.Resampling.BICUBIC)
            if self._random.random() < 0.5:
                photo = ImageOps.mirror(photo)
            pixels.append(torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1)
            texts.append(self._random.choice(self._templates).replace("{}", WORD))
        length = min(self._tokenizer.model_max_length, self._text_encoder.config.max_position_embeddings)
        encoded = self._tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return torch.stack(pixels), encoded.input_ids
