"""Starts from a trained encoder: how many concepts had one, and how many steps that saved."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.ledger.records import ConceptRecord
from textual_inversion.encoder_header import BY_ENCODER, ENCODER_UNSURE


@dataclass(slots=True)
class EncoderStarts:
    """Counts over concepts that were learned, taken in record by record."""

    num_used: int = 0
    """Concepts whose first try started from the encoder's rows."""
    num_unsure: int = 0
    """Concepts that started from words because the encoder was unsure."""
    steps: int = 0
    """Steps of the former, those of all tries."""

    def add(self, record: ConceptRecord) -> None:
        """Add a record."""
        tries = record.tries or (record,)
        if tries[0].start == BY_ENCODER:
            self.num_used += 1
            self.steps += sum(each.steps for each in tries)
        self.num_unsure += tries[0].start.startswith(ENCODER_UNSURE)

    def steps_saved(self, steps_from_words: int) -> int:
        """Return the steps that these concepts would have taken from words, less those they took; negative if they took
        more."""
        return self.num_used * steps_from_words - self.steps
