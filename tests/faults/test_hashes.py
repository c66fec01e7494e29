"""Every file of an artefact is hashed, and compared wherever the artefact is opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from autocompress.compress.reload import load_compressed
from autocompress.deploy.artifacts import resolve
from autocompress.deploy.manifest import Manifest, describe_file
from autocompress.deploy.package import deploy
from autocompress.engines.artifact import EngineDocument, read_artifact, write_engine
from autocompress.engines.base import EngineFile, EngineOptions
from autocompress.errors import ConfigError, VerificationError
from autocompress.files import read_json
from autocompress.policy import CompressionPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import TrialRecord
from autocompress.storage import pack
from tests.exploration import tiny

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"
FILES = ("model.onnxruntime.onnx", "model.onnx", "weights.safetensors", "reference.safetensors")


def rehash(folder: Path) -> None:
    found = EngineDocument.read(folder)
    write_engine(folder, EngineFile(found.engine, folder / found.file, EngineOptions()), found.engine_version)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of before, its hashes as this release writes them."""
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    for name in ("best", "baseline"):
        rehash(tmp_path / "run" / name)
    return tmp_path / "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_all_files_have_a_hash(run: Path) -> None:
    assert set(EngineDocument.read(run / "best").hashes) == set(FILES)


def test_an_artefact_of_before_is_taken_as_it_is(tmp_path: Path) -> None:
    shutil.copytree(EARLIER / "run" / "best", tmp_path / "best")
    assert not EngineDocument.read(tmp_path / "best").companions
    flip(tmp_path / "best" / "model.onnx")
    assert read_artifact(tmp_path / "best").path.exists()


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_wherever_the_artefact_is_opened(run: Path, tmp_path: Path, name: str) -> None:
    flip(run / "best" / name)
    said = f"{name} has changed since it was measured"
    opened: tuple[Callable[[], object], ...] = (
        lambda: read_artifact(run / "best"),
        lambda: resolve(run, None, EngineOptions()),
        lambda: resolve(run / "best" / "model.onnxruntime.onnx", None, EngineOptions()),
        lambda: deploy(RunDirectory.open(run), tmp_path / "out", force=True),
    )
    for action in opened:
        with pytest.raises(VerificationError, match=said):
            action()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_baseline_deploys_nothing(run: Path, tmp_path: Path, name: str) -> None:
    flip(run / "baseline" / name)
    with pytest.raises(VerificationError, match=f"baseline/{name} has changed"):
        deploy(RunDirectory.open(run), tmp_path / "out", force=True)


def test_damaged_weights_are_neither_trained_on_nor_packed(run: Path, tmp_path: Path) -> None:
    record = TrialRecord.read(run / "best" / "record.json")
    task = tiny.made("make")
    load_compressed(task, run / "best", record)
    flip(run / "best" / "weights.safetensors")
    with pytest.raises(VerificationError, match=r"weights\.safetensors has changed"):
        load_compressed(task, run / "best", record)
    with pytest.raises(VerificationError, match=r"weights\.safetensors has changed"):
        pack(run, tmp_path / "packed")


def test_a_file_that_is_gone_is_named(run: Path) -> None:
    (run / "best" / "weights.safetensors").unlink()
    with pytest.raises(VerificationError, match=r"weights\.safetensors is missing"):
        read_artifact(run / "best")


@pytest.fixture
def deployed(tmp_path: Path) -> Path:
    folder, best = tmp_path / "deployed", EARLIER / "run" / "best"
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(best / name, folder / name)
    policy = CompressionPolicy.from_dict(read_json(best / "policy.json"))
    Manifest(
        1, "2026-01-01T00:00:00+00:00", None, "onnxruntime", "1", EngineOptions().to_dict(), FILES[0],
        {name: describe_file(folder / name) for name in FILES}, policy.to_dict(), policy.hash, 1, "proxy", None, None,
        None, None, {}, 1, {},
    ).write(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_deployment_is_not_timed(deployed: Path, name: str) -> None:
    assert resolve(deployed, None, EngineOptions()).path.name == FILES[0]
    flip(deployed / name)
    with pytest.raises(VerificationError, match=f"{name} is damaged"):
        resolve(deployed, None, EngineOptions())


def test_a_manifest_hashes_what_it_opens(deployed: Path) -> None:
    data = read_json(deployed / "manifest.json")
    with pytest.raises(ConfigError, match="has no hash of the engine file"):
        Manifest.from_dict({**data, "files": {k: v for k, v in data["files"].items() if k != FILES[0]}})
