"""What several test files share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny shards and a tokenizer: `data` (200 images), `held-out` (70), `tokenizer` (16 codes)."""
    from tinyruns import make_world  # not for tests that need no torch

    return make_world(tmp_path_factory.mktemp("world"))
