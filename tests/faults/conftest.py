"""The seed of everything that the fault suite chooses: the same seed makes the same choices again."""

import os
import time

import pytest

os.environ.setdefault("FAULTS_SEED", str(time.time_ns()))  # xdist's workers inherit it


def pytest_report_header() -> str:
    return f"FAULTS_SEED={os.environ['FAULTS_SEED']} makes the same choices again"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.timeout(900))  # DeepSpeed compiles its communication on the first start
