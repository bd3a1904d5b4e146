"""Benchmarks whose figures the docs quote still run; what they measure here is not looked at."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("what", "ratios"), [("demo", 2), ("processes", 1)])
def test_the_step_beside_others_runs_and_prints_its_ratios(what, ratios):
    command = [sys.executable, "benchmarks/step.py", what, "--rounds", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(re.findall(r"\d\.\d+ \(\d+\.\d+ to \d+\.\d+", ended.stdout)) == ratios
