"""Every reader of the package: a valid file, its form, and what is done with it. A new reader is one entry here.

`REGISTRY` is what `fuzz.py` goes through. A reader gets the folder that holds its file; it may write inside it alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from autocompress.cli import runs, terminal
from autocompress.config import RunConfig, load_config
from autocompress.deploy.artifacts import input_ports, load_graph, resolve, stated
from autocompress.deploy.manifest import Manifest, describe_file
from autocompress.deploy.remeasure import device_name
from autocompress.deploy.run_script import run_script
from autocompress.deploy.triton import _BACKENDS, config_text
from autocompress.deploy.verify import read_reference
from autocompress.engines.artifact import EngineDocument, read_artifact
from autocompress.engines.base import EngineOptions
from autocompress.exploration.finished_trainings import FinishedTrainings
from autocompress.exploration.pareto import constraints_of, run_front
from autocompress.exploration.repair import repair
from autocompress.exploration.sensitivity_cache import SensitivityCache
from autocompress.exploration.study import load_study, open_study
from autocompress.files import read_json, write_json
from autocompress.policy import CompressionPolicy
from autocompress.prediction.table import LatencyTable
from autocompress.recovery.checkpoint import load_checkpoint, save_checkpoint
from autocompress.report import sections
from autocompress.report.run_view import read_run
from autocompress.runs.directory import RunDirectory
from autocompress.runs.lock import owned
from autocompress.runs.records import TrialRecord
from autocompress.runs.summaries import read_offered
from autocompress.runs.trust import remember, trust_of
from autocompress.space.search_space import load_space, shipped_spaces
from autocompress.storage import pack, read_container
from autocompress.tasks import images
from autocompress.tasks.sentence_encoder import longest_text, sentence_encoder
from autocompress.tasks.tokens import TextTokens
from autocompress.tasks.weights import read_weights

EARLIER = Path(__file__).parents[2] / "tests" / "fixtures" / "earlier"


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: In tables.
        file: What is mutated, relative to the folder.
        form: ``json``, ``jsonl``, ``yaml``, ``csv``, ``packed``, or ``bytes``, which has no types.
        make: Writes valid files into an empty folder.
        read: Reads them.
        share: Of the cases that others get; less where a case takes long.
    """

    name: str
    file: str
    form: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    share: float = 1.0


# -- runs -----------------------------------------------------------------------------------------------------------


def _run(folder: Path) -> None:
    shutil.copytree(EARLIER / "run", folder, dirs_exist_ok=True)
    write_json(folder / "offered.json", {"prune/0": [0.0, 0.5], "dtype/0": ["dense", "int8"]})
    write_json(folder / "tokens.json", {"length": 8, "pad_id": 0, "pad_token": "[PAD]", "padding_side": "right"})
    (folder / "tokenizer.json").write_text("{}")


def _trainings(folder: Path) -> None:
    _run(folder)
    FinishedTrainings(RunDirectory(folder)).add("key", RunDirectory(folder).history()[0])


def _read_trainings(folder: Path) -> None:
    FinishedTrainings(RunDirectory(folder)).get("key")


def _owner(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ".owner.json", {"host": "elsewhere", "pid": 7, "started": 1.0})


def _own(folder: Path) -> None:
    # It has been silent for long.
    os.utime(folder / ".owner.json", (0, 0))
    with owned(folder) as died:
        str(died)


def _identity(folder: Path) -> None:
    _run(folder)
    (folder / "study.db").unlink(missing_ok=True)
    write_json(folder / "identity.json", {"seed": 0, "engine": "onnxruntime", "objectives": "accuracy, latency ratio"})


def _read_identity(folder: Path) -> None:
    # Where there is a database, that tells.
    (folder / "study.db").unlink(missing_ok=True)
    open_study(RunDirectory(folder), RunConfig(sampler="random"), {"seed": 0, "engine": "onnxruntime"})


def _front(folder: Path) -> None:
    run = RunDirectory.open(folder)
    run.records()
    run_front(run)
    constraints_of(run)


def _shown(folder: Path) -> None:
    terminal.out.file = io.StringIO()
    terminal.err.file = io.StringIO()
    runs._print_run(RunDirectory.open(folder))


def _environment(folder: Path) -> None:
    device_name(RunDirectory(folder))
    sections.settings(read_run(RunDirectory.open(folder)))


def _study(folder: Path) -> None:
    run = RunDirectory(folder)
    for name in ("study.db-journal", "study.db-wal", "study.db-shm"):
        (folder / name).unlink(missing_ok=True)
    open_study(run, RunConfig(sampler="random"), {})
    len(load_study(run).trials)


def _make_study(folder: Path) -> None:
    open_study(RunDirectory(folder), RunConfig(sampler="random"), {})
    with sqlite3.connect(folder / "study.db") as database:
        database.execute("PRAGMA journal_mode=DELETE")


# -- deployed -------------------------------------------------------------------------------------------------------


def _deployed(folder: Path) -> None:
    best = EARLIER / "run" / "best"
    names = ("engine.json", "model.onnxruntime.onnx", "model.onnx", "policy.json", "reference.safetensors")
    for name in names:
        shutil.copyfile(best / name, folder / name)
    engine, policy = EngineDocument.read(best), CompressionPolicy.from_dict(read_json(best / "policy.json"))
    Manifest(
        1, "2026-01-01T00:00:00+00:00", None, engine.engine, engine.engine_version, engine.options, engine.file,
        {name: describe_file(folder / name) for name in names}, policy.to_dict(), policy.hash, 1, "proxy", "t", "m",
        {"name": "cpu"}, read_json(best / "latency.json"), {"validation": 0.9, "test": None}, 1, {},
    ).write(folder)  # fmt: skip


def _manifest(folder: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    file = manifest.engine_file(folder)
    compile(run_script(manifest, input_ports(file.path, file.options.batch_size)), "run.py", "exec")
    config_text("model", _BACKENDS["onnxruntime"], manifest, load_graph(folder / "model.onnx"), folder)


def _graph(folder: Path) -> None:
    path = folder / "model.onnx"
    input_ports(path, 1)
    manifest = Manifest.read(folder)
    config_text("model", _BACKENDS["onnxruntime"], manifest, load_graph(path), folder)
    compile(run_script(manifest, input_ports(path, 1)), "run.py", "exec")


_XML = """<?xml version="1.0"?>
<net name="n" version="11"><layers><layer id="0" name="input" type="Parameter" version="opset1">
<data shape="?,3,8,8" element_type="f32"/><output><port id="0" precision="FP32" names="input,x">
<dim>-1</dim><dim>3</dim><dim>8</dim><dim>8</dim></port></output></layer></layers><edges/></net>
"""


# -- weights and data -----------------------------------------------------------------------------------------------


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))


def _packed(folder: Path) -> None:
    state = {
        "zero": torch.zeros(40, 8), "shared": (torch.arange(320) % 7).reshape(40, 8).float(), "odd": torch.randn(9, 7),
        "sparse": torch.randn(30, 20) * (torch.rand(30, 20) > 0.9), "count": torch.arange(5), "none": torch.zeros(0, 3),
        "scaled": torch.randint(-100, 100, (24, 40)).float() * torch.logspace(-2, 0, 24)[:, None],
    }  # fmt: skip
    torch.manual_seed(0)
    pack(state, folder / "w.packed")


def _tar(folder: Path, mode: str) -> None:
    with tarfile.open(folder / "data.tar", mode) as archive:  # type: ignore[call-overload]
        for split in ("train", "test"):
            for name in ("a", "b"):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{split}/{name}/0.png")
                member.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(member, buffer)


def _images(folder: Path) -> None:
    images.read_images(folder / "data.tar", images.Preprocess(8))
    shutil.rmtree(os.environ["AUTOCOMPRESS_CACHE"], ignore_errors=True)


def _cached_images(folder: Path) -> None:
    pixels, classes = np.zeros((2, 3, 8, 8), np.uint8), np.arange(2)
    os.environ["AUTOCOMPRESS_CACHE"] = str(folder)
    images._store("key", images.ImageSet({"train": (pixels, classes)}, ("a", "b")))


def _load_cached(folder: Path) -> None:
    os.environ["AUTOCOMPRESS_CACHE"] = str(folder)
    images._load("key")


def _losses(folder: Path) -> None:
    rows = [
        {"parameter": "prune/0", "choice": 0.5, "loss": 0.1},
        {"parameter": "dtype/0", "choice": "int8", "loss": None},
    ]
    (folder / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_losses(folder: Path) -> None:
    cache = object.__new__(SensitivityCache)
    cache.path = folder / "losses.jsonl"
    cache.read()


def _note(folder: Path) -> None:
    os.environ["AUTOCOMPRESS_CACHE"] = str(folder)
    remember(folder, ("task a:b",))
    next((folder / "trusted_runs").iterdir()).rename(folder / "note.json")


def _read_note(folder: Path) -> None:
    os.environ["AUTOCOMPRESS_CACHE"] = str(folder)
    remember(folder, ("task a:b",))
    note = next((folder / "trusted_runs").iterdir())
    note.write_bytes((folder / "note.json").read_bytes())
    trust_of(folder)


def _encoder(folder: Path) -> None:
    write_json(
        folder / "modules.json",
        [{"idx": 0, "path": "", "type": "x.Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "x.Pooling"},
         {"idx": 2, "path": "2_Dense", "type": "x.Dense"}],
    )  # fmt: skip
    (folder / "1_Pooling").mkdir()
    (folder / "2_Dense").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True})
    write_json(folder / "2_Dense" / "config.json", {"in_features": 8, "out_features": 4, "bias": True})
    save_file(
        {"linear.weight": torch.zeros(4, 8), "linear.bias": torch.zeros(4)}, folder / "2_Dense" / "model.safetensors"
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 16})


def _read_encoder(folder: Path) -> None:
    longest_text(folder)
    sentence_encoder("Task", folder, torch.nn.Identity())


def _copied(source: Path, name: str) -> Callable[[Path], None]:
    return lambda folder: (shutil.copyfile(source, folder / name), None)[1]


def _written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


_BEST = EARLIER / "run" / "best"
(_TABLE,) = (EARLIER / "tables").glob("*/*.csv")
_CONFIG = b"""task: {name: digits, seed: 1}
engine: openvino
target_latency: 5ms
max_drop: 1pp
recovery: {epochs: 2, distill: [logits]}
"""

REGISTRY = (
    Reader("engine.json", "best/engine.json", "json", _run, lambda f: read_artifact(f / "best")),
    Reader("engine.json, benchmark", "best/engine.json", "json", _run, lambda f: resolve(f, None, EngineOptions())),
    Reader("engine file, hashes", "best/model.onnxruntime.onnx", "bytes", _run, lambda f: read_artifact(f / "best")),
    Reader("record.json", "best/record.json", "json", _run, lambda f: TrialRecord.read(f / "best" / "record.json")),
    Reader("latency.json", "best/latency.json", "json", _run, lambda f: stated(f / "best")),
    Reader(
        "policy.json",
        "best/policy.json",
        "json",
        _run,
        lambda f: CompressionPolicy.from_dict(read_json(f / "best" / "policy.json")).hash,
    ),
    Reader("trials.jsonl", "trials.jsonl", "jsonl", _run, _front),
    Reader("trials.jsonl, shown", "trials.jsonl", "jsonl", _run, _shown, 0.1),
    Reader("baseline record, shown", "baseline/record.json", "json", _run, _shown, 0.1),
    Reader("summary.json, shown", "summary.json", "json", _run, _shown, 0.3),
    Reader("env.json", "env.json", "json", _run, _environment, 0.5),
    Reader("pareto.json", "pareto.json", "json", _run, lambda f: RunDirectory.open(f).read("pareto.json")),
    Reader("offered.json", "offered.json", "json", _run, lambda f: read_offered(RunDirectory.open(f))),
    Reader("tokens.json", "tokens.json", "json", _run, TextTokens.read),
    Reader("config.yaml", "config.yaml", "yaml", _run, lambda f: RunDirectory.open(f).config(), 0.5),
    Reader("trainings.jsonl", "trainings.jsonl", "jsonl", _trainings, _read_trainings),
    Reader("owner", ".owner.json", "json", _owner, _own, 0.5),
    Reader("identity.json", "identity.json", "json", _identity, _read_identity, 0.02),
    Reader("repair", "trials.jsonl", "jsonl", _run, lambda f: repair(RunDirectory.open(f)), 0.1),
    Reader("study.db", "study.db", "bytes", _make_study, _study, 0.02),
    Reader("run file", "run.yaml", "yaml", _written("run.yaml", _CONFIG), lambda f: load_config(f / "run.yaml")),
    Reader(
        "search space",
        "space.yaml",
        "yaml",
        _copied(shipped_spaces()["default"], "space.yaml"),
        lambda f: load_space(str(f / "space.yaml")),
        0.5,
    ),
    Reader("latency table", "t.csv", "csv", _copied(_TABLE, "t.csv"), lambda f: LatencyTable.load(f / "t.csv"), 0.3),
    Reader("sensitivity cache", "losses.jsonl", "jsonl", _losses, _read_losses),
    Reader("note of trust", "note.json", "json", _note, _read_note),
    Reader("image cache, index", "key.json", "json", _cached_images, _load_cached),
    Reader("image cache, array", "key-train-images.npy", "bytes", _cached_images, _load_cached),
    Reader("manifest.json", "manifest.json", "json", _deployed, _manifest, 0.5),
    Reader("graph for scripts", "model.onnx", "bytes", _deployed, _graph, 0.5),
    Reader(
        "OpenVINO header", "m.xml", "bytes", _written("m.xml", _XML.encode()), lambda f: input_ports(f / "m.xml", 1)
    ),
    Reader(
        "reference outputs",
        "r.safetensors",
        "bytes",
        _copied(_BEST / "reference.safetensors", "r.safetensors"),
        lambda f: read_reference(f / "r.safetensors"),
    ),
    Reader(
        "weights",
        "w.safetensors",
        "bytes",
        _copied(_BEST / "weights.safetensors", "w.safetensors"),
        lambda f: read_weights(f / "w.safetensors"),
    ),
    Reader(
        "checkpoint",
        "c.safetensors",
        "bytes",
        lambda f: save_checkpoint(_model(), f / "c.safetensors", 0.5, 3),
        lambda f: load_checkpoint(_model(), f / "c.safetensors"),
    ),
    Reader("packed weights", "w.packed", "packed", _packed, lambda f: read_container(f / "w.packed")),
    Reader("packed weights, bytes", "w.packed", "bytes", _packed, lambda f: read_container(f / "w.packed")),
    Reader("tar", "data.tar", "bytes", lambda f: _tar(f, "w"), _images, 0.5),
    Reader("tar.gz", "data.tar", "bytes", lambda f: _tar(f, "w:gz"), _images, 0.5),
    Reader("sentence encoder, modules", "modules.json", "json", _encoder, _read_encoder, 0.5),
    Reader("sentence encoder, pooling", "1_Pooling/config.json", "json", _encoder, _read_encoder, 0.5),
    Reader("sentence encoder, dense", "2_Dense/config.json", "json", _encoder, _read_encoder, 0.5),
    Reader("sentence encoder, length", "sentence_bert_config.json", "json", _encoder, _read_encoder, 0.5),
)
