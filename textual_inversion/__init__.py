"""Textual Inversion of a frozen text-to-image model: learn words from photos, draw with them.

The names below come from the package's modules, each imported when the name is first used, so that importing the
package imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textual_inversion.api import draw, learn, load
    from textual_inversion.concept import Concept, LearnedEmbedding
    from textual_inversion.config import InversionConfig, SamplingConfig

__all__ = ["Concept", "InversionConfig", "LearnedEmbedding", "SamplingConfig", "draw", "learn", "load"]

_MODULES = {
    "Concept": "concept",
    "InversionConfig": "config",
    "LearnedEmbedding": "concept",
    "SamplingConfig": "config",
    "draw": "api",
    "learn": "api",
    "load": "api",
}
"""Name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a name of `__all__`. Raises AttributeError for any other."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
