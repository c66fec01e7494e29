"""Search with tasks of which one method goes wrong, stage by stage, and write down how each search ends.

    python benchmarks/faults/user_tasks.py --out benchmarks/faults/results/user_tasks.csv

Every row is one search by the command line, in a process of its own: 3 trials, 60 s at most.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
FIELDS = ("method", "fault", "stage", "exit_code", "seconds", "summary", "best", "report", "traceback", "message")
LOADING, READING, BASELINE = "Loading", "Reading the model", "Measuring the baseline"
COSTS, TUNING, TEST = "Measuring what choices cost", "Fine-tuning", "Reading the test"
TRYING = "Trying"
# Method, fault, and the stage from whose beginning on it happens in it; empty for the whole search.
FAULTS = [
    ("none", "none", ""),
    *[("model", fault, "") for fault in ("raise", "nan", "shape", "other")], ("model", "raise", TUNING),
    *[("example_inputs", fault, "") for fault in ("raise", "nan", "shape", "other")],
    *[("calibration", fault, "") for fault in ("raise", "nan", "shape", "other")], ("calibration", "nan", READING),
    ("calibration", "raise", READING), ("calibration", "raise", TUNING),
    *[("train_batches", fault, TUNING) for fault in ("raise", "nan", "shape", "hang", "exit", "memory")],
    *[("train_batches", fault, "") for fault in ("raise", "other")],
    ("train_size", "shape", ""), ("train_size", "raise", TUNING),
    *[("validation", fault, "") for fault in ("raise", "nan", "shape", "other")], ("validation", "raise", TUNING),
    *[("test", fault, TEST) for fault in ("raise", "nan", "shape", "other", "hang", "exit", "memory")],
    *[("metric", fault, "") for fault in ("raise", "nan", "shape", "percent", "negative", "other")],
    *[("metric", fault, BASELINE) for fault in ("raise", "nan", "percent")],
    *[("metric", fault, TRYING) for fault in ("raise", "nan", "hang")],
    *[("metric", fault, TUNING) for fault in ("raise", "nan")],
    *[("metric", fault, TEST) for fault in ("raise", "nan", "negative", "hang", "exit")],
    *[("loss", fault, TUNING) for fault in ("raise", "nan", "shape", "detached")], ("loss", "raise", ""),
    *[("divergence", fault, "") for fault in ("raise", "nan", "shape")], ("divergence", "raise", TRYING),
    ("divergence", "raise", COSTS), ("divergence", "nan", TUNING),
    *[("fingerprint", fault, "") for fault in ("raise", "shape", "other")],
    ("tied", "none", ""),
]  # fmt: skip


def search(method: str, fault: str, stage: str, run: Path) -> dict[str, object]:
    """Run one search and return its row."""
    child = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import faulty_task; faulty_task.prepare();"
        "from autocompress.cli import main; sys.exit(main())"
    )
    command = [
        sys.executable, "-c", child, str(HERE), "search", "--task", "faulty_task:make", "--engine", "onnxruntime",
        "--n-trials", "3", "--timeout", "60s", "--out", str(run), "--set", "recovery.epochs=2", "--json",
    ]  # fmt: skip
    begun = time.monotonic()
    environment = {
        **os.environ, "AUTOCOMPRESS_FAULT": f"{method}:{fault}:{stage}", "COLUMNS": "200",
        # What an earlier search measured of the same task would hide what fails in this one.
        "AUTOCOMPRESS_CACHE": str(run.with_suffix(".cache")),
    }  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, check=False)
        code, said = str(done.returncode), done.stderr
    except subprocess.TimeoutExpired as error:
        code, said = "still hanging after 150 s", (error.stderr or b"").decode()
    lines = [line for line in said.strip().splitlines() if line.strip()]
    told = [line for line in lines if method in line or "failed" in line or "ends early" in line]
    told = [line for line in told if line.startswith(("Note: ", "trial ")) and not line.startswith("Note: Plan")]
    # The last line is the error, if there was one.
    last = lines[-1:] if code != "0" else []
    return {
        "method": method, "fault": fault, "stage": stage or "all", "exit_code": code,
        "seconds": round(time.monotonic() - begun), "summary": _summary(run / "summary.json"),
        "best": "yes" if (run / "best" / "record.json").exists() else "no",
        "report": "yes" if (run / "report.html").exists() else "no",
        "traceback": "yes" if "Traceback (most recent call last)" in said else "no",
        "message": " | ".join(dict.fromkeys([*told[:2], *told[-1:], *last])).replace(str(run), "RUN")[:1200],
    }  # fmt: skip


def _summary(path: Path) -> str:
    if not path.exists():
        return "no"
    best = json.loads(path.read_text())["best"]
    return "yes" if best["accuracy"] is not None else "without test accuracy"


def main() -> None:
    """Run all, or those whose method is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "user_tasks.csv")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD:FAULT:STAGE", help="Beginnings of rows.")
    options = parser.parse_args()
    chosen = [row for row in FAULTS if not options.only or any(":".join(row).startswith(o) for o in options.only)]
    with tempfile.TemporaryDirectory() as folder, options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for number, row in enumerate(chosen):
            found = search(*row, Path(folder) / f"run-{number}")
            writer.writerow(found)
            file.flush()
            print(*(str(found[name])[:160] for name in FIELDS), sep=" · ", flush=True)


if __name__ == "__main__":
    main()
