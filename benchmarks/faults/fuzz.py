"""Damaged and crafted files for every reader: no exception but ours, no abort, no hang, no write outside.

    python benchmarks/faults/fuzz.py --cases 200000 --out benchmarks/faults/results/fuzz.json
    python benchmarks/faults/fuzz.py --seconds 30
    python benchmarks/faults/fuzz.py --reader engine.json --seed 7

Valid files are mutated (`mutations.py`) and given to every reader of the package (`readers.py`), in a child process
that may take 1 GiB more than it has after its imports. A case fails by an exception that is no `AutoCompressError`, by
taking more than 5 s, by a file opened for writing outside the reader's own folder, or by the end of the process.
Counts and failures go to --out as JSON, and as a table beside it (.csv). Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HANG_S, MEMORY = 5, 2**30
# Cases of one call of hypothesis: it remembers all of a call's, and slows down.
_BATCH = 500
_HERE = Path(__file__).parent


class Hang(BaseException):
    """A case took too long. No Exception, so that no reader takes it for a damaged file."""


# -- the child ------------------------------------------------------------------------------------------------------


def work(names: list[str], cases: int, seconds: float, seed: int) -> None:
    """Fuzz readers one after the other; print a JSON line of each."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ["AUTOCOMPRESS_CACHE"] = str(folder / "cache")
    sys.path.insert(0, str(_HERE))
    warnings.simplefilter("ignore")
    import readers

    outside = _watch_writes(folder)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, _hang)
    chosen = [reader for reader in readers.REGISTRY if reader.name in names]
    shares = sum(reader.share for reader in chosen)
    for reader in chosen:
        print(json.dumps({"begin": reader.name}), flush=True)
        part = reader.share / shares
        found = _fuzz(
            reader, folder / "case", outside, cases=round(cases * part), seconds=max(0.3, seconds * part), seed=seed
        )
        print(json.dumps({"reader": reader.name, **found}), flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def _fuzz(  # noqa: PLR0915 - the counters of one reader
    reader: Any, folder: Path, outside: list[str], *, cases: int, seconds: float, seed: int
) -> dict[str, Any]:
    import hypothesis
    import mutations

    from autocompress.errors import AutoCompressError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["AUTOCOMPRESS_CACHE"] = str(folder.parent / "cache")
    reader.make(folder)
    target = folder / reader.file
    valid = target.read_bytes()
    reader.read(folder)
    count = {"cases": 0, "refused": 0, "read": 0}
    failures: dict[str, dict[str, Any]] = {}
    slowest, end = 0.0, time.monotonic() + seconds
    del outside[:]

    def fail(kind: str, case: Any) -> None:
        entry = failures.setdefault(kind, {"failure": kind, "count": 0, "case": repr(case)[:500]})
        entry["count"] += 1

    def one(case: Any) -> None:
        nonlocal slowest
        if time.monotonic() > end or count["cases"] >= cases:
            return
        target.write_bytes(mutations.mutated(valid, reader.form, case))
        count["cases"] += 1
        begun = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            reader.read(folder)
            count["read"] += 1
        except AutoCompressError:
            count["refused"] += 1
        except Hang:
            fail(f"took more than {HANG_S} s", case)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "autocompress/" in f.filename]
            where = f"{ours[-1].filename.rpartition('autocompress/')[2]}:{ours[-1].lineno}" if ours else "?"
            fail(f"{type(error).__name__} at {where}: {str(error)[:120]}", case)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.monotonic() - begun)
        if outside:
            fail(f"wrote outside: {outside[0]}", case)
            del outside[:]

    batch = 0
    while count["cases"] < cases and time.monotonic() < end:
        batch += 1
        test = hypothesis.seed(seed * 1_000_003 + batch)(
            hypothesis.settings(
                max_examples=min(_BATCH, cases - count["cases"]), deadline=None, database=None,
                phases=(hypothesis.Phase.generate,), suppress_health_check=list(hypothesis.HealthCheck),
            )(hypothesis.given(mutations.CASES)(one))
        )  # fmt: skip
        test()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**count, "slowest_s": round(slowest, 3), "peak_bytes": peak, "failures": list(failures.values())}


def _hang(number: int, frame: object) -> None:
    raise Hang


def _watch_writes(folder: Path) -> list[str]:
    """Return the list that names of files opened for writing outside `folder` are added to."""
    found: list[str] = []
    allowed = (str(folder), "/dev/null")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool((flags or 0) & 3)
            names = (path,) if writes else ()
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"):
            # A name relative to an opened folder: `rmtree` walks so, whose own event names the folder.
            if any(isinstance(a, int) and a >= 0 for a in arguments[1:] if event != "os.mkdir"):
                return
            names = tuple(a for a in arguments[:2] if isinstance(a, str | bytes | Path))
        else:
            return
        for name in names:
            if isinstance(name, str | bytes | Path):
                full = str(Path.cwd() / os.fsdecode(name))
                if not full.startswith(allowed) and "hypothesis" not in full and "__pycache__" not in full:
                    found.append(f"{event} {full}")

    sys.addaudithook(hook)
    return found


# -- the parent -----------------------------------------------------------------------------------------------------


def fuzz(names: list[str], cases: int, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Fuzz readers in a child; one that ends takes down its reader alone."""
    left, results = list(names), []
    while left:
        command = [sys.executable, __file__, "--worker", *(f"--reader={name}" for name in left)]
        # What is left of cases and time is shared among the readers that are left.
        share = len(left) / len(names)
        command += [f"--cases={round(cases * share)}", f"--seconds={seconds * share}", f"--seed={seed}"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            output, errors = child.communicate(timeout=seconds * share * 2 + 300)
        except subprocess.TimeoutExpired:
            child.kill()
            output, errors = child.communicate()
        begun = None
        for line in output.splitlines():
            answer = json.loads(line)
            if "begin" in answer:
                begun = answer["begin"]
            else:
                results.append(answer)
                left.remove(answer["reader"])
                begun = None
        if begun is not None:
            said = f"the process ended with status {child.returncode}: {errors.strip()[-300:]}"
            failure = {"failure": said, "count": 1, "case": ""}
            results.append({"reader": begun, "cases": 0, "refused": 0, "read": 0, "failures": [failure]})
            left.remove(begun)
        elif left and child.returncode:
            raise SystemExit(f"The child failed before its first case: {errors}")
    return results


def main() -> None:
    """Fuzz, say and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=86_400.0, help="at most; shared among the readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", help="repeatable; all by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.reader, given.cases, given.seconds, given.seed)
        return
    names = given.reader or _names()
    begun = time.monotonic()
    results = fuzz(names, given.cases, given.seconds, given.seed)
    document = {
        "command": f"python benchmarks/faults/fuzz.py {' '.join(sys.argv[1:])}",
        "cases": sum(one["cases"] for one in results), "readers": len(results),
        "failures": sum(f["count"] for one in results for f in one["failures"]),
        "seconds": round(time.monotonic() - begun), "python": sys.version.split()[0], "results": results,
    }  # fmt: skip
    for one in results:
        print(f"{one['reader']:28} {one['cases']:>8} cases, {one['refused']:>8} refused, {one['read']:>8} read")
        for failure in one["failures"]:
            print(f"    {failure['count']:>5} x {failure['failure']}\n          {failure['case']}")
    print(f"{document['cases']} cases, {document['failures']} failures, {document['seconds']} s")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")
        with given.out.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["reader", "cases", "refused", "read", "failures", "slowest_s", "peak_bytes"])
            for one in results:
                failed = sum(f["count"] for f in one["failures"])
                row = [one["reader"], one["cases"], one["refused"], one["read"], failed]
                writer.writerow([*row, one.get("slowest_s"), one.get("peak_bytes")])
    sys.exit(1 if document["failures"] else 0)


def _names() -> list[str]:
    """Return every reader's name, without importing what they import."""
    answer = subprocess.run(
        [sys.executable, "-c", "import readers; print(*(r.name for r in readers.REGISTRY), sep='\\n')"],
        cwd=_HERE, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    return answer.stdout.split("\n")[:-1]


if __name__ == "__main__":
    main()
