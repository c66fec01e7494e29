"""Records round-trip through JSON; a write is whole or did not happen."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autocompress import files
from autocompress.errors import ConfigError
from autocompress.policy import CompressionPolicy
from autocompress.runs.records import Measurement, TrialRecord


def test_a_measurement_round_trips(make_measurement: Callable[..., Measurement]) -> None:
    made = make_measurement(latency_ms=1.25, noisy=True)
    assert Measurement.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    made = make_measurement(noise=("the median drifted by +4%",), aa_low=0.99, throughput_per_s=812.5, energy_mj=3.5)
    again = Measurement.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made and hash(again) == hash(made)


def test_a_measurement_of_an_older_release_is_read(make_measurement: Callable[..., Measurement]) -> None:
    data = make_measurement().to_dict()
    new = ("noise", "aa_ratio", "aa_low", "aa_high", "mode", "streams", "throughput_per_s", "energy_mj", "verdict",
               "source", "gpu", "occasions", "states", "expected_low",
               "expected_high")  # fmt: skip
    old = {key: value for key, value in data.items() if key not in new}
    assert len(old) == 15
    read = Measurement.from_dict(old)
    assert read == make_measurement()
    assert (read.noise, read.mode, read.throughput_per_s, read.energy_mj) == ((), "latency", None, None)


@pytest.mark.parametrize(
    ("ratio", "itself", "verdict"),
    [
        ((0.49, 0.51), (1.0, 1.0), "faster"),
        ((0.97, 0.985), (1.0, 1.0), "faster"),
        ((0.97, 0.995), (1.0, 1.0), "unsure"),  # two copies of one file may differ by as much
        ((0.985, 1.015), (1.0, 1.0), "equal"),
        ((1.0, 1.0), (1.0, 1.0), "equal"),
        ((1.005, 1.03), (1.0, 1.0), "unsure"),
        ((1.02, 1.03), (1.0, 1.0), "slower"),
        # Widened by what the baseline differed from itself by, whichever way.
        ((0.97, 0.985), (0.99, 1.002), "unsure"),
        ((1.02, 1.03), (0.998, 1.02), "unsure"),
        ((0.995, 1.005), (0.99, 1.01), "equal"),
        ((0.995, 1.005), (0.97, 1.01), "unsure"),
        ((0.5, 0.6), (0.8, 1.1), "faster"),
        ((0.5, 0.6), (0.0, 1.1), "unsure"),
    ],
)
def test_verdict(
    make_measurement: Callable[..., Measurement],
    ratio: tuple[float, float],
    itself: tuple[float, float],
    verdict: str,
) -> None:
    made = make_measurement(
        ratio=sum(ratio) / 2, ratio_low=ratio[0], ratio_high=ratio[1], aa_low=itself[0], aa_high=itself[1]
    )
    assert made.verdict == made.to_dict()["verdict"] == verdict


def test_a_record_round_trips(make_record: Callable[..., TrialRecord]) -> None:
    made = make_record(7, stage="recovered")
    again = TrialRecord.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert again.latency_ms == 1.0


def test_a_failed_record_round_trips() -> None:
    made = TrialRecord(3, CompressionPolicy(), "failed", error="BuildError: no")
    again = TrialRecord.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert again.latency_ms is None


def test_keys_of_a_later_release_are_ignored(make_record: Callable[..., TrialRecord]) -> None:
    data = make_record().to_dict()
    data["colour"] = "blue"
    data["measurement"]["watts"] = 3
    assert TrialRecord.from_dict(data) == make_record()


def test_json_round_trip_makes_folders(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "x.json"
    files.write_json(file, {"µ": [1, 2.5, None]})
    assert files.read_json(file) == {"µ": [1, 2.5, None]}
    assert file.read_bytes().endswith(b"\n")
    assert [p.name for p in file.parent.iterdir()] == ["x.json"]


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", float("nan"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_full_disk_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    file = tmp_path / "x.json"
    files.write_json(file, "old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(ConfigError, match=r"x\.json: No space left on device\. Free some space.*--resume"):
        files.write_json(file, "new")
    monkeypatch.undo()
    assert files.read_json(file) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "x", "new")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot write"):
        files.write_text(tmp_path / "file" / "x", "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            files.write_text(tmp_path / "x", "new")
    finally:
        tmp_path.chmod(0o700)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json does not exist"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(ConfigError, match=r"cut\.json cannot be read"):
        files.read_json(tmp_path / "cut.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        files.read_json(tmp_path / "binary.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        files.read_json(tmp_path)
