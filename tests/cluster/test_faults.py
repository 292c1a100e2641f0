"""The tables of faults, of ten million ids and of scaling, at their smallest: they run, and nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]


def program(name: str, *args: str) -> dict[str, Any]:
    """Run a benchmark in a process of its own; its JSON line."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *args], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_lost():
    figures = program("faults", "--small")["figures"]
    assert len(figures) >= 9
    for fault, counts in figures.items():
        wrong = {
            key: counts.get(key, 0) for key in ("lost", "doubled", "crashes", "hangs", "differ", "failed", "unseen")
        }
        assert not any(wrong.values()), (fault, counts)


def test_a_driver_keeps_no_ids():
    said = program("scale.ten_million_ids", "--ids", "40000")
    whole = said["figures"]["whole"]
    assert (whole["lost"], whole["doubled"], whole["rows"]) == (0, 0, 40000)
    assert whole["scored"] == 4


def test_scaling():
    said = program("scale.scaling", "--small", "--images", "24")
    assert set(said["figures"]) == {"training epoch", "batch inference"}
