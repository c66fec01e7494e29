"""The short form of ``benchmarks/faults/fuzz.py``: every reader, half a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_no_reader_raises_hangs_ends_or_writes_outside(tmp_path: Path) -> None:
    words = ["--seconds", "25", "--seed", "1", "--out", str(tmp_path / "fuzz.json")]
    answer = subprocess.run(
        [sys.executable, "benchmarks/faults/fuzz.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads((tmp_path / "fuzz.json").read_text())
    assert found["failures"] == 0 and all(one["cases"] for one in found["results"])
