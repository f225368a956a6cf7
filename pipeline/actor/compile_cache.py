"""Keep what torch.compile made, so that an actor that starts later loads it and compiles nothing.

What is kept is code: kernels, and pickles that torch loads. Whoever may write to the folder may run code in every actor
that reads it, so it must be as safe from others as the image is (docs/THREATS.md), and no folder is used unless a
setting names it. Torch itself checks that an entry was made by the same version for the same device and code; the names
here only spare an actor files that it cannot use.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pipeline.store.errors import describe_error, is_client_error
from pipeline.store.storage import RunStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Counts:
    """Graphs that torch.compile has compiled in this process, and those that it found instead."""

    compiled: int
    found: int

    @classmethod
    def now(cls) -> _Counts:
        from torch._dynamo.utils import counters  # takes seconds

        inductor = counters["inductor"]
        compiled = inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"]
        return cls(compiled=compiled, found=inductor["fxgraph_cache_hit"])

    def since(self, before: _Counts) -> _Counts:
        return _Counts(self.compiled - before.compiled, self.found - before.found)


def file_name(device: torch.device, *facts: object) -> str:
    """Return the name of the file for what is compiled on this device; `facts`: all else that it depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    folder = re.sub(r"[^A-Za-z0-9.]+", "-", f"torch-{torch.__version__}-{name}")
    return f"{folder}/{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.torchcache"


@contextmanager
def kept_compilations(address: str, name: str) -> Iterator[None]:
    """Load what an earlier process compiled, and store what the block compiles anew.

    `address`: folder or URI; empty keeps nothing. `name`: path of the file in it (`file_name`). A file that is damaged,
    cannot be read or cannot be stored is logged and costs time alone. Nothing is stored if the block raises.
    """
    is_known = hasattr(torch.compiler, "load_cache_artifacts")
    if address and not is_known:
        log.warning("actors.compile_cache needs torch 2.7 or later, so nothing is kept; this is %s", torch.__version__)
    if not (address and is_known):
        yield
        return
    store = RunStore(address)
    was_there = _load(store, name)
    before, began = _Counts.now(), time.monotonic()
    yield
    counts = _Counts.now().since(before)
    seconds = time.monotonic() - began
    log.info("%d graphs compiled and %d found in %.0f s", counts.compiled, counts.found, seconds)
    if counts.compiled or not was_there:
        _save(store, name, replaces=was_there)


def _load(store: RunStore, name: str) -> bool:
    """Give torch what is in a file; return whether there is one, which may be damaged."""
    try:
        data = store.get(name)
    except FileNotFoundError:
        return False
    except Exception as error:
        if not (isinstance(error, OSError) or is_client_error(error)):
            raise
        log.warning("%s cannot be read, so all is compiled anew: %s", store.uri(name), describe_error(error))
        return False
    try:
        info = torch.compiler.load_cache_artifacts(data)
    except Exception as error:  # whatever a damaged file brings about; without it, the same is compiled
        log.warning("%s is damaged, so all is compiled anew: %s", store.uri(name), describe_error(error))
        return True
    if info is None:  # torch has logged why
        log.warning("%s is damaged, so all is compiled anew", store.uri(name))
    return True


def _save(store: RunStore, name: str, *, replaces: bool) -> None:
    """Store what torch has compiled and loaded in this process; a file that another process has stored meanwhile stays,
    unless `replaces`."""
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:  # nothing was compiled
        return
    try:
        if replaces or not store.exists(name):
            store.put(name, saved[0])
    except Exception as error:
        if not (isinstance(error, OSError) or is_client_error(error)):
            raise
        log.warning("%s was not stored: %s", store.uri(name), describe_error(error))
