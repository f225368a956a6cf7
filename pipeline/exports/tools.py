"""The tools that concepts are exported for: files, folders and the words that call a concept there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from textual_inversion.adapter_dialects import (
    PEFT_WEIGHTS,
    check_lora,
    check_plain,
    dump_diffusers_lora,
    dump_kohya,
    layers_by_encoder,
    peft_files,
)
from textual_inversion.adapter_formats import ENCODERS
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.dialects import ONETRAINER, WEBUI, Layout, check_embedding, diffusers_files, dump_embedding
from textual_inversion.formats import check_written

Kind = Literal["web", "onetrainer", "diffusers", "peft", "merged"]

EMBEDDINGS = "embeddings"
LORAS = "loras"
LORA_SUFFIX = "-lora"
_LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name that `load_lora_weights` looks for in a folder."""


class Refused(Exception):
    """A concept cannot be exported for a tool: the reason, with a remedy."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool, or several that read the same files."""

    title: str
    kind: Kind
    word: str
    """Text that calls a concept in a prompt, with `{name}` for the file's name and `{token}` for the placeholder."""
    lora_word: str = ""
    """Text that adds the concept's LoRA in a prompt; empty where it is loaded otherwise."""
    use: str = ""
    """Instruction for the model card."""


TOOLS: dict[str, Tool] = {
    "webui": Tool(
        "AUTOMATIC1111, Forge, SD.Next",
        "web",
        "{name}",
        f"<lora:{{name}}{LORA_SUFFIX}:1>",
        f"Copy `webui/{EMBEDDINGS}` into the tool's `embeddings` folder and `webui/{LORAS}` into `models/Lora`.",
    ),
    "comfyui": Tool(
        "ComfyUI",
        "web",
        "embedding:{name}",
        "",
        f"Copy `comfyui/{EMBEDDINGS}` into `models/embeddings` and `comfyui/{LORAS}` into `models/loras`; load LoRAs "
        "by a LoraLoader node with a clip strength of 1.",
    ),
    "invoke": Tool(
        "InvokeAI",
        "web",
        "<{name}>",
        "",
        f"Import the files of `invoke/{EMBEDDINGS}`, and of `invoke/{LORAS}` with weight 1, in the model manager.",
    ),
    "kohya": Tool(
        "kohya-ss/sd-scripts",
        "web",
        "{name}",
        "",
        "Name the files to `gen_img.py` as `--textual_inversion_embeddings` and `--network_weights` "
        "(`--network_module networks.lora`), or to a training as `--weights`.",
    ),
    "onetrainer": Tool(
        "OneTrainer",
        "onetrainer",
        "",
        "",
        "Name a file as an embedding's base embedding to go on training it; its word is the one that you set there.",
    ),
    "diffusers": Tool(
        "diffusers",
        "diffusers",
        "{token}",
        "",
        "`pipeline.load_textual_inversion(folder)`, and `pipeline.load_lora_weights(folder)` where the folder has "
        f"`{_LORA_FILE}`. A model with several text encoders needs a call for each: see diffusers' documentation.",
    ),
    "peft": Tool(
        "PEFT",
        "peft",
        "{token}",
        "",
        "`PeftModel.from_pretrained(pipeline.text_encoder, folder)`, after `pipeline.load_textual_inversion(folder)`.",
    ),
    "merged": Tool(
        "a merged text encoder",
        "merged",
        "{token}",
        "",
        "Put the folder's `text_encoder` in the place of the model's own, and load `learned_embeds.safetensors`.",
    ),
}
"""Value of `--for` -> tool."""


def word_in(tool: Tool, name: str, embedding: LearnedEmbedding) -> str:
    """Return the text that calls the concept in a tool's prompts, with the class noun that it was learned with."""
    word = tool.word.format(name=name, token=embedding.placeholder_token)
    noun = f" {embedding.class_noun}" if word and embedding.class_noun else ""
    lora = f" {tool.lora_word.format(name=name)}" if embedding.adapter and tool.lora_word else ""
    return word + noun + lora


def files_for(tool: Tool, name: str, embedding: LearnedEmbedding, preview: bytes) -> dict[str, bytes]:
    """Return a concept's files for a tool, each read back and compared: path in the tool's folder -> content.

    Tools that take nothing but adapters have no files of a concept without one. The weights of a merged text encoder
    are not among the files: see `merging`. `preview` is a PNG; empty for none. Raises Refused if the tool cannot have
    the concept as it was learned.
    """
    if tool.kind in ("peft", "merged") and not embedding.adapter:
        return {}
    make = {"web": _web_files, "onetrainer": _onetrainer_files, "peft": _peft_files}.get(tool.kind, _diffusers_files)
    try:
        if embedding.adapter:
            check_plain(embedding)
        files = make(name, embedding)
    except ValueError as error:
        raise Refused(str(error)) from error
    if preview:
        files[f"{f'{EMBEDDINGS}/' if tool.kind in ('web', 'onetrainer') else f'{name}/'}{name}.preview.png"] = preview
    return files


def _web_files(name: str, embedding: LearnedEmbedding) -> dict[str, bytes]:
    files = _rows(name, embedding, WEBUI)
    if embedding.adapter:
        lora = dump_kohya(embedding)
        check_lora(lora, embedding)
        files[f"{LORAS}/{name}{LORA_SUFFIX}.safetensors"] = lora
    return files


def _onetrainer_files(name: str, embedding: LearnedEmbedding) -> dict[str, bytes]:
    if embedding.adapter:
        raise ValueError(
            "it was learned with an adapter, without which its rows draw something else, and OneTrainer goes on "
            "training rows alone; learn the concept without an adapter"
        )
    return _rows(name, embedding, ONETRAINER)


def _rows(name: str, embedding: LearnedEmbedding, layout: Layout) -> dict[str, bytes]:
    data = dump_embedding(embedding, layout)
    check_embedding(data, embedding)
    return {f"{EMBEDDINGS}/{name}.safetensors": data}


def _diffusers_rows(name: str, embedding: LearnedEmbedding) -> dict[str, bytes]:
    files = {}
    for key, (file, data) in diffusers_files(embedding).items():
        check_written(data, replace(embedding, vectors={key: embedding.vectors[key]}))
        files[f"{name}/{file}"] = data
    return files


def _diffusers_files(name: str, embedding: LearnedEmbedding) -> dict[str, bytes]:
    files = _diffusers_rows(name, embedding)
    if embedding.adapter:
        lora = dump_diffusers_lora(embedding)
        check_lora(lora, embedding)
        files[f"{name}/{_LORA_FILE}"] = lora
    return files


def _peft_files(name: str, embedding: LearnedEmbedding) -> dict[str, bytes]:
    files = peft_files(embedding)
    for key in layers_by_encoder(embedding):
        folder = f"{ENCODERS[key]}/" if len(embedding.vectors) > 1 else ""
        check_lora(files[folder + PEFT_WEIGHTS], embedding, key)
    return {**{f"{name}/{file}": data for file, data in files.items()}, **_diffusers_rows(name, embedding)}
