"""What a command refuses before it joins a cluster."""

from __future__ import annotations

import pytest

from pipeline.config import RunConfig
from pipeline.connection import connect


def test_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="memory://"):
        connect(RunConfig(output="memory://out"))
