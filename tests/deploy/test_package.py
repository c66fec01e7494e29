from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from autocompress.config import RunConfig
from autocompress.deploy.manifest import Manifest
from autocompress.deploy.package import deploy, deployable
from autocompress.deploy.verify import verify
from autocompress.engines.base import Array, EngineFile
from autocompress.errors import BuildError, ConfigError, VerificationError
from autocompress.files import read_json, replace_folder, write_json
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.measure import Protocol
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import Measurement, TrialRecord

SHIPPED = {
    "manifest.json", "engine.json", "policy.json", "model.xml", "model.bin", "model.onnx", "weights.safetensors",
    "reference.safetensors", "run.py",
}  # fmt: skip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Fake:
    """A worker whose latency is given; its outputs are the real ones."""

    def __init__(self, worker: EngineWorker, *lows: float, noise: tuple[str, ...] = ()) -> None:
        self.worker, self.lows, self.asked, self.noise = worker, list(lows), list[Path](), noise

    def describe(self, engine: str) -> dict[str, Any]:
        return self.worker.describe(engine)

    def infer(self, file: EngineFile, inputs: Array) -> Array:
        return self.worker.infer(file, inputs)

    def measure(self, files: Sequence[EngineFile], inputs: Array, protocol: Protocol) -> list[Measurement]:
        self.asked = [file.path for file in files]
        low = self.lows.pop(0)
        one = Measurement(1.0, 1.0, 1.0, 1.0, 0.0, 9, 1.0, 1.0, low + 0.1, low, low + 0.2, 1.0, False, 1, 1, self.noise)
        return [one, one]


def untouched(to: Path) -> bool:
    return not to.exists() and not [p for p in to.parent.iterdir() if p.name.startswith(f".{to.name}")]


def test_best_in_a_fresh_process(run: RunDirectory, tmp_path: Path, quick: Protocol) -> None:
    to = tmp_path / "out" / "shipped"
    manifest = deploy(run, to, protocol=quick)
    assert {p.name for p in to.iterdir()} == SHIPPED
    assert [p.name for p in to.parent.iterdir()] == ["shipped"]
    for name, listed in manifest.files.items():
        # run.py is written when deploying; everything else is a copy.
        source = to if name == "run.py" else run.best
        assert listed == {"sha256": sha256(source / name), "bytes": (to / name).stat().st_size}
        assert sha256(to / name) == listed["sha256"]
    assert set(manifest.files) == SHIPPED - {"manifest.json"}
    assert datetime.fromisoformat(manifest.created).utcoffset() is not None
    assert (manifest.trial, manifest.stage, manifest.engine, manifest.file) == (3, "recovered", "openvino", "model.xml")
    assert manifest.accuracy == {"validation": 0.89, "test": 0.88}
    assert manifest.measured is not None and manifest.measured["ratio"] == 0.4
    assert (manifest.device, manifest.task, manifest.model) == ({"name": "a CPU"}, "digits", "tiny")
    assert manifest.verification["outputs"]["difference"] == 0
    assert manifest.verification["latency"]["ratio"] < 1
    assert Manifest.read(to) == manifest
    assert (to.stat().st_mode & 0o777) == 0o755


def test_deployed_directory_verifies_elsewhere(run: RunDirectory, tmp_path: Path, worker: EngineWorker) -> None:
    deploy(run, tmp_path / "shipped", worker=Fake(worker, 0.5))
    moved = (tmp_path / "shipped").rename(tmp_path / "elsewhere")
    found = verify(moved, worker)
    assert found["outputs"] == {"samples": 4, "tolerance": 1e-3, "difference": 0.0, "same_top_1": 1.0}
    assert found["files"] == 8


def test_recovered_is_preferred_and_proxy_taken_otherwise(
    run: RunDirectory, tmp_path: Path, worker: EngineWorker
) -> None:
    assert deployable(run) == [3, 5, 7]
    fake = Fake(worker, 0.5, 0.5)
    assert deploy(run, tmp_path / "a", 3, fake).stage == "recovered"
    assert fake.asked[0] == run.baseline / "model.xml"
    proxy = deploy(run, tmp_path / "b", 5, fake, device={"cpu": "x"})
    assert (proxy.stage, proxy.trial, proxy.accuracy["test"], proxy.device) == ("proxy", 5, None, {"cpu": "x"})


@pytest.mark.parametrize(
    ("trial", "why"), [(0, "0 is the uncompressed model"), (9, "it failed .BuildError: no."), (4, "no such trial")]
)
def test_trials_without_an_engine(run: RunDirectory, tmp_path: Path, trial: int, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"{why}.*Trials with files: 3, 5, 7"):
        deploy(run, tmp_path / "out", trial)


def test_no_result_yet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no best result yet.*No trial has files"):
        deploy(RunDirectory(tmp_path), tmp_path / "out")


def test_refuses_to_overwrite_but_takes_an_empty_directory(
    run: RunDirectory, tmp_path: Path, worker: EngineWorker
) -> None:
    to = tmp_path / "out"
    to.mkdir()
    deploy(run, to, worker=Fake(worker, 0.5))
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        deploy(run, to, worker=Fake(worker, 0.5))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        deploy(run, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_slower_than_the_baseline_never_ships(run: RunDirectory, tmp_path: Path, quick: Protocol) -> None:
    with pytest.raises(VerificationError, match=r"slower than the uncompressed model"):
        deploy(run, tmp_path / "out", 7, protocol=quick)
    assert untouched(tmp_path / "out")


def test_slower_is_believed_only_the_third_time(run: RunDirectory, tmp_path: Path, worker: EngineWorker) -> None:
    deploy(run, tmp_path / "a", worker=Fake(worker, 1.05, 1.05, 0.9))
    with pytest.raises(VerificationError, match=r"is slower than the uncompressed model here: .* 1\.150x"):
        deploy(run, tmp_path / "b", worker=Fake(worker, 1.05, 1.05, 1.05))


def test_what_noise_may_hide_does_not_ship(run: RunDirectory, tmp_path: Path, worker: EngineWorker) -> None:
    fake = Fake(worker, 0.95, 0.95, 0.95, noise=("other programs used 50% of it",))
    with pytest.raises(VerificationError, match=r"could not be shown .* to 1.150\). Disturbed: other programs used"):
        deploy(run, tmp_path / "a", worker=fake)
    assert untouched(tmp_path / "a")
    # As wide, but the middle is no slower.
    deploy(run, tmp_path / "b", worker=Fake(worker, 0.9))


def test_other_outputs_than_the_reference(run: RunDirectory, tmp_path: Path, worker: EngineWorker) -> None:
    path = run.best / "reference.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "outputs": tensors["outputs"] * 1.01}, path)
    with pytest.raises(VerificationError, match=r"reference\.safetensors has changed since it was measured"):
        deploy(run, tmp_path / "out", worker=Fake(worker, 0.5))
    # Where old releases wrote no hash of it, the outputs tell.
    write_json(run.best / "engine.json", {**read_json(run.best / "engine.json"), "companions": {}})
    with pytest.raises(VerificationError, match="does not compute what was measured"):
        deploy(run, tmp_path / "out", worker=Fake(worker, 0.5))
    save_file({**tensors, "outputs": np.full_like(tensors["outputs"], np.nan)}, path)
    with pytest.raises(VerificationError, match="no usable reference"):
        deploy(run, tmp_path / "out", worker=Fake(worker, 0.5))
    path.write_bytes(b"damaged")
    with pytest.raises(VerificationError, match="cannot be read"):
        deploy(run, tmp_path / "out", worker=Fake(worker, 0.5))
    path.unlink()
    with pytest.raises(ConfigError, match=r"reference\.safetensors is missing"):
        deploy(run, tmp_path / "out", worker=Fake(worker, 0.5))
    assert untouched(tmp_path / "out")


def test_another_file_than_the_measured_one(run: RunDirectory, tmp_path: Path, worker: EngineWorker) -> None:
    engine = read_json(run.best / "engine.json")
    listed = {"model.bin": sha256(run.best / "model.bin")}
    write_json(run.best / "engine.json", {**engine, "sha256": listed})
    deploy(run, tmp_path / "good", worker=Fake(worker, 0.5))
    (run.best / "model.bin").write_bytes((run.artifact(5) / "model.bin").read_bytes())
    with pytest.raises(VerificationError, match=r"model\.bin has changed since it was measured"):
        deploy(run, tmp_path / "bad", worker=Fake(worker, 0.5))
    assert untouched(tmp_path / "bad")


def test_engine_that_does_not_open(run: RunDirectory, tmp_path: Path, worker: EngineWorker) -> None:
    (run.best / "model.xml").write_text("<no/>")
    engine = read_json(run.best / "engine.json")
    write_json(run.best / "engine.json", {**engine, "sha256": {}})
    with pytest.raises(BuildError):
        deploy(run, tmp_path / "out", worker=Fake(worker, 0.5))
    assert untouched(tmp_path / "out")


def test_no_baseline(run: RunDirectory, tmp_path: Path) -> None:
    (run.baseline / "engine.json").unlink()
    with pytest.raises(ConfigError, match="no baseline engine"):
        deploy(run, tmp_path / "out")


def test_full_disk(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        deploy(run, tmp_path / "out")
    assert untouched(tmp_path / "out")


class TestManifest:
    @pytest.fixture
    def shipped(self, run: RunDirectory, tmp_path: Path, worker: EngineWorker) -> Path:
        deploy(run, tmp_path / "shipped", worker=Fake(worker, 0.5))
        return tmp_path / "shipped"

    def test_round_trip(self, shipped: Path) -> None:
        manifest = Manifest.read(shipped)
        assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest
        assert Manifest.from_dict({**manifest.to_dict(), "later": 1}) == manifest

    @pytest.mark.parametrize("name", sorted(SHIPPED - {"manifest.json"}))
    def test_damage_is_named(self, shipped: Path, worker: EngineWorker, name: str) -> None:
        data = bytearray((shipped / name).read_bytes())
        data[len(data) // 2] ^= 1
        (shipped / name).write_bytes(data)
        with pytest.raises(VerificationError, match=f"{name} is damaged or was changed"):
            verify(shipped, worker)
        (shipped / name).write_bytes(data[:-1])
        with pytest.raises(VerificationError, match=f"{name} is damaged: it has"):
            verify(shipped, worker)
        (shipped / name).unlink()
        with pytest.raises(VerificationError, match=f"{name} is missing"):
            verify(shipped, worker)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"schema_version": 2}, "version 2 cannot be read"),
            ({"file": "../../model.xml"}, "plain file names"),
            ({"files": {"/etc/passwd": {}}}, "plain file names"),
            ({"policy_hash": "0" * 16}, "does not match its hash"),
        ],
    )
    def test_unusable(self, shipped: Path, change: dict[str, Any], said: str) -> None:
        write_json(shipped / "manifest.json", {**read_json(shipped / "manifest.json"), **change})
        with pytest.raises(ConfigError, match=said):
            Manifest.read(shipped)

    def test_missing_keys_and_files(self, shipped: Path, tmp_path: Path) -> None:
        write_json(shipped / "manifest.json", {"schema_version": 1})
        with pytest.raises(ConfigError, match="lacks created"):
            Manifest.read(shipped)
        write_json(shipped / "manifest.json", [])
        with pytest.raises(ConfigError, match="holds no manifest"):
            Manifest.read(shipped)
        with pytest.raises(ConfigError, match="no deployed directory"):
            verify(tmp_path)

    def test_options_of_no_engine(self, shipped: Path) -> None:
        manifest = replace(Manifest.read(shipped), options={"cores": 3})
        with pytest.raises(ConfigError, match="options cannot be read"):
            manifest.engine_file(shipped)


# -- limits -----------------------------------------------------------------------------------------------------------


def with_limits(run: RunDirectory, worst: float = 0.41, accuracy: float = 0.89, **limits: str) -> None:
    """Give a run limits, a measured baseline, and trial 5 another latency ratio and accuracy."""
    run.write_config(RunConfig.model_validate(limits))
    dense = Measurement(0.25, 0.25, 0.25, 0.25, 0.0, 500, 0.25, 0.25, 1.0, 1.0, 1.0, 0.25, False, 1, 1)
    baseline = TrialRecord.from_dict(read_json(run.baseline / "record.json"))
    write_json(run.baseline / "record.json", replace(baseline, measurement=dense, size_bytes=4000).to_dict())
    other = run.records()[5]
    assert other.measurement is not None
    measured = replace(other.measurement, ratio=worst - 0.01, ratio_low=worst - 0.02, ratio_high=worst)
    changed = replace(other, measurement=measured, accuracy=accuracy)
    run.append(changed)
    write_json(run.artifact(5) / "record.json", changed.to_dict())


def test_what_missed_its_limits_is_deployed_by_force_alone(
    run: RunDirectory, tmp_path: Path, worker: EngineWorker
) -> None:
    with_limits(run, target_latency="0.3x")
    with pytest.raises(ConfigError, match=r"Trial 3 .* latency 0.4x is 33.3% over the target of 0.3x.*--force\.$"):
        deploy(run, tmp_path / "out", worker=Fake(worker))
    assert untouched(tmp_path / "out")
    assert deploy(run, tmp_path / "out", worker=Fake(worker, 0.5), force=True).trial == 3


def test_the_refusal_names_the_trial_that_meets_every_limit(run: RunDirectory, tmp_path: Path) -> None:
    with_limits(run, 0.25, target_latency="0.3x", max_drop="2pp")
    with pytest.raises(ConfigError, match=r"or trial 5 with --trial 5, which meets every limit"):
        deploy(run, tmp_path / "out")
    # One that loses too much is no way out.
    with_limits(run, 0.25, 0.7, target_latency="0.3x", max_drop="2pp")
    with pytest.raises(ConfigError, match=r"--force\.$"):
        deploy(run, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"Trial 5 .*validation accuracy is 20.00 pp below the baseline, 2 pp allow"):
        deploy(run, tmp_path / "out", 5)


def test_a_ratio_decides_where_the_limit_is_one_whatever_the_milliseconds(
    run: RunDirectory, tmp_path: Path, worker: EngineWorker
) -> None:
    with_limits(run, target_latency="0.5x", max_drop="2pp")
    summary = run.read("summary.json")
    # The end of the run measured in a slow minute; on test data the drop is above the limit, on validation not.
    figures = {"latency_ms": 9.0, "latency_ratio": 0.4, "accuracy_drop_pp": 1.0, "size_bytes": 1000}
    run.write("summary.json", {**summary, "best": {**summary["best"], **figures}})
    deploy(run, tmp_path / "a", worker=Fake(worker, 0.5))
    figures["accuracy_drop_pp"] = 2.5
    run.write("summary.json", {**summary, "metric": "cosine", "best": {**summary["best"], **figures}})
    with pytest.raises(ConfigError, match=r"test cosine is 0.0250 below the baseline, 0.02 allowed"):
        deploy(run, tmp_path / "b", worker=Fake(worker))


def test_the_uncompressed_model_can_be_deployed(run: RunDirectory, tmp_path: Path, quick: Protocol) -> None:
    with_limits(run, target_latency="0.3x")
    replace_folder(run.baseline, run.best)
    with pytest.raises(ConfigError, match=r"^The uncompressed model of .* latency 1x is 233.3% over"):
        deploy(run, tmp_path / "out")
    manifest = deploy(run, tmp_path / "out", force=True, protocol=quick)
    assert (manifest.trial, manifest.stage) == (None, "baseline")
