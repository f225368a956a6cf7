"""Locate and hash the frozen models of a run, without torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.inputs.content_hash import folder_hash
from pipeline.store.addresses import read_beginning
from pipeline.store.local_copies import local_copy
from pipeline.store.redact import redact
from textual_inversion import families, model_files
from textual_inversion.config import InversionConfig
from textual_inversion.encoder_header import check_encoder

if TYPE_CHECKING:
    from textual_inversion.prompts import Vocabularies

ROOT = Path(__file__).resolve().parents[2]

MAX_ENCODER_BYTES = 4 * 2**30
"""Largest size of an encoder's file, bytes."""

_HEADER_BYTES, _MAX_HEADER_BYTES = 2**16, 100_000_000
"""Bytes in which nearly every header of an encoder's file ends, and the largest that the safetensors library reads."""

CAPTIONS_FILE = "captions.txt"
"""Name of the file in a model's directory with captions of what the model was taught, one a line."""


def locate(model: str) -> str:
    """Return the path of a model's directory or file on this machine, or its hub id.

    A relative path may lie in the current directory or in the repository, which may be elsewhere on another machine. A
    file at another address (`s3://bucket/name.safetensors`) is copied to this machine's disk once. Raises ValueError if
    it cannot be fetched.
    """
    if "://" in model:
        try:
            return str(local_copy(model))
        except OSError as error:
            raise ValueError(redact(f"model {model} cannot be fetched: {type(error).__name__}: {error}")) from error
    for path in (Path(model), ROOT / model):
        if path.is_dir() or path.is_file():
            return str(path.resolve())
    return model


def portable(model: str) -> str:
    """Return a name of the model that `locate` understands on every machine: an absolute path, unless the repository
    has it."""
    return model if not Path(model).exists() or (ROOT / model).exists() else str(Path(model).resolve())


def demo_note(config: RunConfig) -> str:
    """Return a remark if the model is the demo's and the manifest is none of this repository's; otherwise empty.

    The demo's feature extractor cannot tell other photos from those of its world (docs/EXPERIMENTS.md), so the remark
    goes by the manifest's place.
    """
    own = (ROOT / "manifests", ROOT / "demo")
    is_own = "://" not in config.manifest and any(Path(config.manifest).is_relative_to(folder) for folder in own)
    if is_own or locate(config.model) != locate(RunConfig().model):
        return ""
    return (
        "the model is the demo's, which draws 64 px pictures of a small world of emoji art: photos of anything else "
        "come out as the nearest thing there, and their scores do not show it, so they pass no gate unless one is set; "
        "name another model with --model"
    )


def demo_budget_note(config: RunConfig) -> str:
    """Return a remark if the demo's model is to learn with the default's samples; otherwise empty."""
    asked, default = config.inversion, InversionConfig()
    is_default = (asked.steps, asked.batch_size) == (default.steps, default.batch_size)
    if not is_default or locate(config.model) != locate(RunConfig().model):
        return ""
    return (
        f"{asked.steps} steps of {asked.batch_size} samples are for models of photographs; with the demo's, --config "
        "demo takes a tenth of them and comes as near to the photos"
    )


def model_hash(model: str) -> str:
    """Return a digest of all files that decide what the model computes."""
    return model_files.model_hash(locate(model))


def extractor_hash(model: str) -> str:
    """Return a digest of a feature extractor's files, or the name itself if it is a hub id or empty."""
    directory = locate(model)
    return folder_hash(directory) if model and Path(directory).is_dir() else model


def check_extractors(config: RunConfig) -> None:
    """Raise ValueError if a setting of an extractor names a directory without a model of transformers' layout, or what
    is neither a directory nor a hub id: no actor, and no evaluation after a night, could load it."""
    extractors = {
        "extractor": config.extractor,
        "inversion.init.extractor": config.inversion.init.extractor,
        "evaluation.dino": config.evaluation.dino,
    }
    for setting, model in extractors.items():
        if model:
            try:
                _check_extractor(locate(model))
            except (OSError, ValueError) as error:
                raise ValueError(f"{setting} = {model!r} is no feature extractor: {error}") from error


def check_init_encoder(config: RunConfig) -> None:
    """Raise ValueError if the run starts from an encoder that cannot be read, or is of another model or extractor."""
    init = config.inversion.init
    if init.method != "encoder":
        return
    try:
        check_encoder(_read_header(init.encoder), model_hash(config.model), extractor_hash(config.encoder_extractor))
    except (OSError, ValueError) as error:
        raise ValueError(f"inversion.init.encoder = {redact(init.encoder)!r}: {redact(str(error))}") from error


def _read_header(uri: str) -> bytes:
    """Read an encoder's file up to the end of its header, or further."""
    data = read_beginning(uri, _HEADER_BYTES, MAX_ENCODER_BYTES)
    end = 8 + int.from_bytes(data[:8], "little")
    return data if len(data) >= end or end > _MAX_HEADER_BYTES else read_beginning(uri, end, MAX_ENCODER_BYTES)


def _check_extractor(model: str) -> None:
    directory = Path(model)
    if not directory.is_dir():
        model_files.check_hub_id(model)
        return
    if not (directory / "config.json").is_file():
        raise ValueError("no config.json there; give a directory or hub id with config.json and .safetensors weights")
    if "model_type" not in json.loads((directory / "config.json").read_bytes()):
        raise ValueError("its config.json names no model_type")
    if not any(directory.glob("*.safetensors")):
        raise ValueError("no .safetensors weights there")


def with_captions(config: RunConfig) -> RunConfig:
    """Return the configuration with the captions of knowledge preservation named: where the setting is empty, the file
    in the model's directory if there is one. Otherwise the setting stays empty, for the package's general captions."""
    penalties = config.inversion.penalties
    path = Path(locate(config.model)) / CAPTIONS_FILE
    if not penalties.knowledge or penalties.captions or not path.is_file():
        return config
    penalties = replace(penalties, captions=str(path))
    return replace(config, inversion=replace(config.inversion, penalties=penalties))


def load_model_vocabularies(config: RunConfig) -> Vocabularies:
    """Check the model and the extractors (see `check_model`) and read the vocabularies. Raises ValueError if they
    cannot be read."""
    vocabularies = families.load_vocabularies(locate(config.model))
    check_extractors(config)
    unknown = sorted(set(config.inversion.text_encoders) - vocabularies.keys())
    if unknown:
        known = ", ".join(vocabularies)
        raise ValueError(f"inversion.text_encoders names {unknown[0]!r}, but this model's text encoders are {known}")
    return vocabularies


def check_model(config: RunConfig) -> None:
    """Check the model's configurations and the headers of its weights, without torch. Raises ValueError for a model
    or a feature extractor (`check_extractors`) that no actor could load, and if `inversion.text_encoders` names a text
    encoder that it does not have."""
    if config.inversion.text_encoders:
        load_model_vocabularies(config)
    else:
        families.check_model(locate(config.model))
        check_extractors(config)
