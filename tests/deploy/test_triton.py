"""What is generated beside a deployed engine: Triton's model repository and ``run.py``, executed."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from numpy.typing import NDArray
from safetensors.numpy import load_file

from autocompress.deploy.artifacts import input_ports
from autocompress.deploy.manifest import Manifest, describe_file
from autocompress.deploy.run_script import run_script
from autocompress.deploy.triton import write_triton_repository
from autocompress.deploy.verify import REFERENCE_NAME
from autocompress.engines.base import EngineOptions
from autocompress.engines.ports import Port
from autocompress.errors import ConfigError, VerificationError
from autocompress.files import write_json
from autocompress.graph.export import save_onnx, to_onnx
from autocompress.measurement.client import EngineWorker
from autocompress.policy import CompressionPolicy
from autocompress.tasks import Adapter, InputSpec, pack
from autocompress.tasks.tokens import TextTokens
from tests.deploy.conftest import make_onnx
from tests.deploy.triton_schema import model_config


def deployed(folder: Path, worker: EngineWorker, engine: str) -> Path:
    """Make a deployed directory of a CPU engine, without the run that leads there."""
    from safetensors.numpy import save_file

    graph = make_onnx(folder / "model.onnx", 4, 2)
    file = worker.build(engine, graph, EngineOptions("fp32"), folder / "model")
    inputs = np.random.default_rng(1).normal(size=(3, 3, 16, 16)).astype(np.float32)
    save_file({"inputs": inputs, "outputs": worker.infer(file, inputs)}, folder / REFERENCE_NAME)
    policy = CompressionPolicy()
    files = {p.name: describe_file(p) for p in (*file.files(), graph, folder / REFERENCE_NAME)}
    manifest = Manifest(
        1, "2026-01-01T00:00:00+00:00", None, engine, "1.0", file.options.to_dict(), file.path.name, files,
        policy.to_dict(), policy.hash, 1, "proxy", None, None, None, None, {}, file.size_bytes, {},
    )  # fmt: skip
    (folder / "run.py").write_text(run_script(manifest, [Port("input", (1, 3, 16, 16), np.float32)]))
    manifest.write(folder)
    return folder


def parsed(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config())


@pytest.mark.parametrize(
    ("engine", "files"),
    [("openvino", {"model.xml", "model.bin"}), ("onnxruntime", {"model.onnx"})],
)
def test_a_repository_of_a_cpu_engine(tmp_path: Path, worker: EngineWorker, engine: str, files: set[str]) -> None:
    folder = deployed(tmp_path / "deployed", worker, engine)
    model = write_triton_repository(folder, tmp_path / "models", "digits")
    assert {p.name for p in (model / "1").iterdir()} == files
    config = parsed(model)
    assert (config.name, config.backend, config.max_batch_size) == ("digits", engine, 0)
    assert config.default_model_filename in files
    assert [(i.name, list(i.dims)) for i in config.input] == [("inputs", [1, 3, 16, 16])]
    assert [(o.name, list(o.dims)) for o in config.output] == [("outputs", [1, 10])]
    assert config.instance_group[0].kind == 2
    assert "1" in {p.value.string_value for p in config.parameters}
    assert not config.HasField("dynamic_batching")
    # What Triton opens is what was measured.
    inputs = load_file(folder / REFERENCE_NAME)
    served = replace(Manifest.read(folder).engine_file(folder), path=model / "1" / config.default_model_filename)
    np.testing.assert_array_equal(worker.infer(served, inputs["inputs"]), inputs["outputs"])


def test_a_tensorrt_engine_with_a_dynamic_batch(tmp_path: Path, worker: EngineWorker) -> None:
    folder = deployed(tmp_path / "deployed", worker, "onnxruntime")
    engine, described = folder / "model.trt.engine", folder / "model.trt.json"
    engine.write_bytes(b"an engine that only a GPU could have built")
    write_json(described, {"batch": [1, 2, 8]})
    manifest = Manifest.read(folder)
    files = {**manifest.files, engine.name: describe_file(engine)}
    replace(manifest, engine="tensorrt", file=engine.name, files=files).write(folder)
    model = write_triton_repository(folder, tmp_path / "models")
    config = parsed(model)
    assert (config.backend, config.max_batch_size, config.instance_group[0].kind) == ("tensorrt", 8, 1)
    assert list(config.input[0].dims) == [3, 16, 16]
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 8]
    assert (model / "1" / "model.plan").read_bytes() == engine.read_bytes()
    assert [p.name for p in (model / "1").iterdir()] == ["model.plan"]


def test_what_cannot_be_served(tmp_path: Path, worker: EngineWorker) -> None:
    folder = deployed(tmp_path / "deployed", worker, "onnxruntime")
    write_triton_repository(folder, tmp_path / "models")
    with pytest.raises(ConfigError, match="already there"):
        write_triton_repository(folder, tmp_path / "models")
    with pytest.raises(ConfigError, match="letters, digits"):
        write_triton_repository(folder, tmp_path / "models", "../up")
    replace(Manifest.read(folder), engine="tensorrt-rtx").write(folder)
    with pytest.raises(ConfigError, match="no backend for tensorrt-rtx"):
        write_triton_repository(folder, tmp_path / "others")
    replace(Manifest.read(folder), engine="onnxruntime").write(folder)
    (folder / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(VerificationError, match="damaged"):
        write_triton_repository(folder, tmp_path / "others")
    assert not (tmp_path / "others").exists()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_run_py_answers_without_autocompress(tmp_path: Path, worker: EngineWorker, engine: str) -> None:
    folder = deployed(tmp_path / "deployed", worker, engine)
    reference = load_file(folder / REFERENCE_NAME)
    np.save(tmp_path / "in.npy", reference["inputs"])
    text = (folder / "run.py").read_text()
    assert len(text.splitlines()) <= 40
    roots = {n.name.partition(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)
             for n in node.names}  # fmt: skip
    assert roots - {"os"} == {"sys", "numpy", engine}
    # -I: neither this directory nor PYTHONPATH can help it.
    command = [sys.executable, "-I", str(folder / "run.py"), str(tmp_path / "in.npy"), str(tmp_path / "out.npy")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
    assert "(3, 10) float32" in said.stdout
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), reference["outputs"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_run_py_of_tensorrt_is_whole(tmp_path: Path, worker: EngineWorker, engine: str) -> None:
    folder = deployed(tmp_path / "deployed", worker, "onnxruntime")
    script = run_script(
        replace(Manifest.read(folder), engine=engine, file="model.engine"), [Port("input", (2, 3, 16, 16), np.float32)]
    )
    compile(script, "run.py", "exec")
    assert f"import {engine.replace('-', '_')} as trt" in script
    assert "(2, 3, 16, 16)" in script
    assert "{" not in script.replace("{status.name}", "")


def test_run_py_of_rtx_stops_at_the_driver(tmp_path: Path, worker: EngineWorker) -> None:
    pytest.importorskip("tensorrt_rtx")
    from tests.engines.tensorrt.test_engine import has_gpu

    if has_gpu():
        pytest.skip("there is a GPU here")
    folder = deployed(tmp_path / "deployed", worker, "onnxruntime")
    script = folder / "run.py"
    script.write_text(
        run_script(replace(Manifest.read(folder), engine="tensorrt-rtx"), [Port("input", (1, 3, 16, 16), np.float32)])
    )
    said = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 1
    assert "cudaErrorInsufficientDriver" in said.stderr
    assert "nvidia-smi" in said.stderr


# -- several inputs, and sentences ------------------------------------------------------------------------------------

WORDS = {"[PAD]": 0, "[UNK]": 1, "a": 2, "cat": 3, "dog": 4, "sleeps": 5}


def of_texts(folder: Path, worker: EngineWorker, engine: str, *, tokenizer: bool) -> tuple[Path, NDArray[np.float32]]:
    """Make a deployed directory of a network of ids and mask, and return it with what the network gives three texts."""
    tokenizers = pytest.importorskip("tokenizers")
    specs = (InputSpec("input_ids", (4,), "int64"), InputSpec("attention_mask", (4,), "int64"))
    torch.manual_seed(0)
    model = Adapter(Texts(), specs).eval()
    ids = torch.tensor([[2, 3, 5, 0], [2, 4, 0, 0], [1, 3, 2, 4]])
    packed = pack({"input_ids": ids, "attention_mask": (ids > 0).long()}, specs)
    folder.mkdir(parents=True)
    save_onnx(to_onnx(model, packed[:1]), folder / "model.onnx")
    file = worker.build(engine, folder / "model.onnx", EngineOptions("fp32"), folder / "model")
    manifest = Manifest(
        1, "2026-01-01T00:00:00+00:00", None, engine, "1.0", file.options.to_dict(), file.path.name, {},
        CompressionPolicy().to_dict(), CompressionPolicy().hash, 1, "proxy", None, None, None, None, {},
        file.size_bytes, {},
    )  # fmt: skip
    text = None
    if tokenizer:
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))
        text = TextTokens(folder / "tokenizer.json", 4)
    (folder / "run.py").write_text(run_script(manifest, input_ports(folder / "model.onnx", 1), text))
    return folder, model(packed).detach().numpy()


class Texts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(6, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        weight = attention_mask[..., None].float()
        return (self.table(input_ids) * weight).sum(1) / weight.sum(1)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_run_py_takes_named_inputs_packed_ones_and_sentences(tmp_path: Path, worker: EngineWorker, engine: str) -> None:
    folder, expected = of_texts(tmp_path / "deployed", worker, engine, tokenizer=True)
    ids = np.array([[2, 3, 5, 0], [2, 4, 0, 0], [1, 3, 2, 4]])
    np.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=ids > 0)
    np.save(tmp_path / "in.npy", np.concatenate([ids, ids > 0], 1).astype(np.float32))
    for given in ([str(tmp_path / "in.npz")], [str(tmp_path / "in.npy")], ["a cat sleeps", "a dog", "what cat a dog"]):
        command = [sys.executable, "-I", str(folder / "run.py"), *given, str(tmp_path / "out.npy")]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert said.returncode == 0, said.stderr
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-5, atol=1e-6)
        (tmp_path / "out.npy").unlink()
    said = subprocess.run(
        [sys.executable, str(folder / "run.py")], capture_output=True, text=True, timeout=60, check=False
    )
    assert "(1, 5) float32" in said.stdout
    # As a module of the user's service.
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.load()
    np.testing.assert_allclose(run({"input_ids": ids[:1], "attention_mask": ids[:1] > 0}), expected[:1], rtol=1e-5)
    np.testing.assert_allclose(run(np.load(tmp_path / "in.npy")[:1]), expected[:1], rtol=1e-5)


def test_run_py_without_a_tokenizer_names_what_it_takes(tmp_path: Path, worker: EngineWorker) -> None:
    folder, _ = of_texts(tmp_path / "deployed", worker, "onnxruntime", tokenizer=False)
    command = [sys.executable, str(folder / "run.py"), "a cat sleeps"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 1 and "Give a .npz file of input_ids, attention_mask." in said.stderr


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_run_py_of_tensorrt_with_several_inputs_is_whole(tmp_path: Path, worker: EngineWorker, engine: str) -> None:
    folder = deployed(tmp_path / "deployed", worker, "onnxruntime")
    ports = [Port("ids", (2, 4), np.int64), Port("values", (2, 3), np.float32)]
    script = run_script(replace(Manifest.read(folder), engine=engine, file="model.engine"), ports)
    compile(script, "run.py", "exec")
    assert "context.set_input_shape(name, (2, *shape))" in script and "arrays[2].copy()" in script


def test_ports_of_both_kinds_of_file(tmp_path: Path, worker: EngineWorker) -> None:
    folder, _ = of_texts(tmp_path / "deployed", worker, "openvino", tokenizer=False)
    for name in ("model.onnx", "model.xml"):
        ports = input_ports(folder / name, 1)
        assert [(p.name, p.shape, np.dtype(p.dtype).name) for p in ports] == [
            ("input_ids", (1, 4), "int64"),
            ("attention_mask", (1, 4), "int64"),
        ]
