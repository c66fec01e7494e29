"""A table of a small network with a real engine: what is written, held out, resumed, refused and interrupted."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.compress import rewrite
from autocompress.compress.shapes import network_shape
from autocompress.config import RunConfig
from autocompress.engines.base import EngineFile
from autocompress.engines.kernel_attribution import KernelTime
from autocompress.errors import BuildError, ConfigError, TableMismatchError, UnavailableError
from autocompress.evaluation import profiler
from autocompress.evaluation.profiler import Profile, Profiler, random_choices
from autocompress.graph.builder import GraphBuilder
from autocompress.measurement.client import EngineWorker
from autocompress.measurement.protocol import Protocol
from autocompress.model.inventory import take_inventory
from autocompress.prediction.predictor import LEAST_NETWORKS, LatencyPredictor, PredictionError
from autocompress.prediction.profile import layer_times, observations, open_predictor, open_profile, predictor_from
from autocompress.prediction.table import LatencyTable, table_path
from autocompress.runs.observer import Observer
from autocompress.runs.records import Measurement
from autocompress.tasks.base import Task
from autocompress.tasks.classification import ClassificationTask
from tests import networks
from tests.prediction.made_up import SPACE

pytest.importorskip("openvino")

EVERYTHING = """
pruning: {ratios: [0, 0.25, 0.5]}
rank: {ratios: [1.0, 0.5]}
dtype: {choices: [dense, int8]}
blocks: {remove: true}
"""


class Net(nn.Module):
    """A stem, two blocks with identity shortcuts and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(networks.BasicBlock(16, 16), networks.BasicBlock(16, 16))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(functional.relu(self.stem(x))).mean((2, 3)))


def make_task() -> Task:
    x, y = networks.images(32, 16), torch.arange(32) % 4
    return ClassificationTask(networks.randomize(Net()), (x, y), (x, y), name="small", calibration_size=16)


def brief(cls: type[Protocol], **_: Any) -> Protocol:
    return cls(
        warm_up_s=0.002, min_iterations=10, min_seconds=0.004, max_seconds=0.004, rounds=3, noise_limit=10, patience_s=0
    )


@pytest.fixture(autouse=True, scope="module")
def _brief() -> Iterator[None]:
    """Timing is cut short: the protocol has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Protocol, "quick", classmethod(brief))
        patch.setattr(profiler, "_KERNEL_SECONDS", 0.01)
        yield


@dataclass
class Told(Observer):
    stages: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, fraction: float, text: str = "") -> None:
        self.shares.append(fraction)


class Worker(EngineWorker):
    """The real worker, which can be told to fail; the baseline alone is always measured."""

    refuses: Any = staticmethod(lambda asked: None)
    version: str | None = None
    tells = True

    def __init__(self) -> None:
        super().__init__(time_limit_s=60)
        self.asked = 0

    def describe(self, engine: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        found = super().describe(engine, settings)
        return {**found, "version": self.version or found["version"]}

    def measure(self, files: Any, inputs: Any, *args: Any, **kwargs: Any) -> list[Measurement]:
        if files[-1].path.name.startswith("network-"):
            self.asked += 1
            if (error := self.refuses(self.asked)) is not None:
                raise error
        return super().measure(files, inputs, *args, **kwargs)

    def profile(self, file: EngineFile, inputs: Any, **kwargs: Any) -> list[KernelTime]:
        if not self.tells:
            self.asked_kernels = getattr(self, "asked_kernels", 0) + 1
            raise UnavailableError("it does not tell")
        return super().profile(file, inputs, **kwargs)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as made:
        yield made


@pytest.fixture
def told() -> Told:
    return Told()


def config(folder: Path, space: str = EVERYTHING, **changes: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(space)
    return RunConfig(**{"space": str(folder / "space.yaml"), "dense_dtype": "fp32", **changes})


def profile(
    worker: Worker, folder: Path, networks: int | None = None, seconds: float = 120, told: Told | None = None,
    **changes: Any,
) -> Profile:  # fmt: skip
    profiler = Profiler(make_task(), config(folder, **changes), worker, folder=folder, observer=told, name="small net")
    try:
        return profiler.run(seconds, networks)
    finally:
        profiler.close()


COUNT = LEAST_NETWORKS * 4 // 3 + 4


@pytest.fixture(scope="module")
def whole(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Told]:
    """A table large enough to predict from. Read only."""
    told = Told()
    return profile(worker, tmp_path_factory.mktemp("whole"), COUNT, told=told), told


# -- what is written --------------------------------------------------------------------------------------------------


def test_every_network_is_in_the_file_and_every_fourth_is_held_out(whole: tuple[Profile, Told]) -> None:
    found, told = whole
    assert found.added == found.networks == COUNT
    path = found.table.path
    assert path is not None and path.name == "openvino.csv"
    again = LatencyTable.load(path)
    assert (again.networks, again.layers) == (found.table.networks, found.table.layers)
    assert [row.held_out for row in again.networks] == [i % 4 == 3 for i in range(COUNT)]
    assert len({row.policy for row in again.networks}) == COUNT
    for row in again.networks:
        assert row.ok and row.network == found.network and row.name == "small net" and row.measured_at
        assert row.ratio_low <= row.ratio <= row.ratio_high and row.macs > 0
    assert told.stages[-1] == "Profiling" and told.warnings == []
    assert told.shares == sorted(told.shares) and told.shares[-1] == 1.0


def test_layers_of_measured_networks_are_in_it_and_held_out_ones_teach_nothing(whole: tuple[Profile, Told]) -> None:
    found, _ = whole
    rows = found.table.layers
    # A layer is in the file before its network: which network it is of shows by the order alone.
    assert {row.layer for row in rows} == set(found.predictor.layout.inventory.layers)
    learned = sum(not row.held_out for row in found.table.networks)
    most = Counter(row.layer for row in rows).most_common(1)[0][1]
    assert 0 < most <= learned
    slowest = max(row.latency_ms for row in found.table.networks)
    assert all(0 < row.time_ms <= slowest and row.n >= 1 for row in rows)
    assert {row.dtype for row in rows} == {"fp32", "int8"} and {row.dense_dtype for row in rows} == {"fp32"}
    assert {len(row.ranks) for row in rows} >= {0, 2}
    assert found.predictor.size == 1 + learned
    units = {unit for row in found.table.networks for unit in found.predictor.layout.units(row.policy)}
    assert {time.unit for time in layer_times(rows, found.table.networks, found.predictor.layout)} <= units


def test_the_error_is_that_of_the_held_out_networks(whole: tuple[Profile, Told]) -> None:
    found, _ = whole
    assert found.predictor.ready and found.error is not None
    assert [row for row, _ in found.predictions] == [row for row in found.table.networks if row.held_out]
    measured = [row.ratio for row, _ in found.predictions]
    assert found.error == PredictionError.of([p for _, p in found.predictions], measured)
    # This short a measurement is no judge of the predictor; that it knows something shows all the same.
    assert found.error.mape < 0.5
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["networks"] == data["added"] == COUNT and data["unsupported"] == 0
    assert data["held_out_error"]["n"] == COUNT // 4 and data["leave_one_out_error"]["n"] == 1 + COUNT - COUNT // 4
    assert data["baseline_ms"] > 0 and data["seconds"] > 0 and data["network"] == found.network


def test_a_search_learns_from_all_of_it(whole: tuple[Profile, Told]) -> None:
    found, _ = whole
    layout = found.predictor.layout
    made = predictor_from(found.table, layout, "fp32")
    assert made.size == 1 + COUNT and made.ready
    assert predictor_from(found.table, layout, "bf16").size == 1


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_second_call_goes_on_and_measures_nothing_twice(worker: Worker, tmp_path: Path) -> None:
    first = profile(worker, tmp_path, 5)
    assert (first.added, first.networks, first.error) == (5, 5, None)
    assert first.to_dict()["held_out_error"] is None and first.to_dict()["leave_one_out_error"] is None
    second = profile(worker, tmp_path, 9)
    assert (second.added, second.networks) == (4, 9) and second.network == first.network
    assert second.table.networks[:5] == first.table.networks
    assert len({row.policy for row in second.table.networks}) == 9
    assert [row.held_out for row in second.table.networks] == [i % 4 == 3 for i in range(9)]
    assert second.predictor.size == 1 + 7  # the uncompressed network is always known
    third = profile(worker, tmp_path, 9)
    assert (third.added, third.networks) == (0, 9)


def test_no_time_measures_no_network(worker: Worker, tmp_path: Path) -> None:
    found = profile(worker, tmp_path, seconds=0.0)
    assert (found.added, found.networks, found.error) == (0, 0, None)
    assert found.table.path is not None and found.table.path.exists()
    assert found.to_dict()["baseline_ms"] is None


def test_two_models_share_a_file(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = profile(worker, tmp_path, 3)
    monkeypatch.setattr(
        Net, "forward", lambda self, x: self.fc(functional.gelu(self.blocks(self.stem(x))).mean((2, 3)))
    )
    second = profile(worker, tmp_path, 2)
    assert second.network != first.network and second.added == second.networks == 2
    assert len(second.table.networks) == 5 and second.table.path == first.table.path


def test_a_space_that_is_measured_whole_ends(worker: Worker, tmp_path: Path, told: Told) -> None:
    found = profile(worker, tmp_path, told=told, space="blocks: {remove: true}")
    assert found.networks == found.added == 4
    assert told.warnings == ["Every network of the search space has been measured."]


def test_the_table_of_another_version_is_moved_aside(
    worker: Worker, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "version", "1.0")
    first = profile(worker, tmp_path, 2)
    monkeypatch.setattr(worker, "version", "2.0")
    second = profile(worker, tmp_path, 3, told=told)
    assert second.added == second.networks == 3
    (warning,) = told.warnings
    assert "openvino.csv was measured on something else" in warning and "openvino.old-1.csv" in warning
    path = second.table.path
    assert path is not None
    old = LatencyTable.load(path.with_name("openvino.old-1.csv"))
    assert old.engine_version == "1.0" and old.networks == first.table.networks
    assert LatencyTable.load(path).engine_version == "2.0"


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_networks_that_the_engine_refuses_are_noted_and_teach_nothing(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "asked", 0)
    monkeypatch.setattr(
        worker, "refuses", lambda asked: BuildError(f"no such kernel {asked}") if asked % 3 == 1 else None
    )
    found = profile(worker, tmp_path, 7)
    assert [row.ok for row in found.table.networks] == [False, True, True, False, True, True, False]
    refused = [row for row in found.table.networks if not row.ok]
    assert [row.error for row in refused] == [f"no such kernel {n}" for n in (1, 4, 7)]
    assert found.to_dict()["unsupported"] == 3 and found.networks == 7
    assert len(observations(found.table.networks)) == 4 and found.predictor.size == 1 + 4
    assert LatencyTable.load(found.table.path or "").networks[1:3] == found.table.networks[1:3]
    # They are known, and not tried again.
    again = profile(worker, tmp_path, 8)
    assert again.added == 1 and len({row.policy for row in again.table.networks}) == 8


def test_an_engine_that_refuses_everything_ends_it(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "refuses", lambda asked: BuildError("no kernels at all"))
    with pytest.raises(BuildError, match=r"refused 8 networks in a row.*no kernels at all"):
        profile(worker, tmp_path, 20)
    (path,) = tmp_path.glob("*/openvino.csv")
    assert len(LatencyTable.load(path).networks) == 8


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConfigError("disk full")])
def test_an_interrupt_keeps_what_was_measured(
    error: BaseException, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "asked", 0)
    monkeypatch.setattr(worker, "refuses", lambda asked: error if asked == 4 else None)
    with pytest.raises(type(error)):
        profile(worker, tmp_path, 10)
    (path,) = tmp_path.glob("*/openvino.csv")
    kept = LatencyTable.load(path).networks
    assert len(kept) == 3 and all(row.ok for row in kept)
    monkeypatch.setattr(worker, "refuses", lambda asked: None)
    after = profile(worker, tmp_path, 5)
    assert after.added == 2 and after.table.networks[:3] == kept


def test_an_engine_that_does_not_time_kernels_is_asked_once(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "tells", False)
    monkeypatch.setattr(worker, "asked_kernels", 0, raising=False)
    found = profile(worker, tmp_path, 5)
    assert found.added == 5 and found.table.layers == [] and worker.asked_kernels == 1


def test_a_kernel_profiler_that_fails_costs_no_network(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> list[KernelTime]:
        raise BuildError("it crashed")

    monkeypatch.setattr(worker, "profile", fails)
    found = profile(worker, tmp_path, 3)
    assert all(row.ok for row in found.table.networks) and found.table.layers == []


def test_temporary_files_go(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(worker, "refuses", lambda asked: KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        profile(worker, tmp_path, 1)
    assert not list(scratch.glob("autocompress-profile-*"))


def test_a_dtype_that_the_engine_does_not_run_is_named(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = worker.describe("openvino")
    monkeypatch.setattr(worker, "describe", lambda *_: {**real, "capabilities": ["fp32"]})
    with pytest.raises(ConfigError, match=r"'bf16' does not run on openvino \(.*\); it runs fp32\."):
        profile(worker, tmp_path, 1, dense_dtype="bf16")
    with pytest.raises(ConfigError, match="leaves nothing to choose"):
        profile(worker, tmp_path, 1, space="dtype: {choices: [dense, int8]}")


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_drawn_networks_are_of_the_space_and_of_all_amounts() -> None:
    rng = random.Random(0)
    amounts = []
    for _ in range(200):
        choices = random_choices(SPACE, rng)
        assert list(choices) == list(SPACE.parameters)
        assert all(choice in SPACE.parameters[name] for name, choice in choices.items())
        policy = SPACE.policy(choices)
        amounts.append((len(policy.int8_layers), len(policy.pruning)))
        assert network_shape(SPACE._inventory, policy).layers
    for index, most in enumerate((8, 7)):
        counts = Counter(amount[index] for amount in amounts)
        assert counts[0] > 5 and sum(counts[n] for n in counts if n >= most - 2) > 5, counts
    assert [random_choices(SPACE, random.Random(1)) for _ in range(2)] == [random_choices(SPACE, random.Random(1))] * 2


def test_layers_of_another_model_are_left_out(whole: tuple[Profile, Told]) -> None:
    found, _ = whole
    rows = found.table.layers[:3]
    strange = [replace(rows[1], layer="nowhere"), replace(rows[2], policy="0" * 16)]
    # A busy machine may have disturbed any of them, which is not what this is about.
    times = layer_times([rows[0], *strange], found.table.networks, found.predictor.layout, math.inf)
    assert [time.unit.layer for time in times] == [rows[0].layer]
    assert times[0].ratio == pytest.approx(rows[0].time_ms / rows[0].baseline_ms)


# -- used by a search -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphs() -> GraphBuilder:
    base, example = rewrite(make_task().model()), make_task().example_inputs(1)
    return GraphBuilder(base, example, take_inventory(base, example), "openvino")


def opened(
    graphs: GraphBuilder, table: object, told: Told, version: str | None = None, dtype: str = "fp32", **changes: Any
) -> LatencyPredictor | None:
    version = version or LatencyTable.load(str(table)).engine_version
    return open_predictor(graphs, RunConfig(table=str(table), **changes), version, dtype, told)


def test_a_named_table_is_opened(whole: tuple[Profile, Told], graphs: GraphBuilder, told: Told) -> None:
    found = opened(graphs, whole[0].path, told)
    assert found is not None and found.ready and found.size == 1 + COUNT
    assert told.warnings == []
    assert opened(graphs, "none", told, "1.0") is None


def test_a_named_table_that_does_not_fit_is_refused(
    whole: tuple[Profile, Told], graphs: GraphBuilder, told: Told, tmp_path: Path
) -> None:
    path = whole[0].path
    with pytest.raises(TableMismatchError, match=r"0\.1.*--allow-foreign-table"):
        opened(graphs, path, told, version="0.1")
    with pytest.raises(TableMismatchError, match="threads"):
        opened(graphs, path, told, threads=2)
    with pytest.raises(ConfigError, match=r"knows nothing of this model in bf16.*small net"):
        opened(graphs, path, told, dtype="bf16")
    with pytest.raises(ConfigError, match=r"nowhere\.csv"):
        opened(graphs, tmp_path / "nowhere.csv", told, version="1.0")
    found = opened(graphs, path, told, version="0.1", allow_foreign_table=True)
    assert found is not None and found.ready
    assert "another device" in told.warnings[0] and "0.1" in told.warnings[0]


def test_the_users_own_table_is_found(
    whole: tuple[Profile, Told], graphs: GraphBuilder, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = whole
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    empty = opened(graphs, "auto", told, found.table.engine_version)
    assert empty is not None and empty.size == 0
    with pytest.raises(ConfigError, match=r"No latency table knows this model.*autocompress profile"):
        open_profile(graphs, RunConfig())

    device = found.table.device
    path = table_path("openvino", device)
    path.parent.mkdir(parents=True)
    path.write_bytes(found.path.read_bytes())
    full = opened(graphs, "auto", told, found.table.engine_version)
    assert full is not None and full.size == 1 + COUNT and told.warnings == []
    # An engine that was updated: nobody named the table, so the search goes on without it.
    updated = opened(graphs, "auto", told, "0.1")
    assert updated is not None and updated.size == 0
    assert "0.1" in told.warnings[0]
    shown = open_profile(graphs, RunConfig())
    assert (shown.path, shown.added, shown.networks) == (path, 0, COUNT)
    assert shown.error is not None and found.error is not None
    assert shown.error.to_dict() == pytest.approx(found.error.to_dict(), rel=1e-6)
