"""The demo's BERT text encoder: its vocabulary, its start from a CLIP text encoder, its training, and its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
from torch import nn
from transformers import BertTokenizer, CLIPTextModel, CLIPTokenizer

from demo import bert_training
from demo.bert_model import assemble, bert_from_clip, load_bert
from demo.bert_tokenizer import load_wordpiece, make_wordpiece, pair_captions
from demo.bert_training import (
    TextEncoders,
    attention_error,
    common_words,
    cross_attentions,
    draw,
    padded_states,
    prediction_error,
    sample_texts,
    share_positions,
    state_error,
    train_bert,
    unexplained,
)
from demo.loop import Budget
from demo.objects import HELD_OUT
from demo.unnamed import UNNAMED
from tests.tiny_models import MAX_LENGTH, tiny_stable_diffusion
from textual_inversion.families import load_backbone
from textual_inversion.families.base import stack_prompts
from textual_inversion.prompts import encode_prompt

CAPTIONS = ["a photo of a cat", "a 3d red toy", "a photo of a dog on the beach", f"a photo of a {UNNAMED}"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_stable_diffusion(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def clip_tokenizer(model: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(model / "tokenizer")


@pytest.fixture
def teacher(model: Path) -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(model / "text_encoder").requires_grad_(False)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    return make_wordpiece(CAPTIONS[:3], tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture(scope="module")
def unet(model: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(model / "unet").requires_grad_(False)


def with_unnamed(tokenizer: CLIPTokenizer | BertTokenizer, folder: Path) -> CLIPTokenizer | BertTokenizer:
    tokenizer.save_pretrained(folder)
    copy = type(tokenizer).from_pretrained(folder)
    copy.add_tokens([UNNAMED])
    return copy


def test_every_word_of_the_captions_is_one_token(wordpiece: BertTokenizer) -> None:
    for word in ("photo", "cat", "3d", "beach"):
        assert wordpiece.tokenize(word) == [word]
    assert wordpiece.tokenize("Cat, tea!") == ["cat", ",", "t", "##e", "##a", "!"]


def test_words_are_aligned_with_the_last_token_of_the_same_word(
    clip_tokenizer: CLIPTokenizer, wordpiece: BertTokenizer
) -> None:
    pairs = pair_captions(["a 3d red toy", "a photo " * 12], clip_tokenizer, wordpiece)
    assert len(pairs) == 1  # the second does not fit
    assert pairs.student_ids.shape == (1, 77)
    assert clip_tokenizer.convert_ids_to_tokens(pairs.teacher_ids[0, 1:7].tolist()) == [
        "a</w>", "3</w>", "d</w>", "red</w>", "toy</w>", "<|endoftext|>",
    ]  # fmt: skip
    assert pairs.aligned[0, :7].tolist() == [0, 1, 3, 4, 5, 6, 7]  # [CLS] a 3d red toy [SEP] [PAD]
    assert pairs.aligned[0, MAX_LENGTH - 2 : MAX_LENGTH + 1].tolist() == [MAX_LENGTH - 1, -1, -1]


def test_student_starts_as_the_teacher_without_its_mask(
    teacher: CLIPTextModel, clip_tokenizer: CLIPTokenizer, wordpiece: BertTokenizer
) -> None:
    config = teacher.config
    config.num_hidden_layers = 1
    one_layer = CLIPTextModel(config)
    for parameter in one_layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    student = bert_from_clip(one_layer, clip_tokenizer, wordpiece)
    text = "a photo of a cat"
    ours = student(torch.tensor([wordpiece(text).input_ids]), return_dict=True).last_hidden_state
    theirs = one_layer(torch.tensor([clip_tokenizer(text).input_ids])).last_hidden_state
    torch.testing.assert_close(ours[:, -1], theirs[:, -1], rtol=0, atol=1e-3)  # the last position sees all others
    assert (ours - theirs).abs().amax((0, 2)).min() < 1e-3 < (ours - theirs).abs().max()


def test_equal_paddings_are_computed_once(
    teacher: CLIPTextModel, clip_tokenizer: CLIPTokenizer, wordpiece: BertTokenizer
) -> None:
    student = bert_from_clip(teacher, clip_tokenizer, wordpiece).double()
    nn.init.normal_(student.model.embed_positions.weight)
    share_positions(student.model, MAX_LENGTH)
    ids = pair_captions(CAPTIONS[:3], clip_tokenizer, wordpiece).student_ids
    whole = student(ids, return_dict=True).last_hidden_state
    short = padded_states(student.model, student.model.embed_tokens(ids[:, : MAX_LENGTH + 1]))
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-10)


def test_both_encoders_read_the_same_mixture_of_their_own_words(
    teacher: CLIPTextModel, clip_tokenizer: CLIPTokenizer, wordpiece: BertTokenizer, tmp_path: Path
) -> None:
    student = bert_from_clip(teacher, clip_tokenizer, wordpiece)
    words = common_words(clip_tokenizer, wordpiece)
    assert {"cat", "photo", "beach"} <= set(wordpiece.convert_ids_to_tokens(words[1].tolist()))
    encoders = TextEncoders(teacher, student, words)
    pairs = pair_captions(
        CAPTIONS, with_unnamed(clip_tokenizer, tmp_path / "clip"), with_unnamed(wordpiece, tmp_path / "bert")
    )
    mixtures = encoders.mix(len(pairs), torch.Generator().manual_seed(0))
    ours, theirs = encoders.states(pairs, mixtures)
    assert ours.shape == (4, 77, theirs.shape[2])
    torch.testing.assert_close(encoders.our_table.rows, encoders.their_table.rows)  # as long as the tables are equal
    again, _ = encoders.states(pairs, encoders.mix(len(pairs), torch.Generator().manual_seed(1)))
    is_other = (again != ours).flatten(1).any(1)
    assert is_other.tolist() == [False, False, False, True]


def test_errors_are_shares_of_the_variance(unet: UNet2DConditionModel) -> None:
    theirs = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(0))
    assert unexplained(theirs, theirs) == 0
    assert unexplained(theirs.mean(0).expand_as(theirs), theirs) == pytest.approx(1)
    aligned = torch.tensor([0, 1, 4, -1]).expand(6, -1)
    ours = torch.cat([theirs[:, [0, 1, 4]], torch.full((6, 1, 32), 9.0)], dim=1)
    assert state_error(ours, theirs, aligned) == 0
    layers = cross_attentions(unet)
    queries = [torch.randn(7, layer.to_q.in_features) for layer in layers]
    rng = np.random.default_rng(0)
    assert attention_error(layers, queries, theirs.flip(1), theirs, rng) < 1e-9  # order does not matter
    assert attention_error(layers, queries, theirs.roll(1, 0), theirs, rng) > 0.5


def test_drawings_hold_every_step_and_the_error_is_one_for_another_prompt(
    unet: UNet2DConditionModel, model: Path
) -> None:
    states = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler.from_pretrained(model / "scheduler")
    drawings = draw(unet, scheduler, states, torch.Generator().manual_seed(0), steps=2)
    assert drawings.latents.shape == (6, 4, 8, 8)
    assert drawings.timesteps.tolist() == [*[scheduler.timesteps[0]] * 3, *[scheduler.timesteps[1]] * 3]
    widths = [layer.to_q.in_features for layer in cross_attentions(unet)]
    assert [each.shape for each in drawings.queries] == [(48, width) for width in widths]
    assert prediction_error(unet, drawings, states.flip(1), states) < 1e-6
    assert prediction_error(unet, drawings, states.roll(1, 0), states) == pytest.approx(1)
    assert not any(layer._forward_pre_hooks for layer in cross_attentions(unet))


def test_texts_are_of_taught_objects_and_some_hold_the_unnamed_word() -> None:
    texts = sample_texts(300, 0)
    assert texts == sample_texts(300, 0)
    assert 0.2 < sum(UNNAMED in text for text in texts) / 300 < 0.35
    held = {each.object.name for each in HELD_OUT}
    assert not [text for text in texts if held & {*text.split()}]


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of text encoders after 1 and 30 steps, by one training that was continued."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bert_training, "sample_texts", lambda *_: CAPTIONS)
        for steps in (1, 30):
            train_bert(model, work / "bert", work, budget=Budget(steps=steps), device=CPU, seed=0)
            shutil.copytree(work / "bert", work / f"{steps}")
    return {steps: work / f"{steps}" for steps in (1, 30)}


def test_training_brings_the_students_states_nearer(
    trained: dict[int, Path], teacher: CLIPTextModel, clip_tokenizer: CLIPTokenizer
) -> None:
    pairs = pair_captions(CAPTIONS[:3], clip_tokenizer, load_wordpiece(trained[1] / "tokenizer"))
    theirs = teacher(pairs.teacher_ids).last_hidden_state
    errors = []
    for folder in trained.values():
        with torch.no_grad():
            ours = load_bert(folder / "bert")(pairs.student_ids, return_dict=True).last_hidden_state
        errors.append(state_error(ours, theirs, pairs.aligned))
    assert errors[1] < 0.7 * errors[0]


def test_folder_is_a_pipeline_with_the_same_unet(model: Path, trained: dict[int, Path], tmp_path: Path) -> None:
    assemble(model, trained[30], tmp_path)
    pipeline = LDMTextToImagePipeline.from_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), device="cpu", precision="float32")
    ids = stack_prompts([encode_prompt("a photo of a cat", {}, backbone.vocabularies)])
    expected = pipeline.tokenizer(["a photo of a cat"], padding="max_length", max_length=77, return_tensors="pt")
    assert torch.equal(ids["bert"], expected.input_ids)
    with torch.no_grad():
        states = load_bert(trained[30] / "bert")(expected.input_ids, return_dict=True).last_hidden_state
        theirs = pipeline.bert(expected.input_ids)[0]
    assert torch.equal(backbone.encode_prompts(ids, {}).hidden, theirs)
    torch.testing.assert_close(theirs, states, rtol=0, atol=0.02)  # fp16
    for source, name in (("unet", "unet"), ("vae", "vqvae")):
        (weights,) = (model / source).glob("*.safetensors")
        assert (tmp_path / name / weights.name).read_bytes() == weights.read_bytes()


def test_a_text_encoder_of_another_unet_is_refused(trained: dict[int, Path], tmp_path: Path) -> None:
    other = tiny_stable_diffusion(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="another U-Net"):
        assemble(other, trained[30], tmp_path / "out")
    assert not (tmp_path / "out").exists()
