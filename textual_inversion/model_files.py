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
from typing import Any

from textual_inversion.errors import first_line
from textual_inversion.single_file import SUFFIXES, component_tensors, configurations, derive_vocabulary, derived_files
from textual_inversion.weight_files import StoredTensor, is_lfs_pointer, read_header, read_index

_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that no computation here reads."""
_NOTES = ("_diffusers_version", "_name_or_path", "requires_safety_checker")
"""Entries of `model_index.json` that decide nothing that a model computes."""
_SETTINGS = re.compile(r"[^/]+\.(json|txt|model)")
_PLAIN = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
_HALF = re.compile(r"(diffusion_pytorch_)?model(\.fp16(-\d+-of-\d+)?|-\d+-of-\d+\.fp16)\.safetensors")
_INDEX = re.compile(r"\.safetensors\.index[^/]*\.json$")
_PICKLED = re.compile(r"[^/]+\.(bin|ckpt|pt|pth|msgpack)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_OWN_FOLDER = "demo"
"""Folder of this project's repository with the demo's models, which are no models of an account `demo` on the hub."""


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
    checkpoint: Path | None = None
    """Single file with all weights under the names of the original code; None if each component has its own files."""
    index: Mapping[str, Any]
    """Content of `model_index.json`: the class of the pipeline, that of each component, and the pipeline's settings."""

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        """Read the headers of a component's weight files: name of each tensor -> its entry; empty if it has none.

        Raises ValueError if one of them is missing, was cut short or is no safetensors file.
        """
        if self.checkpoint:
            return component_tensors(self.checkpoint, component)
        own = [name for name in self.names if name.startswith(f"{component}/")]
        tensors: dict[str, StoredTensor] = {}
        parts = []
        for name in own:
            if name.endswith(".safetensors"):
                tensors |= read_header(self.directory / name)
                parts += re.findall(r"-\d+-of-\d+", name)
        if parts:
            is_half = self.variants[component] == "fp16"
            indices = [name for name in own if _INDEX.search(name) and ("fp16" in name) == is_half]
            if not indices:
                raise ValueError(f"folder {component!r} has weights in several files, but no index of them")
            _check_index(self.directory / indices[0], tensors)
        return tensors

    def digest(self) -> str:
        """Return the BLAKE2b digest, 32 hex digits, of the names and full content of the files, and of the index.

        Of the index, components that no computation reads and notes of the library that wrote it do not count. Nor does
        the model's directory. A file is read once per process and path, size and modification time (about a second for
        each GB).
        """
        digest = hashlib.blake2b(digest_size=16)
        index = {key: value for key, value in self.index.items() if key not in (*_UNUSED, *_NOTES)}
        digest.update(f"model_index.json\x1f{json.dumps(index, sort_keys=True)}\x1e".encode())
        files = {name: self.directory / name for name in self.names}
        if self.checkpoint:
            files["single file"] = self.checkpoint
        derived = derived_files(self.directory)
        for name, path in files.items():
            if name in derived:
                content = derive_vocabulary(path.with_name("merges.txt"))
                file_digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            else:
                stat = path.stat()
                file_digest = _file_digest(path, stat.st_size, stat.st_mtime_ns)
            digest.update(f"{name}\x1f{file_digest}\x1e".encode())
        return digest.hexdigest()


def find_model_files(model: str) -> ModelFiles:
    """Find the files of a model, given a diffusers directory, a checkpoint in one file, or a hub id (`owner/name`,
    `owner/name@revision`).

    A hub id is looked up in the local cache first and downloaded if it is not whole there. Raises ValueError if `model`
    is neither, is no diffusers model, or has no safetensors weights.
    """
    path = Path(model).expanduser()
    checkpoint = path if path.suffix in SUFFIXES and not path.is_dir() else None
    directory = configurations(path) if checkpoint else path
    if not directory.is_dir():
        directory = _download(model)
    index_path = directory / "model_index.json"
    if not index_path.is_file():
        raise ValueError(
            f"model {model!r}: no model_index.json in {directory}; give a directory in the diffusers layout, as "
            "`StableDiffusionPipeline.save_pretrained` writes it"
        )
    index = _read_index(index_path, model)
    present = {p.relative_to(directory).as_posix() for p in directory.glob("*/*") if p.is_file()}
    if checkpoint:
        present = {name for name in present if _SETTINGS.fullmatch(name.rpartition("/")[2])} | derived_files(directory)
    names, variants = _select_files(index, present, model)
    return ModelFiles(
        directory=directory,
        pipeline_class=index["_class_name"],
        variants=variants,
        names=tuple(names),
        checkpoint=checkpoint,
        index=index,
    )


def _read_index(path: Path, model: str) -> dict[str, Any]:
    """Read a `model_index.json`. Raises ValueError if it is none, or if it names code that comes with the model."""
    try:
        index = json.loads(path.read_text())
        if not isinstance(index, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        why = "it is a pointer of Git LFS: run `git lfs pull`" if is_lfs_pointer(path) else error
        raise ValueError(f"model {model!r}: model_index.json cannot be read: {why}") from error
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"model {model!r}: model_index.json has the pipeline class {index.get('_class_name')!r}; code that comes "
            "with a model is never run, so the name of one of diffusers' own classes is needed"
        )
    return index


def model_hash(model: str) -> str:
    """Return the digest of a model's files; see `ModelFiles.digest`. Raises ValueError as `find_model_files` does."""
    return find_model_files(model).digest()


@lru_cache(maxsize=4096)
def _file_digest(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Return the digest of a file's content. Size and time are part of the cache's key, and serve no other purpose."""
    del size_bytes, modified_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _check_index(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError unless the files beside an index of weights in several files have what the index names."""
    for tensor, file in read_index(path).items():
        if tensor not in tensors or tensors[tensor].file.name != file:
            raise ValueError(f"{path.name} places {tensor!r} in {file}, which is missing or lacks it")


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


def check_hub_id(model: str) -> None:
    """Raise ValueError unless a name that is no directory here can be meant as a hub id, `owner/name[@revision]`.

    A path is never looked up on the hub, where somebody else may hold an account of its first folder's name.
    """
    if not _REPOSITORY.fullmatch(model):
        raise ValueError(f"model {model!r} is neither a directory here nor a hub id of the form owner/name")
    owner, _, name = model.partition("/")
    if owner == _OWN_FOLDER:
        raise ValueError(
            f"model {model!r} is one of the demo's, which are in the project's repository and in no installed package; "
            "name a model (--model), or run in a checkout"
        )
    if Path(owner).is_dir():
        raise ValueError(
            f"model {model!r}: the folder {owner!r} is here, but has no {name!r}; if the hub's model of that name is "
            "meant, run elsewhere, or download it and give its directory"
        )


def _download(model: str) -> Path:
    """Return the snapshot directory of a hub repository, from the cache or downloaded, with only the files needed."""
    check_hub_id(model)
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
        index = _read_index(Path(hf_hub_download(name, "model_index.json", revision=at)), model)
        names, _ = _select_files(index, HfApi().list_repo_files(name, revision=at), model)
        return Path(snapshot_download(name, revision=at, allow_patterns=["model_index.json", *names]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"model {model!r} is no directory here and cannot be downloaded from the hub ({first_line(error)}); "
            "check the id and the network, or download it beforehand and give its directory"
        ) from error
