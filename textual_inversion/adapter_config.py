"""The kind, rank and layers of an adapter, which a concept's learning and an encoder's training both set. Standard
library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textual_inversion.config_checks import require, require_choice

AdapterKind = Literal["none", "lora", "causal"]

ADAPTER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""Names of the linear layers in a block of a text encoder, as transformers' CLIP spells them."""

T5_TARGETS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
"""Names of the same in a block of T5, as transformers spells them."""

CROSS_ATTENTION = "cross_attention"
"""Name of the text states given to a cross-attention layer of the denoiser, among the targets of an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterShape:
    """Positions and layers that an adapter changes, and the rank of the change."""

    kind: AdapterKind = "none"
    """Positions that the adapter changes. `none`: there is no adapter. `lora`: every position (v1). `causal`: those
    from the concept's first token on, padding excepted (v2), so that the positions before it, and prompts without the
    concept, are unchanged."""

    rank: int = 4
    """Rank of the change of each layer."""

    alpha: float = 4.0
    """Numerator of the change's scale, which is alpha / rank."""

    targets: tuple[str, ...] = ADAPTER_TARGETS
    """Linear layers of every block of the text encoder that are changed, and `cross_attention` for the text states that
    each cross-attention layer of the denoiser is given (TextBoost++). That one needs kind 'causal' and a denoiser with
    such layers. A T5 is changed only where layers of it are named: `q`, `k`, `v`, `o`, `wi_0`, `wi_1`, `wo`."""

    def __post_init__(self) -> None:
        require_choice("adapter.kind", self.kind, AdapterKind)
        require(self.rank >= 1, "adapter.rank", self.rank, "1 or more; for no adapter set adapter.kind to 'none'")
        require(self.alpha > 0, "adapter.alpha", self.alpha, "positive")
        known = (*ADAPTER_TARGETS, *T5_TARGETS, CROSS_ATTENTION)
        is_known = bool(self.targets) and set(self.targets) <= set(known)
        require(is_known, "adapter.targets", self.targets, f"some of {', '.join(known)}")
        clashes = self.kind == "lora" and CROSS_ATTENTION in self.targets
        require(not clashes, "adapter.kind", self.kind, f"'causal' with {CROSS_ATTENTION!r} among adapter.targets")
