"""Measure how the bias of a word changes when the word is learned anew: the captions that CLIP assigns to the word's
pictures before and after (Gal et al. 2022, section 4.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipeline.config import RunConfig
from pipeline.inputs.models import locate
from textual_inversion.bias import Proportion, difference, nearest_caption_proportions
from textual_inversion.extractors import ClipExtractor


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasReport:
    """Proportions of pictures that are nearest to each caption, in the order of the captions."""

    captions: tuple[str, ...]
    photos: tuple[Proportion, ...]
    """Proportions of the photos the word was learned from, as a check on CLIP; empty if the photos are not known."""
    before: tuple[Proportion, ...]
    """Proportions of the pictures of the vocabulary's word."""
    after: tuple[Proportion, ...]
    """Proportions of the pictures of the learned word."""

    def rows(self) -> list[dict[str, Any]]:
        """Return plain values, one row a caption, with 95 % intervals."""
        rows: list[dict[str, Any]] = []
        for i, caption in enumerate(self.captions):
            change, low, high = difference(self.before[i], self.after[i])
            row: dict[str, Any] = {"caption": caption}
            if self.photos:
                row["photos"] = {"count": self.photos[i].count, "n": self.photos[i].n}
            for name, share in (("before", self.before[i]), ("after", self.after[i])):
                interval = [round(end, 4) for end in share.interval]
                row[name] = {"count": share.count, "n": share.n, "share": round(share.value, 4), "interval": interval}
            row["change"] = {"value": round(change, 4), "interval": [round(low, 4), round(high, 4)]}
            rows.append(row)
        return rows

    def lines(self) -> list[str]:
        """Return one line of text a caption, for people."""
        lines = []
        for i, caption in enumerate(self.captions):
            before, after = (
                f"{share.count}/{share.n} ({share.interval[0]:.0%} to {share.interval[1]:.0%})"
                for share in (self.before[i], self.after[i])
            )
            change, low, high = difference(self.before[i], self.after[i])
            lines.append(f"{caption}: {before} -> {after}, change {change:+.0%} ({low:+.0%} to {high:+.0%})")
        return lines

    def labels(self, prompts: Sequence[str]) -> list[str]:
        """Return labels for the contact sheet's two rows: each prompt with its most frequent captions."""
        return [
            f"{prompt}: {self._most_frequent(row)}"
            for prompt, row in zip(prompts, (self.before, self.after), strict=True)
        ]

    def _most_frequent(self, row: Sequence[Proportion]) -> str:
        ranked = sorted(zip(self.captions, row, strict=True), key=lambda pair: -pair[1].count)
        return ", ".join(f"{share.count} of {share.n} {caption!r}" for caption, share in ranked[:3] if share.count)


def load_extractor(config: RunConfig, captions: Sequence[str]) -> ClipExtractor:
    """Load the configured CLIP. Raises ValueError for fewer than two different captions, and if no CLIP that knows this
    model's pictures is configured."""
    if len(set(captions)) < max(2, len(captions)):
        raise ValueError(f"--caption {list(captions)}: give two or more different captions to choose from")
    default = RunConfig()
    is_demo_model = locate(config.model) == locate(default.model)
    if not config.extractor or (config.extractor == default.extractor and not is_demo_model):
        raise ValueError(
            f"model {config.model!r} needs a feature extractor to compare pictures with captions: name a CLIP, for "
            "example --set extractor=openai/clip-vit-base-patch32"
        )
    return ClipExtractor(locate(config.extractor), config.device)


def measure_bias(
    extractor: ClipExtractor,
    captions: Sequence[str],
    photos: Sequence[Image.Image],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
) -> BiasReport:
    """Assign each photo and each picture to its nearest caption, and count them."""
    texts = extractor.texts(captions)
    proportions = {
        name: tuple(nearest_caption_proportions(extractor.images(pictures), texts)) if pictures else ()
        for name, pictures in (("photos", photos), ("before", before), ("after", after))
    }
    return BiasReport(captions=tuple(captions), **proportions)
