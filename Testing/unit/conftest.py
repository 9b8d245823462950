"""Fixtures of all unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the repository; ``pytest -rs`` shows the tests that skip without it."""
    if not (SHARED_DATA / "README.md").is_file():
        pytest.skip(f"no real data: {SHARED_DATA} does not exist, so what was measured on it is not checked")
    return SHARED_DATA
