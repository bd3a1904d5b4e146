"""What several test files share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core: more threads would only wait for each other
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Ends what a failed test has started and not ended."""
    yield
    if "tinyruns" in sys.modules:
        sys.modules["tinyruns"].end_all()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny shards and a tokenizer: `data` (200 images), `held-out` (70), `tokenizer` (16 codes)."""
    from tinyruns import make_world  # not for tests that need no torch

    return make_world(tmp_path_factory.mktemp("world"))
