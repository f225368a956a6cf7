"""Which files of a diffusers directory or hub repository make up a model, and the digest of their content.

No torch, so that planning can compute a model's hash before anything is loaded. Weights are safetensors or nothing:
pickled weights (`.bin`, `.ckpt`) can run code when they are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_SETTINGS = re.compile(r"[^/]+\.(json|txt|model)")
_PLAIN = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
_HALF = re.compile(r"(diffusion_pytorch_)?model(\.fp16(-\d+-of-\d+)?|-\d+-of-\d+\.fp16)\.safetensors")
_PICKLED = re.compile(r"[^/]+\.(bin|ckpt|pt|pth|msgpack)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """A model on disk: everything that enters its computation, and nothing that does not."""

    directory: Path
    pipeline_class: str
    """The diffusers pipeline that `model_index.json` names: decides the family."""
    variants: Mapping[str, str | None]
    """Component with weights -> the file variant to load: None for plain names, `fp16` where only those exist."""
    names: tuple[str, ...]
    """Files read, relative to `directory`, sorted: weights, configurations, tokenizer."""


def find(model: str) -> ModelFiles:
    """The files of a diffusers directory, or of a hub id (`owner/name`, `owner/name@revision`): cached copy first,
    then download. Raises ValueError if it is neither, is no diffusers model, or has no safetensors weights."""
    directory = Path(model).expanduser()
    if not directory.is_dir():
        directory = _fetch(model)
    index_path = directory / "model_index.json"
    if not index_path.is_file():
        raise ValueError(
            f"model {model!r}: no model_index.json in {directory}; give a directory in the diffusers layout, as "
            "`StableDiffusionPipeline.save_pretrained` writes it"
        )
    index = json.loads(index_path.read_text())
    present = {p.relative_to(directory).as_posix() for p in directory.glob("*/*") if p.is_file()}
    names, variants = _select(index, present, model)
    return ModelFiles(
        directory=directory, pipeline_class=str(index.get("_class_name")), variants=variants, names=tuple(names)
    )


def model_hash(model: str) -> str:
    """BLAKE2b digest, 32 hex digits, of the names and full content of every file `find` lists: the weights, and the
    configurations and tokenizer that decide what the weights compute. Where the model lies does not matter.

    A file is read once per process and path, size and modification time (about a second for each GB).
    """
    files = find(model)
    digest = hashlib.blake2b(digest_size=16)
    for name in files.names:
        path = files.directory / name
        stat = path.stat()
        digest.update(f"{name}\x1f{_file_digest(path, stat.st_size, stat.st_mtime_ns)}\x1e".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _file_digest(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Content digest of one file; size and time are here to key the cache."""
    del size_bytes, modified_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _select(index: Mapping[str, object], present: Iterable[str], model: str) -> tuple[list[str], dict[str, str | None]]:
    """Of the files present (`component/name`), those that `model_index.json` calls for; and each one's variant."""
    present = set(present)
    chosen: set[str] = set()
    variants: dict[str, str | None] = {}
    for component, entry in index.items():
        is_component = isinstance(entry, list) and len(entry) == 2 and all(entry)
        if not is_component or component in _UNUSED:
            continue
        here = {name.partition("/")[2] for name in present if name.startswith(f"{component}/")}
        if not here:
            raise ValueError(f"model {model!r}: model_index.json names {component!r}, but it has no such folder")
        settings = {name for name in here if _SETTINGS.fullmatch(name)}
        plain = {name for name in here if _PLAIN.fullmatch(name)}
        half = {name for name in here if _HALF.fullmatch(name)}
        pickled = sorted(name for name in here if _PICKLED.fullmatch(name))
        if pickled and not plain and not half:
            raise ValueError(
                f"model {model!r}: folder {component!r} holds only pickled weights ({', '.join(pickled)}), which can "
                "run code when read; convert them once with `save_pretrained(..., safe_serialization=True)` or "
                "choose a checkpoint with .safetensors files"
            )
        if plain or half:
            variants[component] = None if plain else "fp16"
        chosen |= {f"{component}/{name}" for name in settings | (plain or half)}
    return sorted(chosen), variants


def _fetch(model: str) -> Path:
    """A hub repository's snapshot directory with just the files needed."""
    if not _REPOSITORY.fullmatch(model):
        raise ValueError(f"model {model!r} is neither a directory here nor a hub id of the form owner/name")
    # imported late: a directory needs no hub client
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = model.partition("@")
    at = revision or None
    try:
        cached = Path(snapshot_download(name, revision=at, local_files_only=True))
        find(str(cached))  # an interrupted download leaves an incomplete snapshot
        return cached
    except (LocalEntryNotFoundError, ValueError):
        pass  # not here, or not whole: ask the hub
    try:
        index = json.loads(Path(hf_hub_download(name, "model_index.json", revision=at)).read_text())
        names, _ = _select(index, HfApi().list_repo_files(name, revision=at), model)
        return Path(snapshot_download(name, revision=at, allow_patterns=["model_index.json", *names]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"model {model!r} is no directory here and cannot be had from the hub ({error}); check the id and the "
            "network, or download it beforehand and give its directory"
        ) from error
