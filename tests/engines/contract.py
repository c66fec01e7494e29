"""What every engine must do. Subclass `EngineContract` with an `engine` fixture."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from autocompress.compress.quantization import QuantizationRange
from autocompress.engines import ENGINES, Engine, EngineFile, EngineOptions
from autocompress.errors import BuildError, UnavailableError, UnsupportedDtypeError
from autocompress.graph.export import save_onnx
from autocompress.graph.qdq import insert_qdq
from tests.engines import graphs

FP32 = EngineOptions()


class EngineContract:
    """Inherited by one test class per engine."""

    @pytest.fixture
    def engine(self) -> Engine:
        raise NotImplementedError

    @pytest.fixture
    def built(self, engine: Engine, tmp_path: Path) -> EngineFile:
        return engine.build(graphs.convnet(tmp_path / "model.onnx"), FP32, tmp_path / "model.onnx")

    def test_is_registered_and_says_what_it_is(self, engine: Engine) -> None:
        assert ENGINES[engine.name] is type(engine)
        assert engine.version()[0].isdigit()
        assert engine.device()
        assert engine.suffix.startswith(".")

    def test_runs_fp32_and_lists_dense_dtypes_first(self, engine: Engine) -> None:
        dtypes = list(engine.capabilities())
        assert dtypes[0] == "fp32"
        assert dtypes == sorted(dtypes, key=lambda dtype: dtype not in ("fp32", "bf16", "fp16"))

    def test_file_lies_beside_its_graph_and_counts_its_bytes(self, engine: Engine, built: EngineFile) -> None:
        graph = built.path.with_name("model.onnx")
        assert graph.exists()
        assert built.path.name.endswith(engine.suffix)
        assert graph not in built.files()
        assert built.size_bytes == sum(p.stat().st_size for p in built.files()) > 1000
        assert {p.name for p in built.path.parent.iterdir()} == {graph.name, *(p.name for p in built.files())}

    def test_computes_what_the_graph_says(self, engine: Engine, built: EngineFile) -> None:
        with engine.open(built) as runner:
            for seed in (1, 2):
                inputs = graphs.images(1, seed=seed)
                outputs = runner.infer(inputs)
                assert outputs.dtype == np.float32
                np.testing.assert_allclose(outputs, graphs.reference(inputs), rtol=1e-4, atol=1e-4)

    def test_outputs_are_the_callers(self, engine: Engine, built: EngineFile) -> None:
        with engine.open(built) as runner:
            first = runner.infer(graphs.images(1, seed=1))
            kept = first.copy()
            runner.infer(graphs.images(1, seed=2))
        np.testing.assert_array_equal(first, kept)

    def test_run_needs_no_inputs_after_prepare(self, engine: Engine, built: EngineFile) -> None:
        with engine.open(built) as runner:
            inputs = graphs.images(1)
            runner.prepare(inputs)
            inputs[:] = np.nan  # the runner has its own copy
            runner.run()
            runner.run()

    def test_built_file_is_alone_enough(self, engine: Engine, built: EngineFile, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for path in built.files():
            shutil.copy(path, elsewhere)
        moved = EngineFile(engine.name, elsewhere / built.path.name, FP32)
        with engine.open(moved) as runner:
            inputs = graphs.images(1)
            np.testing.assert_allclose(runner.infer(inputs), graphs.reference(inputs), rtol=1e-4, atol=1e-4)

    def test_external_weights_are_drawn_in(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.external(tmp_path / "source" / "model.onnx")
        built = engine.build(graph, FP32, tmp_path / "built" / "model")
        shutil.rmtree(tmp_path / "source")
        with engine.open(built) as runner:
            inputs = graphs.images(1)
            np.testing.assert_allclose(runner.infer(inputs), graphs.reference(inputs), rtol=1e-4, atol=1e-4)

    def test_opens_a_plain_onnx_file(self, engine: Engine, tmp_path: Path) -> None:
        file = EngineFile(engine.name, graphs.convnet(tmp_path / "model.onnx"), FP32)
        with engine.open(file) as runner:
            inputs = graphs.images(1)
            np.testing.assert_allclose(runner.infer(inputs), graphs.reference(inputs), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("batch", [4, "N"])
    def test_batch_axis_is_fixed(self, engine: Engine, tmp_path: Path, batch: int | str) -> None:
        graph = graphs.convnet(tmp_path / "model.onnx", batch=batch)
        built = engine.build(graph, EngineOptions(batch_size=4), tmp_path / "model")
        inputs = graphs.images(4)
        with engine.open(built) as runner:
            np.testing.assert_allclose(runner.infer(inputs), graphs.reference(inputs), rtol=1e-4, atol=1e-4)
            with pytest.raises(BuildError, match=r"\(4, 3, 16, 16\), not \(3, 3, 16, 16\)"):
                runner.infer(inputs[:3])

    def test_opens_a_dynamic_onnx_file(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.convnet(tmp_path / "model.onnx", batch="N")
        with engine.open(EngineFile(engine.name, graph, EngineOptions(batch_size=2))) as runner:
            assert runner.infer(graphs.images(2)).shape == (2, graphs.CLASSES)

    def test_another_batch_size_is_refused(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.convnet(tmp_path / "model.onnx", batch=2)
        with pytest.raises(BuildError, match="batch size is 2, but 4"):
            engine.build(graph, EngineOptions(batch_size=4), tmp_path / "model")

    def test_several_inputs_travel_as_one_array_and_keep_their_dtypes(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.lookup(tmp_path / "model.onnx", batch=2)
        ids, values = graphs.lookup_inputs(2)
        packed = np.concatenate([ids, values], axis=1).astype(np.float32)
        for dtype in (dtype for dtype in engine.capabilities() if dtype in ("fp32", "bf16", "fp16")):
            file = engine.build(graph, EngineOptions(dtype, batch_size=2), tmp_path / dtype)
            with engine.open(file) as runner:
                # Ids above 2,048 are no numbers of half precision: a neighbour's row would be far off.
                np.testing.assert_allclose(runner.infer(packed), graphs.looked_up(ids, values), rtol=0.02, atol=0.02)
                with pytest.raises(
                    BuildError, match=r"ids \(2, 4\) of int64, values \(2, 3\) of float32, packed as \(2, 7\)"
                ):
                    runner.infer(packed[:, 1:])
                assert runner.time_request(packed, time.perf_counter_ns) > 0
            assert engine.kernel_times(file, packed, 0.05)

    def test_an_input_that_nothing_reads_is_taken(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.convnet(tmp_path / "model.onnx", inputs=2)
        images = graphs.images(1)
        with engine.open(engine.build(graph, FP32, tmp_path / "model")) as runner:
            found = runner.infer(np.concatenate([images.reshape(1, -1)] * 2, axis=1))
        np.testing.assert_allclose(found, graphs.reference(images), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_threads(self, engine: Engine, built: EngineFile, threads: int) -> None:
        inputs = graphs.images(1)
        with engine.open(built, threads=threads) as runner:
            np.testing.assert_allclose(runner.infer(inputs), graphs.reference(inputs), rtol=1e-4, atol=1e-4)

    def test_quantized_graph_runs(self, engine: Engine, tmp_path: Path) -> None:
        if "int8" not in engine.capabilities():
            pytest.skip("no int8 here")
        built = engine.build(graphs.quantized(tmp_path / "model.onnx"), FP32, tmp_path / "model")
        inputs = graphs.images(1)
        with engine.open(built) as runner:
            np.testing.assert_allclose(runner.infer(inputs), graphs.reference(inputs), atol=0.1)

    def test_every_dense_dtype_runs_and_others_are_refused(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.convnet(tmp_path / "model.onnx")
        inputs = graphs.images(1)
        for dtype in ("fp32", "bf16", "fp16", "fp8_e4m3", "int8"):
            options = EngineOptions(dtype)
            if dtype in engine.capabilities() and dtype != "int8":
                with engine.open(engine.build(graph, options, tmp_path / dtype)) as runner:
                    np.testing.assert_allclose(runner.infer(inputs), graphs.reference(inputs), atol=0.1)
                continue
            with pytest.raises(UnsupportedDtypeError, match=f"{dtype!r}.*fp32"):
                engine.build(graph, options, tmp_path / dtype)
            with pytest.raises(UnsupportedDtypeError, match=dtype):
                engine.open(EngineFile(engine.name, graph, options))

    def test_unknown_op_is_refused_in_the_runtimes_words(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.convnet(tmp_path / "model.onnx", activation="Flurb")
        with pytest.raises(BuildError, match=r"Flurb") as caught:
            engine.build(graph, FP32, tmp_path / "out" / "model")
        assert str(graph) in str(caught.value)
        assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["model.onnx"]

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
    def test_damaged_file_is_refused(self, engine: Engine, built: EngineFile, keep: float) -> None:
        for path in built.files():
            data = path.read_bytes()
            path.write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(BuildError, match="model"), engine.open(built):
            pass

    def test_missing_file_is_refused(self, engine: Engine, tmp_path: Path) -> None:
        with (
            pytest.raises(BuildError, match="nowhere"),
            engine.open(EngineFile(engine.name, tmp_path / "nowhere", FP32)),
        ):
            pass
        with pytest.raises(BuildError, match="nowhere"):
            engine.build(tmp_path / "nowhere.onnx", FP32, tmp_path / "model")

    def test_device_is_touched_only_inside_the_context(self, engine: Engine, built: EngineFile) -> None:
        runner = engine.open(built)
        with pytest.raises(BuildError, match="not open"):
            runner.infer(graphs.images(1))
        with runner:
            runner.infer(graphs.images(1))
        with pytest.raises(BuildError, match="not open"):
            runner.infer(graphs.images(1))

    # -- times of kernels ---------------------------------------------------------------------------------------------

    def test_kernels_name_their_nodes(self, engine: Engine, tmp_path: Path) -> None:
        built = engine.build(graphs.residual(tmp_path / "model.onnx"), FP32, tmp_path / "model")
        kernels = engine.kernel_times(built, graphs.images(1), 0.05)
        convolutions = [k.nodes for k in kernels if "Conv" in k.op]
        # Fused as every engine does: activations, and the sum with what the convolution makes.
        assert convolutions == [
            ("n_stem", "n_stem_relu"),
            ("n_left", "n_left_relu"),
            ("n_right", "n_sum", "n_sum_relu"),
            ("n_tail", "n_tail_relu"),
        ]
        for kernel in kernels:
            assert kernel.op
            assert kernel.kernel
            assert kernel.dtype == "fp32"
            assert 0 <= kernel.time_ms < 1000
            assert kernel.n > 5
        # A node that makes an output may go by the output's name.
        assert {"head", "output"} & set(kernels[-1].nodes)

    def test_nodes_without_names_go_by_their_output(self, engine: Engine, tmp_path: Path) -> None:
        built = engine.build(graphs.residual(tmp_path / "model.onnx", named=False), FP32, tmp_path / "model")
        kernels = engine.kernel_times(built, graphs.images(1), 0)
        assert [k.nodes for k in kernels if "Conv" in k.op] == [
            ("stem", "stem_relu"),
            ("left", "left_relu"),
            ("right", "sum", "sum_relu"),
            ("tail", "tail_relu"),
        ]

    def test_more_work_takes_longer(self, engine: Engine, tmp_path: Path) -> None:
        graph = graphs.residual(tmp_path / "model.onnx", channels=64, size=32)
        times = engine.kernel_times(engine.build(graph, FP32, tmp_path / "model"), graphs.images(1, size=32), 0.2)
        of = {name: kernel.time_ms for kernel in times for name in kernel.nodes}
        # 3 channels to 64, against 64 to 64.
        assert 0 < of["n_stem"] < of["n_left"]

    def test_int8_convolution_names_its_qdq(self, engine: Engine, tmp_path: Path) -> None:
        if "int8" not in engine.capabilities():
            pytest.skip("no int8 here")
        graph = ir.load(graphs.residual(tmp_path / "plain.onnx"))
        insert_qdq(graph, {name: QuantizationRange(0.05, signed=False) for name in ("left", "right")}, engine.name)
        save_onnx(graph, tmp_path / "model.onnx")
        built = engine.build(tmp_path / "model.onnx", FP32, tmp_path / "model")
        (left,) = (k for k in engine.kernel_times(built, graphs.images(1), 0) if "n_left" in k.nodes)
        assert left.dtype == "int8"
        assert {"n_left", "n_left_relu"} < set(left.nodes)
        ops = {node.name: node.op_type for node in graph.graph}
        assert {ops[name] for name in left.nodes} == {"Conv", "Relu", "QuantizeLinear", "DequantizeLinear"}

    def test_profiling_leaves_nothing_behind(
        self,
        engine: Engine,
        built: EngineFile,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        monkeypatch.chdir(tmp_path / "temporary")
        before = {path: path.read_bytes() for path in built.files()}
        engine.kernel_times(built, graphs.images(1), 0)
        assert list((tmp_path / "temporary").iterdir()) == []
        assert {path: path.read_bytes() for path in built.files()} == before
        assert capfd.readouterr() == ("", "")

    def test_what_cannot_be_profiled_is_refused(self, engine: Engine, built: EngineFile, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match=r"\(1, 3, 16, 16\), not \(1, 3, 8, 8\)"):
            engine.kernel_times(built, graphs.images(1, size=8), 0)
        with pytest.raises(BuildError, match="nowhere"):
            engine.kernel_times(EngineFile(engine.name, tmp_path / "nowhere", FP32), graphs.images(1), 0)
        built.path.write_bytes(built.path.read_bytes()[:100])
        with pytest.raises(BuildError, match="model"):
            engine.kernel_times(built, graphs.images(1), 0)

    def test_an_engine_that_does_not_tell_says_so(self, engine: Engine, built: EngineFile) -> None:
        with pytest.raises(UnavailableError, match=f"{engine.name}.*single kernels"):
            Engine.kernel_times(engine, built, graphs.images(1), 0)
