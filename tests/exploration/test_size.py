"""A search for the smallest file: what is offered is within `--max-size`, on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.exploration import tiny


def test_a_search_within_a_size(tmp_path: Path) -> None:
    folder = tiny.write_task(tmp_path)
    words = ("search", "--task", "tiny_task:wide", "--max-size", "0.7x", "--n-trials", "2", "--timeout", "90s")
    answer = tiny.run(*words, *tiny.QUICK, "--out", "run", "--json", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    summary = json.loads(answer.stdout)
    baseline, best, limit = summary["baseline"], summary["best"], summary["constraints"]["size_bytes"]
    assert limit == pytest.approx(0.7 * baseline["size_bytes"]) and best["feasible"]
    files = [folder / "run" / "best" / name for name in ("model.xml", "model.bin")]
    assert best["size_bytes"] == sum(file.stat().st_size for file in files) <= limit
