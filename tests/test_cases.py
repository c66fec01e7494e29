"""The right answer of every case in ``benchmarks/cases``, with both engines, without a search.

Each case is made small and untrained, and walks from the door to one engine file with all of its channels pruned and
all of its layers in int8. The benchmark runs the same cases, trained, through the command line.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from autocompress.cli import main
from autocompress.config import RecoveryConfig
from autocompress.errors import CompressionError, ConfigError
from autocompress.evaluation.evaluator import CandidateEvaluator
from autocompress.exploration.int8_sensitivity import harmful
from autocompress.exploration.sensitivity import SensitivityPass
from autocompress.graph import builder
from autocompress.graph.template import GraphTemplate
from autocompress.measurement.client import EngineWorker
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.recovery import TrainingFreeCompressor
from autocompress.recovery.distillation import Teacher
from autocompress.recovery.finetune import Budget, finetune
from autocompress.runs.time_ledger import TimeLedger
from autocompress.space.search_space import SearchSpace, bind, load_space
from autocompress.tasks import Task, check_task
from benchmarks.cases.making import Plain, few_samples, fit, gratings
from benchmarks.cases.registry import CASES, NOT_BUILT, REFUSED
from benchmarks.kinds.run import Choices, walk_task
from tests.tasks.contract import joined, same

ENGINES = ("openvino", "onnxruntime")
# What is checked of data in these is that they are read as others are: the network is that of "frozen".
SAME_DATA = ("dicts", "numpy labels", "loaders")
TRAINED = ("auxiliary head", "frozen", "global switches", "reparametrized", "regression", "segmentation", "multi-label")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make cases small, import the one with global switches anew, and switch gradients on again after it."""
    monkeypatch.delitem(sys.modules, "benchmarks.cases.global_switches", raising=False)
    with few_samples():
        yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def worker() -> Iterator[EngineWorker]:
    with EngineWorker() as running:
        yield running


def pruned_in_int8(space: SearchSpace) -> Iterator[Choices]:
    """Yield one network: the mildest ratio of every axis, and int8 in every layer."""
    yield {name: offered[1] for name, offered in space.parameters.items() if name.startswith(("prune/", "dtype/"))}


def all_but_the_huge(space: SearchSpace) -> Iterator[Choices]:
    """Yield the same without int8 in the layer that reads the huge channel."""
    yield {name: choice for name, choice in next(pruned_in_int8(space)).items() if name != "dtype/c"}


# -- what a case's own right answer is ---------------------------------------------------------------------------------


def slopes(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    for conv, act in ((model.stem, model.act), (model.blocks[0].c1, model.blocks[0].act), (model.down, model.act2)):
        assert act.weight.numel() == act.num_parameters == conv.out_channels
    assert model.stem.out_channels < 48 and model.down.out_channels < 64


def hand_written_norm(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    for block in model.blocks:
        assert block.widen.out_channels == block.dw.out_channels == block.dw.groups < 96
        assert block.widen.out_channels == 2 * block.mix.in_channels and block.ffn_in.out_channels < 96
        # The stream is named: so its norms and scales keep all of it.
        assert {len(block.n1.gain), block.beta.numel(), block.gamma.numel(), model.intro.out_channels} == {48}


def group_norm(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    task, widths = evaluator.task, set()
    cut = TrainingFreeCompressor(
        evaluator.base, evaluator.inventory, evaluator.scores, task.example_inputs(2), [task.example_inputs(4)],
        reconstruct=False,
    )  # fmt: skip
    for name, offered in space.parameters.items():
        if not name.startswith("prune/"):
            continue
        for ratio in offered[1:]:
            pruned = cut.model(space.policy({name: ratio}))
            norms = [module for module in pruned.modules() if isinstance(module, nn.GroupNorm)]
            assert all(norm.num_channels % norm.num_groups == 0 for norm in norms)
            widths |= {(norm.num_groups, norm.num_channels) for norm in norms}
    assert {(32, 64), (8, 96)} < widths


def parametrized(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    assert not any("parametrizations" in name for name, _ in model.named_modules())
    task = evaluator.task
    inputs = task.example_inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(task.network()(inputs), task.model()(inputs), rtol=1e-4, atol=1e-5)
    assert model.a.out_channels < 48 and model.mid.out_features < 64


def depthwise_multiplier(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    for conv, before in ((model.dw, model.stem), (model.dw3, model.pw)):
        assert conv.groups == conv.in_channels == before.out_channels
    assert model.pw2.out_channels < 64


def broadcast_mask(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    assert model.mask[2].out_channels == 1 and model.a.out_channels == model.na.num_features
    assert model.cond.out_features == 2 * model.b.out_channels and model.mask[0].out_channels < 16


def pixel_shuffle(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    assert (model.wide.out_channels, model.narrow.in_channels, model.stem.in_channels) == (64, 16, 12)
    assert model.stem.out_channels < 48 and model.narrow.out_channels < 48


def backbone_without_gradients(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    assert (model.backbone[0].out_channels, model.backbone[3].out_channels) == (48, 64)


def grouped_query_attention(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    for layer in model.layers:
        assert (layer.attn.q_proj.out_features, layer.attn.k_proj.out_features) == (64, 32)
        assert layer.gate_proj.out_features == layer.up_proj.out_features == layer.down_proj.in_features < 192


def dead_and_huge_channels(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    with torch.no_grad():
        assert torch.isfinite(model(evaluator.task.example_inputs(8))).all()
    with pytest.raises(CompressionError, match="its features have become zero"):
        evaluator.compress(CompressionPolicy(layers={"c": LayerPolicy("int8")}), TimeLedger())
    layers = bind(load_space("quantize-only"), evaluator.base, evaluator.inventory, "fp32", evaluator.capabilities)
    measuring = SensitivityPass(
        evaluator.base,
        evaluator.inventory,
        evaluator.scores,
        evaluator.task,
        layers,
        compressor=evaluator.compressor,
    )
    made = measuring.int8()
    assert made is not None
    assert (made[0].layers, made[1]["c"]) == (("a", "b", "fc"), math.inf)
    assert harmful(made[0], made[1], 0.25 * made[0].together())[0] == "c"
    losses = {name: choices["int8"] for name, choices in measuring.run().losses.items()}
    assert all(math.isfinite(loss) for loss in losses.values())
    assert all(losses["dtype/c"] >= 2 * loss for name, loss in losses.items() if name != "dtype/c")


def pruning_masks(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    network = evaluator.task.network()
    for layer in (network.b, network.c):
        assert isinstance(layer, nn.Conv2d) and float((layer.weight == 0).float().mean()) >= 0.5
        assert dict(layer.named_buffers()) == {}


def plain(evaluator: CandidateEvaluator, space: SearchSpace, model: Any) -> None:
    assert type(model) is Plain and (model.a.out_channels < 48, model.c.out_channels < 64) == (True, True)


Look = Callable[[CandidateEvaluator, SearchSpace, Any], None]
OWN: Mapping[str, Look] = {
    "slopes": slopes, "hand-written norm": hand_written_norm, "group norm": group_norm,
    "parametrized weights": parametrized, "depthwise multiplier": depthwise_multiplier,
    "broadcast mask": broadcast_mask, "pixel shuffle": pixel_shuffle, "pruning masks": pruning_masks,
    "backbone without gradients": backbone_without_gradients, "dead and huge channels": dead_and_huge_channels,
    "grouped-query attention": grouped_query_attention, "frozen": plain, "compiled": plain, "global switches": plain,
}  # fmt: skip


@pytest.fixture(scope="module")
def exports() -> dict[Any, GraphTemplate]:
    return {}


@pytest.fixture
def export_once(request: pytest.FixtureRequest, exports: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Export a case for the first engine alone: the export is the same for every one, and takes most of the time."""
    name = request.node.callspec.params["name"]

    def template(*given: Any) -> GraphTemplate:
        if name not in exports:
            exports.clear()
            exports[name] = GraphTemplate(*given)
        return exports[name]

    monkeypatch.setattr(builder, "GraphTemplate", template)


@pytest.mark.usefixtures("export_once")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name in CASES if name not in SAME_DATA])
def test_right_answer(name: str, engine: str, worker: EngineWorker, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    case, walked = CASES[name], []
    choose = all_but_the_huge if name == "dead and huge channels" else pruned_in_int8

    def look(*built: Any) -> None:
        walked.append(built)

    found = walk_task(name, case.task, worker, tmp_path / "run", engine=engine, dense=False, choose=choose, look=look)
    error = {REFUSED: "ConfigError", NOT_BUILT: "BuildError"}
    expected = {kind for codes, kind in error.items() if {*codes} <= {*case.exits_of(engine)}}
    if found.status == "refused":
        assert found.said.partition(":")[0] in expected, found.said
        for pattern in case.says:
            assert re.search(pattern, found.said), found.said
        return
    assert case.exits_of(engine) != REFUSED and (found.status, found.policies) in (("handled", 1), ("named", 1)), found
    evaluator, space, model = walked[0]
    assert len(evaluator.inventory.groups) >= case.least_axes
    reasons = [f"{layer}: {why}" for layer, why in evaluator.inventory.skipped.items()]
    for pattern in case.named:
        assert any(re.search(pattern, reason) for reason in reasons), reasons
    OWN.get(name, lambda *built: None)(evaluator, space, model)


@pytest.mark.parametrize("name", SAME_DATA)
def test_data_are_read_as_those_of_another_case(name: str) -> None:
    task, other = CASES[name].task(), CASES["frozen"].task()
    check_task(task)
    # Of loaders, validation data are split off.
    for split in ("test",) if name == "loaders" else ("validation", "test"):
        assert same(joined(getattr(task, split)(16)), joined(getattr(other, split)(16)))
    state, expected = task.network().state_dict(), other.network().state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", TRAINED)
def test_fine_tuning_moves_the_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task: Task = CASES[name].task()
    model, batches = task.network(), task.train_batches
    frozen = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    seen: list[Tensor] = []

    def watched(batch_size: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(batch_size, epoch):
            seen.append(next(model.parameters()).detach().clone())
            yield batch

    monkeypatch.setattr(task, "train_batches", watched)
    report = finetune(model, Teacher(task.network(), torch.float32), task, RecoveryConfig(), Budget(3, 60.0))
    assert math.isfinite(report.loss) and report.epochs > 0
    assert len(seen) >= 2 and not torch.equal(seen[0], seen[-1])
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == frozen
    with torch.no_grad():
        assert torch.isfinite(model(task.example_inputs(4))).all()


def test_a_training_sample_that_raises_is_named_when_it_is_met() -> None:
    task = CASES["broken sample"].task()
    with pytest.raises(ConfigError, match=r"sample 7 cannot be read: OSError.*Repair it, or leave it out"):
        list(task.train_batches(16, 0))


def test_what_a_module_prints_on_import_is_no_json() -> None:
    shown = CliRunner().invoke(
        main, ["inspect", "--task", f"benchmarks.cases.{CASES['global switches'].factory}", "--json"]
    )
    assert "loading the model zoo" in shown.stderr
    assert len(json.loads(shown.stdout)["groups"]) == 3


def test_trained_weights_are_kept_outside_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    data = gratings(16, seed=1)
    with few_samples(None):
        made = [fit(Plain().train(), data, "plain", steps=1) for _ in range(2)]
    assert torch.equal(made[0].a.weight, made[1].a.weight) and not made[1].training
    assert [path.parent.name for path in tmp_path.rglob("*.pt")] == ["cases"]


def test_every_case_has_a_source_and_an_answer() -> None:
    assert {*OWN, *SAME_DATA, *TRAINED} <= CASES.keys() and len(CASES) >= 35
    assert all(case.source and case.fault and case.answer for case in CASES.values())
    assert all(case.says for case in CASES.values() if case.exits == REFUSED)
