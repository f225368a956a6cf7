"""Find the files of a diffusers directory or hub repository that make up a model, and compute their digest.

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
"""Components that no computation here reads."""
_SETTINGS = re.compile(r"[^/]+\.(json|txt|model)")
_PLAIN = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
_HALF = re.compile(r"(diffusion_pytorch_)?model(\.fp16(-\d+-of-\d+)?|-\d+-of-\d+\.fp16)\.safetensors")
_PICKLED = re.compile(r"[^/]+\.(bin|ckpt|pt|pth|msgpack)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """Files of a model on disk: all that enter its computation, and no others."""

    directory: Path
    """Directory in the diffusers layout."""
    pipeline_class: str
    """Class name of the diffusers pipeline in `model_index.json`, which decides the family."""
    variants: Mapping[str, str | None]
    """Component with weights -> variant of the weight files to load: None for plain names, `fp16` if there are no plain
    ones."""
    names: tuple[str, ...]
    """Names of the files read, relative to `directory`, sorted: weights, configurations, tokenizer."""


def find_model_files(model: str) -> ModelFiles:
    """Find the files of a model, given a diffusers directory or a hub id (`owner/name`, `owner/name@revision`).

    A hub id is looked up in the local cache first and downloaded if it is not whole there. Raises ValueError if `model`
    is neither, is no diffusers model, or has no safetensors weights.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        directory = _download(model)
    index_path = directory / "model_index.json"
    if not index_path.is_file():
        raise ValueError(
            f"model {model!r}: no model_index.json in {directory}; give a directory in the diffusers layout, as "
            "`StableDiffusionPipeline.save_pretrained` writes it"
        )
    index = json.loads(index_path.read_text())
    present = {p.relative_to(directory).as_posix() for p in directory.glob("*/*") if p.is_file()}
    names, variants = _select_files(index, present, model)
    return ModelFiles(
        directory=directory, pipeline_class=str(index.get("_class_name")), variants=variants, names=tuple(names)
    )


def model_hash(model: str) -> str:
    """Return the BLAKE2b digest, 32 hex digits, of the names and full content of a model's files.

    The files are those that `find_model_files` lists: the weights, and the configurations and tokenizer that decide
    what the weights compute. The model's directory does not enter the digest. A file is read once per process and
    path, size and modification time (about a second for each GB).
    """
    files = find_model_files(model)
    digest = hashlib.blake2b(digest_size=16)
    for name in files.names:
        path = files.directory / name
        stat = path.stat()
        digest.update(f"{name}\x1f{_file_digest(path, stat.st_size, stat.st_mtime_ns)}\x1e".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _file_digest(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Return the digest of a file's content. Size and time are part of the cache's key, and serve no other purpose."""
    del size_bytes, modified_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _select_files(
    index: Mapping[str, object], present: Iterable[str], model: str
) -> tuple[list[str], dict[str, str | None]]:
    """Select the files that `model_index.json` calls for among those present (`component/name`).

    Returns their names, sorted, and the variant of each component with weights (see `ModelFiles.variants`). Raises
    ValueError if a component has no folder or only pickled weights.
    """
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


def _download(model: str) -> Path:
    """Return the snapshot directory of a hub repository, from the cache or downloaded, with only the files needed."""
    if not _REPOSITORY.fullmatch(model):
        raise ValueError(f"model {model!r} is neither a directory here nor a hub id of the form owner/name")
    # imported late: a directory needs no hub client
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = model.partition("@")
    at = revision or None
    try:
        cached = Path(snapshot_download(name, revision=at, local_files_only=True))
        find_model_files(str(cached))  # an interrupted download leaves an incomplete snapshot
        return cached
    except (LocalEntryNotFoundError, ValueError):
        pass  # not in the cache, or not whole there: ask the hub
    try:
        index = json.loads(Path(hf_hub_download(name, "model_index.json", revision=at)).read_text())
        names, _ = _select_files(index, HfApi().list_repo_files(name, revision=at), model)
        return Path(snapshot_download(name, revision=at, allow_patterns=["model_index.json", *names]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"model {model!r} is no directory here and cannot be downloaded from the hub ({error}); check the id and "
            "the network, or download it beforehand and give its directory"
        ) from error
