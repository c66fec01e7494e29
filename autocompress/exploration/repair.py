"""A run directory looked over: what is damaged is named, and mended where the run holds it twice.

The log is the truth. Nothing that could be read is removed: what is set aside keeps its content under another name.
"""

from __future__ import annotations

from pathlib import Path

from autocompress.documents import parse_json
from autocompress.engines.artifact import EngineDocument, check_hashes, content_hash
from autocompress.errors import AutoCompressError
from autocompress.exploration.study import damage, set_aside
from autocompress.files import append_line, replace_folder, write_bytes
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import TrialRecord
from autocompress.runs.scratch import sweep_run


def repair(run: RunDirectory) -> list[str]:
    """Mend a run that nobody else owns; return what was found and done, a sentence each, none for a sound run.

    Raises:
        ConfigError: The log itself cannot be read, or the directory cannot be written.
    """
    return [*_half_made(run), *_log(run), *_study(run), *_artefacts(run), *_best(run)]


def _half_made(run: RunDirectory) -> list[str]:
    removed = sweep_run(run.path)
    return [f"{removed} half-made files and folders of a killed process are removed."] if removed else []


def _log(run: RunDirectory) -> list[str]:
    """Keep the lines that cannot be read in a file of their own."""
    damaged = run.log().damaged
    if not damaged:
        return []
    whole: list[bytes] = []
    rest: list[bytes] = []
    for line in run.trials_file.read_bytes().split(b"\n"):
        if line.strip():
            (whole if _is_record(line) else rest).append(line)
    aside = run.trials_file.with_name(f"{run.trials_file.name}.damaged")
    for line in rest:
        append_line(aside, line.decode(errors="backslashreplace"))
    write_bytes(run.trials_file, b"".join(line + b"\n" for line in whole))
    return [*damaged, f"Damaged lines of the log are kept in {aside.name}: {len(rest)}."]


def _is_record(line: bytes) -> bool:
    try:
        TrialRecord.from_dict(parse_json(line, "line"), "line")
    except AutoCompressError:
        return False
    return True


def _study(run: RunDirectory) -> list[str]:
    if not run.study_file.exists():
        return [f"{run.study_file.name} is missing; --resume makes it anew of the log."] if run.history() else []
    found = damage(run)
    if found is None:
        return []
    return [
        f"{run.study_file.name} {found}: it is set aside as {set_aside(run).name}; --resume makes it anew of the log."
    ]


def _artefacts(run: RunDirectory) -> list[str]:
    latest = {record.artifact: record for record in run.history() if record.artifact is not None}
    found = []
    for artifact, record in latest.items():
        fault = _fault(run.path / artifact, record)
        if fault is not None:
            found.append(f"Trial {record.number} cannot be deployed: {fault}")
    return found


def _fault(folder: Path, record: TrialRecord) -> str | None:
    """Return what is wrong with an artefact, going by its record; None for nothing."""
    try:
        check_hashes(folder, EngineDocument.read(folder))
        if record.sha256 is not None and content_hash(folder) != record.sha256:
            return f"{folder} does not hold what was recorded."
    except AutoCompressError as error:
        return str(error)
    return None


def _best(run: RunDirectory) -> list[str]:
    """Make ``best/`` anew of the artefact it is a copy of, where it is damaged."""
    if not run.best.exists():
        return []
    try:
        record = TrialRecord.from_dict(run.read("best/record.json"))
        fault = _fault(run.best, record)
    except AutoCompressError as error:
        record, fault = None, str(error)
    if fault is None:
        return []
    known = [record] if record is not None else sorted(run.records().values(), key=lambda one: -(one.accuracy or 0.0))
    for one in known:
        if one.artifact is not None and _fault(run.path / one.artifact, one) is None:
            replace_folder(run.path / one.artifact, run.best)
            return [f"best/ was damaged ({fault}): it is made anew of {one.artifact}; --resume chooses again."]
    return [f"best/ is damaged ({fault}), and so is what it is a copy of. Continue the run with --resume."]
