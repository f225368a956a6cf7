"""How a word's meaning shifts when it is learned anew: a judge's answers to its pictures before and after."""

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
class Shift:
    """Shares of pictures that the judge finds nearest to each caption."""

    captions: tuple[str, ...]
    photos: tuple[Proportion, ...]
    """Of the set the word was learned from: what the judge makes of the right answers. Empty if it is not known."""
    before: tuple[Proportion, ...]
    after: tuple[Proportion, ...]

    def facts(self) -> list[dict[str, Any]]:
        """Plain values, one row a caption; intervals are of 95 %."""
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
        """The same for people."""
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
        """For the rows of the sheet: the prompt and its commonest answers."""
        return [
            f"{prompt}: {self._commonest(row)}" for prompt, row in zip(prompts, (self.before, self.after), strict=True)
        ]

    def _commonest(self, row: Sequence[Proportion]) -> str:
        ranked = sorted(zip(self.captions, row, strict=True), key=lambda pair: -pair[1].count)
        return ", ".join(f"{share.count} of {share.n} {caption!r}" for caption, share in ranked[:3] if share.count)


def judge_of(config: RunConfig, captions: Sequence[str]) -> ClipExtractor:
    """The configured CLIP. Raises ValueError if there is none that knows this model's pictures, or nothing to ask."""
    if len(set(captions)) < max(2, len(captions)):
        raise ValueError(f"--caption {list(captions)}: give the judge two or more different answers to choose from")
    default = RunConfig()
    is_demos = config.extractor == default.extractor and locate(config.model) != locate(default.model)
    if not config.extractor or is_demos:
        raise ValueError(
            f"model {config.model!r} needs a judge: name a CLIP, for example "
            "--set extractor=openai/clip-vit-base-patch32"
        )
    return ClipExtractor(locate(config.extractor), config.device)


def measure(
    judge: ClipExtractor,
    captions: Sequence[str],
    photos: Sequence[Image.Image],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
) -> Shift:
    """Let the judge choose a caption for every picture."""
    texts = judge.texts(captions)
    answers = {
        name: tuple(nearest_caption_proportions(judge.images(pictures), texts)) if pictures else ()
        for name, pictures in (("photos", photos), ("before", before), ("after", after))
    }
    return Shift(captions=tuple(captions), **answers)
