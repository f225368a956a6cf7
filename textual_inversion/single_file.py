"""Find out what a checkpoint in one file is: all weights of a model under the names of the original code, without
configurations. Headers alone are read, without torch.

The configurations and the vocabulary come from the directory in the diffusers layout in which the file lies, as in
repositories of the hub; else from `architectures/`, which holds those of Stable Diffusion 1, 2 and XL. Of a vocabulary
it has the merges alone, from which vocab.json follows.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from textual_inversion.weight_files import StoredTensor, read_header, read_metadata

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Endings of names of files with weights."""
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
"""Component, by its name in the diffusers layout -> prefixes of its weights' names."""

_ARCHITECTURES = Path(__file__).parent / "architectures"
_UNET = PREFIXES["unet"][0]
_FIRST_LAYER = f"{_UNET}input_blocks.0.0.weight"
_STATES = re.compile(rf"{re.escape(_UNET)}.*\.attn2\.to_k\.weight")
_CHANNELS = {5: "a depth model", 8: "an image-editing (pix2pix) model", 9: "an inpainting model"}
_KINDS = {
    "lora_": "a LoRA",
    "emb_params": "a learned embedding",
    "conditioner.embedders.0.model.": "an SDXL refiner",
    "edm_": "a model of an EDM schedule (CosXL, Playground v2.5)",
    "down_blocks.": "the U-Net of a diffusers directory alone",
    "control_model.": "a ControlNet",
}
"""Prefix of names -> what a file with such names is."""
_DIRECTORIES_ONLY = {
    "joint_blocks.": ("Stable Diffusion 3", "StableDiffusion3Pipeline"),
    "double_blocks.": ("FLUX.1", "FluxPipeline"),
}
"""Prefix of names, behind `model.diffusion_model.` or without it -> the model that it belongs to, which is loaded from
directories alone, and diffusers' pipeline that converts the file."""
_BERT = "cond_stage_model.transformer.attn_layers."
_V_IN_YAML = re.compile(r"^\s*parameterization:\s*[\"']?v[\"']?\s*$", re.MULTILINE)


def configurations(path: Path) -> Path:
    """Return the directory with the configurations and the vocabulary that go with a checkpoint in one file.

    Raises ValueError, with a remedy, if there is no such file, if it is pickled or damaged, or if nothing is known that
    goes with it.
    """
    if not path.is_file():
        raise ValueError(f"model {str(path)!r}: there is no such file")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"model {str(path)!r} is pickled, which can run code when read; convert it once, where you trust it, with "
            "`StableDiffusionPipeline.from_single_file(...).save_pretrained(directory)`, or take a .safetensors file"
        )
    tensors = read_header(path)
    _check_layout(path, tensors)
    if (path.parent / "model_index.json").is_file():
        return path.parent
    return _ARCHITECTURES / _architecture(path, tensors)


def derived_files(directory: Path) -> set[str]:
    """Return the names of the vocab.json that a folder of `architectures/` leaves out; none for other directories."""
    if not directory.is_relative_to(_ARCHITECTURES):
        return set()
    return {f"{merges.parent.name}/vocab.json" for merges in directory.glob("*/merges.txt")}


@contextmanager
def complete_tokenizer(directory: Path, component: str) -> Iterator[Path]:
    """Give a directory whose tokenizer has all files that libraries read: the same, or a copy of the tokenizer's folder
    that lasts as long as the context."""
    if f"{component}/vocab.json" not in derived_files(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as copy:
        folder = Path(shutil.copytree(directory / component, Path(copy) / component))
        (folder / "vocab.json").write_bytes(derive_vocabulary(directory / component / "merges.txt"))
        yield Path(copy)


@cache
def derive_vocabulary(path: Path) -> bytes:
    """Return the content of CLIP's vocab.json, given its merges.txt; to the byte, as models' hashes depend on it."""
    _version, *merges = path.read_text(encoding="utf-8").strip().split("\n")
    vocabulary = clip_vocabulary(merge.replace(" ", "") for merge in merges)
    return (json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def clip_vocabulary(joined: Iterable[str]) -> dict[str, int]:
    """Return the ids of a byte-pair vocabulary of CLIP's form, given what its merges join, in their order.

    They count, in this order, the letters that stand for the 256 bytes, those at the end of a word, what the merges
    join, and the start and the end of a text; a token that comes again has its first id.
    """
    from tokenizers.pre_tokenizers import ByteLevel  # here, because most commands read no vocabulary

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def component_tensors(path: Path, component: str) -> dict[str, StoredTensor]:
    """Return the header's entries of one component's weights. Raises ValueError if the file is damaged."""
    return {name: entry for name, entry in read_header(path).items() if belongs(name, component)}


def belongs(name: str, component: str) -> bool:
    """Return whether a weight is one of a component's, by its name."""
    return name.startswith(PREFIXES.get(component, ()))


def _check_layout(path: Path, names: Iterable[str]) -> None:
    """Raise ValueError, with the conversion, if a checkpoint is of a family that is loaded from directories alone."""
    names = tuple(names)
    for prefix, (model, pipeline) in _DIRECTORIES_ONLY.items():
        if any(name.removeprefix(_UNET).startswith(prefix) for name in names):
            raise ValueError(
                f"model {str(path)!r}: it is a {model} checkpoint, which is read from a directory in the diffusers "
                f"layout alone; convert it once with `diffusers.{pipeline}.from_single_file({path.name!r})"
                ".save_pretrained(directory)` (diffusers downloads what the file lacks) and give that directory"
            )
    if any(name.startswith(_BERT) for name in names):
        raise ValueError(
            f"model {str(path)!r}: it is latent diffusion with a BERT text encoder, which is read from a directory in "
            "the diffusers layout alone; convert it once, with the original code's YAML file, by diffusers' "
            "pipelines.stable_diffusion.convert_from_ckpt.download_from_original_stable_diffusion_ckpt and "
            "`.save_pretrained(directory)`, and give that directory"
        )


def _architecture(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Return the folder of `architectures/` that goes with these weights."""
    for prefix, kind in _KINDS.items():
        if any(name.startswith(prefix) for name in tensors):
            raise _refusal(path, f"it is {kind}, not a whole text-to-image model")
    if _FIRST_LAYER not in tensors:
        raise _refusal(path, "it has no U-Net under the names of Stable Diffusion 1, 2 or XL")
    channels = tensors[_FIRST_LAYER].shape[1]
    if channels != 4:
        raise _refusal(
            path, f"its U-Net takes {channels} channels: {_CHANNELS.get(channels, 'no plain text-to-image model')}"
        )
    width = next((entry.shape[1] for name, entry in tensors.items() if _STATES.fullmatch(name)), 0)
    prediction = _prediction(path, tensors)
    if width == 768 and prediction != "v":
        return "sd1"
    if width == 1024 and prediction:
        return {"epsilon": "sd2", "v": "sd2-v"}[prediction]
    if width == 1024:
        raise _refusal(
            path, "Stable Diffusion 2 was published with epsilon and with v-prediction, which have the same weights' "
            f"names, and neither the file's notes (modelspec.prediction_type) nor {path.stem}.yaml say which it is"
        )  # fmt: skip
    if width == 2048:
        is_zero_snr = "ztsnr" in tensors
        return "sdxl" if prediction != "v" else "sdxl-v-zsnr" if is_zero_snr else "sdxl-v"
    raise _refusal(path, f"its U-Net reads text states of width {width}, which none of the known models has")


def _prediction(path: Path, tensors: Iterable[str]) -> str:
    """Return what a file says that its U-Net predicts, `epsilon` or `v`; empty if it does not say."""
    notes = read_metadata(path)
    stated = notes.get("modelspec.prediction_type", "").lower()
    if "v_pred" in tensors or stated.startswith("v") or notes.get("modelspec.architecture", "").endswith("-v"):
        return "v"
    original = path.with_suffix(".yaml")
    if original.is_file():  # the original code's configuration, which web interfaces keep beside the file
        return "v" if _V_IN_YAML.search(original.read_text(errors="replace")) else "epsilon"
    return "epsilon" if stated == "epsilon" else ""


def _refusal(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"model {str(path)!r}: {problem}; put it into the model's directory in the diffusers layout (its "
        "model_index.json, configurations and tokenizer are enough), or give a directory"
    )
