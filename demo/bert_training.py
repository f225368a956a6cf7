"""Distil the demo model's CLIP text encoder into a BERT text encoder for the same U-Net.

A U-Net sees a prompt through its cross-attention alone, which does not know the order of the states. The student's
states for words, end of text and the first paddings are to equal the teacher's; beyond the teacher's length there are
more paddings, and they must not draw attention away. Therefore the loss has two parts: the error of aligned states, and
the error of what every cross-attention layer gives for queries that the U-Net made while it drew pictures. Some
captions hold a word with a random row, so that rows which no word has mean the same to both: learned words are such.

All positions beyond the teacher's length share one vector, so their paddings share one state, which is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertEncoder, LDMBertModel
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPTextModel, CLIPTokenizer

from demo.bert_model import bert_from_clip, load_bert, save_bert, unet_digest
from demo.bert_tokenizer import PairedCaptions, make_wordpiece, pair_captions
from demo.loop import Budget, Randomness, Training, optimise
from demo.mixtures import Mixtures, mix, unname
from demo.objects import TRAINING
from demo.tokenizer import load_tokenizer
from demo.unnamed import UNNAMED, OpenVocabulary, open_vocabulary
from demo.world import caption, sample_scene
from textual_inversion.weights import load_pretrained
from textual_inversion.wordpiece import PROMPT_LENGTH

_CAPTIONS = 40_000
_FRESH_CAPTIONS = 24
"""Captions of the measured error; no training step sees them."""
_UNNAMED_SHARE = 0.3
_CAPTIONS_PER_BATCH = 32
_QUERIES_PER_STEP = 32
_QUERIES_PER_PICTURE = 8
_DRAWING_STEPS = 6
_LEARNING_RATE = 1e-3


def sample_texts(count: int, seed: int) -> list[str]:
    """Return captions of random scenes; in some the unnamed word stands for an object's name, or before it."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        scene = sample_scene(TRAINING, rng)
        text = caption(scene, rng)
        if rng.random() < _UNNAMED_SHARE:
            text = unname(text, scene.names, rng)
        texts.append(text)
    return texts


@dataclass(frozen=True, slots=True)
class Drawings:
    """Records of the U-Net while it draws: one entry for each picture and step."""

    latents: Tensor
    """Noisy latents, fp32 [entries, channels, height, width]."""
    timesteps: Tensor
    """Timesteps, int64 [entries]."""
    queries: list[Tensor]
    """Inputs of each cross-attention layer at a few places of the picture, fp32 [inputs, width]."""


def cross_attentions(unet: UNet2DConditionModel) -> list[nn.Module]:
    """Return the layers through which the U-Net reads a prompt's states."""
    return [module.attn2 for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


@torch.no_grad()
def draw(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, states: Tensor, generator: torch.Generator, steps: int
) -> Drawings:
    """Draw one picture for each prompt's states, [pictures, tokens, width], and record every step."""
    layers = cross_attentions(unet)
    queries: list[list[Tensor]] = [[] for _ in layers]

    def record(index: int, hidden: Tensor) -> None:
        flat = hidden.flatten(0, 1)
        count = min(len(flat), _QUERIES_PER_PICTURE * len(states))
        queries[index].append(flat[torch.randperm(len(flat), generator=generator, device=flat.device)[:count]])

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, index=index: record(index, args[0]))
        for index, layer in enumerate(layers)
    ]
    config = unet.config
    shape = (len(states), config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=generator, device=states.device)
    scheduler.set_timesteps(steps)
    seen = []
    for timestep in scheduler.timesteps.to(states.device):
        seen.append(latents)
        velocity = unet(latents, timestep, states).sample
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    for hook in hooks:
        hook.remove()
    timesteps = scheduler.timesteps.repeat_interleave(len(states)).to(states.device)
    return Drawings(torch.cat(seen), timesteps, [torch.cat(each) for each in queries])


def unexplained(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the squared error as a share of the variance of `theirs` along the first dimension."""
    return (ours - theirs).pow(2).mean() / (theirs - theirs.mean(0)).pow(2).mean()


@torch.no_grad()
def prediction_error(unet: UNet2DConditionModel, drawings: Drawings, ours: Tensor, theirs: Tensor) -> float:
    """Return how far the U-Net's predictions with our states are from those with their states, where 1 is the distance
    to predictions for another prompt. The states belong to the pictures of `drawings`, [pictures, tokens, width]."""
    errors, distances = 0.0, 0.0
    count = len(theirs)
    for start in range(0, len(drawings.latents), count):
        noisy = drawings.latents[start : start + count]
        timesteps = drawings.timesteps[start : start + count]
        right = unet(noisy, timesteps, theirs).sample
        errors += (unet(noisy, timesteps, ours).sample - right).pow(2).mean().item()
        distances += (unet(noisy, timesteps, theirs.roll(1, 0)).sample - right).pow(2).mean().item()
    return errors / distances


def share_positions(encoder: LDMBertEncoder, start: int) -> None:
    """Give all positions from `start` on the vector of that position, in place."""
    positions = encoder.embed_positions.weight.data
    positions[start + 1 :] = positions[start]


def padded_states(encoder: LDMBertEncoder, embedded: Tensor) -> Tensor:
    """Return the states of prompts that end in equal paddings at equal positions, [prompts, 77, width].

    `embedded`: token rows up to the first of those paddings, [prompts, tokens, width]. The encoder has no mask, so the
    equal paddings have equal states: one is computed and counts in each softmax as often as it stands there.
    """
    count = embedded.shape[1]
    copies = PROMPT_LENGTH - count + 1
    weight = embedded.new_zeros(1, 1, count, count)
    weight[..., -1] = math.log(copies)
    hidden = embedded + encoder.embed_positions.weight[:count]
    for layer in encoder.layers:
        hidden = layer(hidden, weight.expand(len(hidden), -1, -1, -1), layer_head_mask=None)[0]
    hidden = encoder.layer_norm(hidden)
    return torch.cat([hidden, hidden[:, -1:].expand(-1, copies - 1, -1)], dim=1)


class TextEncoders:
    """Teacher and student, with the rows of a word that neither vocabulary has."""

    def __init__(self, teacher: CLIPTextModel, student: LDMBertModel, words: tuple[Tensor, Tensor]) -> None:
        """Take the encoders. `words`: ids of the common words, in the teacher's and the student's vocabulary.

        The teacher's token table is wrapped in place.
        """
        self.teacher, self.student, self.words = teacher, student, words
        self.their_table = open_vocabulary(teacher)
        self.our_table = OpenVocabulary(student.model.embed_tokens)

    def to(self, device: torch.device) -> None:
        """Move both encoders."""
        self.teacher.to(device)
        self.student.to(device)
        self.words = (self.words[0].to(device), self.words[1].to(device))

    def mix(self, count: int, generator: torch.Generator) -> Mixtures:
        """Draw mixtures of words."""
        return mix(count, self.their_table.table.weight[self.words[0]], generator)

    def states(self, captions: PairedCaptions, mixtures: Mixtures) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's states, [captions, tokens, width]; one mixture for each caption."""
        for vocabulary, ids in zip((self.their_table, self.our_table), self.words, strict=True):
            vocabulary.rows = mixtures.rows(vocabulary.table.weight[ids])
        with torch.no_grad():
            theirs = self.teacher(captions.teacher_ids).last_hidden_state
        length = captions.teacher_ids.shape[1]
        return padded_states(self.student.model, self.our_table(captions.student_ids[:, : length + 1])), theirs


def state_error(ours: Tensor, theirs: Tensor, aligned: Tensor) -> Tensor:
    """Return the error of the aligned states, as a share of the variance of theirs."""
    is_aligned = aligned >= 0
    index = aligned.clamp(min=0)[..., None].expand(-1, -1, theirs.shape[-1])
    return unexplained(ours[is_aligned], theirs.gather(1, index)[is_aligned])


def attention_error(
    layers: Sequence[nn.Module], queries: Sequence[Tensor], ours: Tensor, theirs: Tensor, rng: np.random.Generator
) -> Tensor:
    """Return the mean error of the cross-attention layers' outputs for a few of each layer's queries.

    A layer's squared error is divided by its variance over the captions plus the layers' mean variance: some layers
    give nearly the same for every caption, and their own variance would make their errors count for all.
    """
    errors, variances = [], []
    for layer, inputs in zip(layers, queries, strict=True):
        chosen = torch.from_numpy(rng.integers(len(inputs), size=_QUERIES_PER_STEP))
        repeated = inputs[chosen].expand(len(ours), -1, -1)
        with torch.no_grad():
            right = layer(repeated, encoder_hidden_states=theirs)
        errors.append((layer(repeated, encoder_hidden_states=ours) - right).pow(2).mean())
        variances.append((right - right.mean(0)).pow(2).mean())
    variance = torch.stack(variances)
    return (torch.stack(errors) / (variance + variance.mean())).mean()


def common_words(theirs: CLIPTokenizer, ours: BertTokenizer) -> tuple[Tensor, Tensor]:
    """Return the ids of the words of letters that are one token to both, in each vocabulary, int64 [words]."""
    known, own = theirs.get_vocab(), ours.get_vocab()
    words = sorted(word for word in own if word.isalpha() and len(word) > 2 and f"{word}</w>" in known)
    pairs = [(known[f"{word}</w>"], own[word]) for word in words]
    their_ids, our_ids = torch.tensor(pairs).T
    return their_ids, our_ids


def _prepare(
    model: Path, folder: Path, texts: Sequence[str], fresh_texts: Sequence[str]
) -> tuple[TextEncoders, PairedCaptions, PairedCaptions]:
    """Make the vocabulary in `folder` and both text encoders, and encode the captions for both."""
    tokenizer = make_wordpiece([text.replace(UNNAMED, "") for text in texts], folder / "tokenizer")
    clip_tokenizer = load_tokenizer(model / "tokenizer")
    teacher = load_pretrained(CLIPTextModel, str(model / "text_encoder")).float().requires_grad_(False)
    student = bert_from_clip(teacher, clip_tokenizer, tokenizer)
    share_positions(student.model, clip_tokenizer.model_max_length)
    encoders = TextEncoders(teacher, student, common_words(clip_tokenizer, tokenizer))
    for each in (clip_tokenizer, tokenizer):
        each.add_tokens([UNNAMED])
    captions, fresh = (pair_captions(each, clip_tokenizer, tokenizer) for each in (texts, fresh_texts))
    return encoders, captions, fresh


def train_bert(model: Path, folder: Path, work: Path, *, budget: Budget, device: torch.device, seed: int) -> None:
    """Train a text encoder for the U-Net of the Stable Diffusion folder `model`; write it and its tokenizer.

    Captions are drawn anew, so the training needs no pool. The checkpoint in `work` is named after the U-Net's digest:
    another U-Net starts another training. The error of the U-Net's predictions is printed at the end.
    """
    torch.manual_seed(seed)
    randomness = Randomness(seed=seed, device=device)
    encoders, captions, fresh = _prepare(
        model, folder, sample_texts(_CAPTIONS, seed), sample_texts(_FRESH_CAPTIONS, seed + 1)
    )
    encoders.to(device)
    fresh = fresh.to(device)
    unet = load_pretrained(UNet2DConditionModel, str(model / "unet")).float().to(device).requires_grad_(False)
    layers = cross_attentions(unet)
    fresh_mixtures = encoders.mix(len(fresh), randomness.torch)
    _, states = encoders.states(fresh, fresh_mixtures)
    drawings = draw(unet, DDIMScheduler.from_pretrained(model / "scheduler"), states, randomness.torch, _DRAWING_STEPS)
    digest = unet_digest(model)

    def loss(fraction_done: float) -> tuple[Tensor, dict[str, float]]:
        rows = randomness.numpy.integers(len(captions), size=_CAPTIONS_PER_BATCH)
        batch = captions[torch.from_numpy(rows)].to(device)
        ours, theirs = encoders.states(batch, encoders.mix(len(batch), randomness.torch))
        of_states = state_error(ours, theirs, batch.aligned)
        of_attention = attention_error(layers, drawings.queries, ours, theirs, randomness.numpy)
        return of_states + of_attention, {"states": of_states.item(), "attention": of_attention.item()}

    def save(step: int) -> None:
        save_bert(encoders.student, folder / "bert", digest)

    def share(step: int) -> None:
        share_positions(encoders.student.model, captions.teacher_ids.shape[1])

    parameters = list(encoders.student.model.parameters())
    optimise(
        Training(
            name="bert",
            loss=loss,
            optimizer=torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
            budget=budget,
            checkpoint=work / f"bert-{digest[:8]}.ckpt",
            stateful={"bert": encoders.student, "randomness": randomness},
            after_step=share,
            on_save=save,
            save_every_s=240,
            log_every_steps=20,
            warmup_steps=40,
        )
    )
    encoders.student.load_state_dict(load_bert(folder / "bert").state_dict())  # rounded, as it is written
    with torch.no_grad():
        error = prediction_error(unet, drawings, *encoders.states(fresh, fresh_mixtures))
    print(f"bert predictions differ by {error:.5f} of what another prompt's differ", flush=True)
