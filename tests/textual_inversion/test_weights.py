"""A model whose weights do not all come from its files is refused by name, wherever one is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from tests.tiny_models import tiny_extractor
from textual_inversion.extractors import load_extractor
from textual_inversion.families import load_backbone
from textual_inversion.families.parts import read_component
from textual_inversion.model_files import find_model_files

Weights = dict[str, Tensor]
CLASSES = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}


def change(folder: Path, edit: Callable[[Weights], None]) -> None:
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    edit(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, metadata={"format": "pt"})


def first(weights: Weights) -> str:
    # a U-Net's conv_in is looked at before the rest, in the header alone
    return min(name for name, tensor in weights.items() if tensor.ndim > 1 and not name.startswith("conv_in."))


def rename_all(weights: Weights) -> None:
    for name in list(weights):
        weights[f"transformer.{name}"] = weights.pop(name)


def rename_one(weights: Weights) -> None:
    name = first(weights)
    weights[f"{name}.old"] = weights.pop(name)


def drop_one(weights: Weights) -> None:
    del weights[first(weights)]


def reshape_one(weights: Weights) -> None:
    weights[first(weights)] = torch.ones(3, 2)


def break_one(weights: Weights) -> None:
    weights[first(weights)][-1] = float("nan")


def add_one(weights: Weights) -> None:
    weights["odd.weight"] = torch.ones(3)


CHANGES: list[tuple[Callable[[Weights], None], str]] = [
    (rename_all, r"missing; 'transformer\.[^;]* more unknown;"),
    (rename_one, r"' missing; '[^']*\.old' unknown;"),
    (drop_one, r"' missing;"),
    (reshape_one, r"{name}"),
    (add_one, r": 'odd\.weight' unknown;"),
    (break_one, r"values that are NaN or infinite: '{name}';"),
]


@pytest.mark.parametrize(
    ("shape", "message"), [(None, "have no 'conv_in.weight'"), ((3, 2), "'conv_in.weight' in 'unet' has shape")]
)
def test_a_u_net_whose_first_layer_is_anothers_is_refused(
    tiny_model: Path, tmp_path: Path, shape: tuple[int, int] | None, message: str
) -> None:
    def edit(weights: Weights) -> None:
        del weights["conv_in.weight"]
        if shape:
            weights["conv_in.weight"] = torch.zeros(shape)

    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change(model / "unet", edit)
    with pytest.raises(ValueError, match=message):
        load_backbone(str(model), device="cpu", precision="float32")


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize(("edit", "message"), CHANGES)
def test_a_backbone_with_other_weights_is_refused(
    tiny_model: Path, tmp_path: Path, component: str, edit: Callable[[Weights], None], message: str
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (path,) = (model / component).glob("*.safetensors")
    name = first(load_file(path)).removeprefix("text_model.").replace(".", r"\.")
    change(model / component, edit)
    options = {"ignore_mismatched_sizes": True} if component == "text_encoder" else {}
    with pytest.raises(ValueError, match=rf"the weights in '.*{component}'.*" + message.replace("{name}", name)):
        read_component(find_model_files(str(model)), component, CLASSES[component], **options)


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2"])
@pytest.mark.parametrize(("edit", "message"), CHANGES)
def test_a_feature_extractor_with_other_weights_is_refused(
    tmp_path: Path, kind: str, edit: Callable[[Weights], None], message: str
) -> None:
    model = tiny_extractor(kind, tmp_path / kind)
    name = first(load_file(model / "model.safetensors")).replace(".", r"\.")
    change(model, edit)
    with pytest.raises(ValueError, match=rf"the weights in '.*{kind}'.*" + message.replace("{name}", name)):
        load_extractor(str(model), "cpu")


def test_the_names_told_are_few(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change(model / "unet", rename_all)
    with pytest.raises(ValueError, match="more unknown; without them the model would be partly random") as caught:
        read_component(find_model_files(str(model)), "unet", UNet2DConditionModel)
    assert len(str(caught.value)) < 1000 + len(str(model))


def add_what_a_whole_clip_has(weights: Weights) -> None:
    weights["text_projection.weight"] = torch.ones(4, 4)
    weights["logit_scale"] = torch.ones(())
    weights["vision_model.post_layernorm.weight"] = torch.ones(4)
    weights["text_model.embeddings.position_ids"] = torch.arange(24)[None]


def add_position_ids_and_heads(weights: Weights) -> None:
    weights["embeddings.position_ids"] = torch.arange(17)[None]
    weights["classifier.weight"] = torch.ones(4, 16)
    weights["pooler.dense.bias"] = torch.ones(16)


def name_attention_as_long_ago(weights: Weights) -> None:
    """As checkpoints of 2022 have it; diffusers knows."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in list(weights):
        for new, former in old.items():
            if f".attentions.0.{new}." in name:
                weights[name.replace(new, former)] = weights.pop(name)
                break


def test_known_exceptions_are_loaded(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change(model / "text_encoder", add_what_a_whole_clip_has)
    change(model / "vae", name_attention_as_long_ago)
    ours, plain = (load_backbone(str(each), device="cpu", precision="float32") for each in (model, tiny_model))
    latents = torch.ones(1, *plain.latent_shape)
    assert torch.equal(ours.decode(latents), plain.decode(latents))
    for kind in ("vit", "dinov2"):
        extractor = tiny_extractor(kind, tmp_path / kind)
        change(extractor, add_position_ids_and_heads)
        load_extractor(str(extractor), "cpu")
