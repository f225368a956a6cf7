from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import tiny_extractor


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random CLIP."""
    return tiny_extractor("clip", tmp_path_factory.mktemp("judge"))
