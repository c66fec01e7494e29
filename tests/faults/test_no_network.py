"""A search, its report and a deployment open no connection and listen nowhere, seen from the system's calls."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.exploration import tiny

onnxruntime = pytest.importorskip("onnxruntime")
STRACE = shutil.which("strace")


def traced(folder: Path, *words: str) -> list[str]:
    """Run the command line under strace; return its calls about sockets that leave the process's own machine."""
    trace = folder / "trace"
    watched = ("-f", "-qq", "-e", "trace=socket,connect,bind,listen,accept,accept4,sendto", "-o", str(trace))
    answer = subprocess.run(
        [str(STRACE), *watched, *tiny.command(*words)], cwd=folder, env=tiny.environment(), capture_output=True,
        text=True, check=False, timeout=280,
    )  # fmt: skip
    if "Operation not permitted" in answer.stderr and not trace.read_text():
        pytest.skip("this machine lets nobody trace processes")
    assert answer.returncode in (0, 3), answer.stderr
    calls = [line for line in trace.read_text().splitlines() if re.search(r"^\d+ +\w+\(", line)]
    # Sockets of one machine's processes, and the kernel's own answers, are no network.
    return [line for line in calls if not re.search(r"AF_(UNIX|LOCAL|NETLINK)", line)]


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="needs strace")
def test_nothing_is_sent_and_nobody_is_listened_to(tmp_path: Path) -> None:
    tiny.write_task(tmp_path)
    search = ("search", "--task", "tiny_task:make", "--engine", "onnxruntime", "--n-trials", "1", "--timeout", "60s")
    plain = ("--set", "first_candidates=false", "--set", "recovery.enabled=false")
    assert traced(tmp_path, *search, *plain, "--out", "run") == []
    assert (tmp_path / "run" / "report.html").exists()
    assert traced(tmp_path, "deploy", "run", "--to", "deployed", "--force") == []
