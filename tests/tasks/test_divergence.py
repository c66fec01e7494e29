"""How far outputs have moved, for every kind of output, and how the kind is found."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from autocompress.config import TaskConfig
from autocompress.errors import ConfigError
from autocompress.tasks import Adapter, ClassificationTask, LabelFreeTask, Task, UnlabelledTask, load_task
from autocompress.tasks.divergence import (
    KINDS,
    ClassScores,
    Divergence,
    Embedding,
    LabelScores,
    Regression,
    Several,
    divergence_of,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(randn(*shape), dim=1)


# Kind, what the network gives, which divergence is found.
FOUND: list[tuple[str, Tensor, type[Divergence]]] = [
    ("classes", randn(64, 10), ClassScores),
    ("classes", randn(64, 2), ClassScores),
    ("classes", randn(16, 5, 6, 7), ClassScores),
    ("classes", randn(16, 5, 30), ClassScores),
    ("classes", randn(64, 4).softmax(1), ClassScores),
    ("classes", randn(64, 360).sigmoid(), LabelScores),
    ("classes_last", randn(8, 12, 40), ClassScores),
    ("labels", randn(64, 10), LabelScores),
    ("labels", randn(64), LabelScores),
    ("labels", randn(8, 1, 6, 6), LabelScores),
    ("embedding", randn(64, 32), Embedding),
    ("embedding", randn(8, 12, 32), Embedding),
    ("values", unit(64, 32), Embedding),
    ("values", randn(64, 2).softmax(1), ClassScores),
    ("values", randn(64), Regression),
    ("values", randn(64, 1), Regression),
    ("values", randn(64, 3), Regression),
    ("values", randn(8, 3, 10, 10), Regression),
    ("values", randn(8, 100, 25), Regression),
    ("regression", unit(64, 32), Regression),
    # One column is never class scores: their softmax is 1 whatever the network says.
    ("classes", randn(64), Regression),
    ("classes", randn(64, 1), Regression),
    ("classes", randn(8, 1, 6, 6), Regression),
]


@pytest.mark.parametrize(("kind", "given", "wanted"), FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_kind_is_found_and_is_a_divergence(
    kind: str, given: Tensor, wanted: type[Divergence], dtype: torch.dtype
) -> None:
    found = divergence_of(given, kind)
    assert type(found) is wanted
    assert found.name
    reference = given.to(dtype)
    near, far = (given + size * randn(*given.shape, seed=1) for size in (0.05, 0.5))
    if float(given.min()) >= 0 and float(given.max()) <= 1:
        near, far = near.clamp(0, 1), far.clamp(0, 1)
    assert float(found(reference, reference)) == 0
    small, large = float(found(near.to(dtype), reference)), float(found(far.to(dtype), reference))
    assert 1e-6 < small < large < 100
    # One sample has a divergence like the others'.
    assert 0 < float(found(far[:1].to(dtype), reference[:1])) < 100
    student = near.to(dtype).requires_grad_()
    found(student, reference).backward()
    assert student.grad is not None and bool(student.grad.isfinite().all()) and bool(student.grad.any())


@pytest.mark.parametrize(("kind", "given", "wanted"), FOUND)
def test_it_is_a_mean_over_samples_and_positions(kind: str, given: Tensor, wanted: type[Divergence]) -> None:
    found = divergence_of(given, kind)
    moved = (given + 0.2 * randn(*given.shape, seed=2)).clamp(float(given.min()), float(given.max()))
    whole = float(found(moved, given))
    twice = [3] + [1] * (given.ndim - 1)
    assert float(found(moved.repeat(twice), given.repeat(twice))) == pytest.approx(whole, rel=1e-4)
    if given.ndim == 4:
        wider = [1, 1, 1, 3]
        assert float(found(moved.repeat(wider), given.repeat(wider))) == pytest.approx(whole, rel=1e-4)


def test_by_hand() -> None:
    even, sure = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(ClassScores()(even, sure)) == pytest.approx(kl)
    assert float(LabelScores()(torch.zeros(1, 1), torch.tensor([[math.log(3)]]))) == pytest.approx(kl)
    assert float(LabelScores(probabilities=True)(torch.tensor([0.5]), torch.tensor([0.75]))) == pytest.approx(kl)
    # A right angle: cosine distance 1, squared error twice the mean square.
    assert float(Embedding()(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))) == pytest.approx(3)
    wanted = torch.tensor([[0.0, 0.0], [2.0, 200.0]])
    # Each column's variance is its own: an error of half a deviation in one of them.
    assert float(Regression()(wanted + torch.tensor([0.5, 0.0]), wanted)) == pytest.approx(0.125)
    assert float(Regression()(wanted + torch.tensor([0.0, 50.0]), wanted)) == pytest.approx(0.125)


def test_the_mean_of_a_regression_s_outputs_is_one_away() -> None:
    for given in (randn(500), 1000 * randn(500, 1), randn(500, 3) * torch.tensor([1e-3, 1.0, 1e4]), randn(9, 2, 5, 5)):
        found = divergence_of(given, "regression")
        dims = (0,) if given.ndim < 3 else (0, 2, 3)
        assert float(found(given.mean(dims, keepdim=True).expand_as(given), given)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("kind", ["classes", "labels", "embedding", "values", "regression"])
def test_constant_outputs_give_neither_nan_nor_infinity(kind: str) -> None:
    for value in (0.0, 1.0, -30.0, 1e4):
        constant = torch.full((16, 8), value)
        found = divergence_of(constant, kind)
        assert float(found(constant, constant)) == 0
        moved = float(found(constant + 0.1 * randn(16, 8), constant))
        assert math.isfinite(moved) and moved >= 0
    mixed = torch.cat([randn(16, 1), torch.full((16, 1), 7.0), torch.zeros(16, 1)], 1)
    found = divergence_of(mixed, "values")
    assert 0 < float(found(mixed + 0.1, mixed)) < 10


def test_extreme_scores_stay_finite() -> None:
    masked = torch.tensor([[-math.inf, 0.0, 1.0], [-1e30, 1e4, -1e4]])
    for kind in (ClassScores(), LabelScores()):
        assert float(kind(masked, masked)) == 0
        assert math.isfinite(float(kind(masked.flip(0), masked)))
    certain = torch.tensor([[0.0, 1.0]])
    for probable in (ClassScores(probabilities=True), LabelScores(probabilities=True)):
        assert math.isfinite(float(probable(certain.flip(1), certain)))
        assert float(probable(certain, certain)) == 0
    assert math.isnan(float(ClassScores()(torch.full((1, 2), math.nan), certain)))


def test_temperature_softens_class_scores_only() -> None:
    wanted, moved = randn(64, 5), randn(64, 5, seed=1)
    for kind, softens in (("classes", True), ("labels", False), ("embedding", False), ("regression", False)):
        found = divergence_of(wanted, kind)
        same = float(found(moved, wanted, 4.0)) == pytest.approx(float(found(moved, wanted)))
        assert same is not softens and found.softens is softens


def test_other_sizes_are_refused_and_columns_never_broadcast() -> None:
    found = divergence_of(randn(64), "values")
    assert float(found(randn(64)[:, None], randn(64))) == 0
    with pytest.raises(ConfigError, match=r"\(4,\) cannot be compared with \(64,\)"):
        found(randn(4), randn(64))
    with pytest.raises(ConfigError, match="Did you mean 'classes'"):
        divergence_of(randn(64, 3), "clases")


@pytest.mark.parametrize(
    ("kind", "given", "targets", "wanted"),
    [
        ("classes", randn(64, 4), randn(64, 4), Regression),
        ("classes", randn(64, 4), randn(64, 4).softmax(1), ClassScores),
        ("classes", randn(64, 4), nn.functional.one_hot(torch.arange(64) % 4), ClassScores),
        ("classes", randn(64, 4), (randn(64, 4) > 0).float(), LabelScores),
        ("values", randn(64, 4), (randn(64, 4) > 0).float(), LabelScores),
        ("values", randn(64, 1), torch.arange(64) % 2, LabelScores),
        ("classes", randn(64), torch.arange(64) % 2, LabelScores),
        ("values", randn(64, 1), torch.arange(64) % 5, Regression),
        ("classes", randn(8, 1, 6, 6), 255 * (randn(8, 6, 6) > 1).long() + torch.eye(6).long(), Regression),
        ("classes", randn(8, 1, 6, 6), torch.where(randn(8, 6, 6) > 1, 255, torch.eye(6).long()), LabelScores),
        # Embeddings trained on classes.
        ("values", unit(64, 16), torch.arange(64) % 5, Embedding),
    ],
)
def test_targets_tell(kind: str, given: Tensor, targets: Tensor, wanted: type[Divergence]) -> None:
    assert type(divergence_of(given, kind, targets)) is wanted


def test_the_axis_of_the_classes_is_where_class_numbers_leave_it() -> None:
    numbers = torch.zeros(8, 12, dtype=torch.int64)
    for given, targets, axis in (
        (randn(8, 12, 40), numbers, 2),
        (randn(8, 40, 12), numbers, 1),
        (randn(8, 12, 40), None, 1),
        (randn(8, 12, 40).softmax(2), None, 2),
        (randn(8, 12, 12), numbers, 1),
    ):
        found = divergence_of(given, "classes", targets)
        assert isinstance(found, ClassScores) and found.axis == axis


# -- several outputs --------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Boxes in pixels, probabilities and an embedding, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4 + 2 + 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        boxes, scores, vectors = self.fc(x).split([4, 2, 16], 1)
        return {"boxes": 100 * boxes, "scores": scores.softmax(1), "vector": nn.functional.normalize(vectors)}


def heads(outputs: str | Mapping[str, str] = "values") -> UnlabelledTask:
    torch.manual_seed(0)
    return UnlabelledTask(Adapter(Heads()), randn(60, 6), randn(10, 6, seed=1), outputs=outputs, calibration_size=32)


def test_several_outputs_count_each_on_its_own_scale() -> None:
    task = heads()
    found = task.found_divergence()
    assert isinstance(found, Several)
    kinds = {part.name: type(part.divergence) for part in found.parts}
    assert kinds == {"boxes": Regression, "scores": ClassScores, "vector": Embedding}
    assert task.divergence_name == (
        "squared error over variance of `boxes`; KL divergence of class scores of `scores`; "
        "cosine distance and relative error of embeddings of `vector`"
    )
    with torch.no_grad():
        outputs = task.model()(next(task.calibration(32)))
    lost = {}
    for name, part in (("boxes", slice(0, 4)), ("scores", slice(4, 6)), ("vector", slice(6, 22))):
        moved = outputs.clone()
        moved[:, part] = outputs[:, part].mean(0)
        lost[name] = float(task.divergence(moved, outputs))
    # Pixels squared are not more than the others.
    assert max(lost.values()) < 100 * min(lost.values())
    assert lost["boxes"] == pytest.approx(1 / 3, rel=0.01)


def test_kinds_of_several_outputs_can_be_named() -> None:
    found = heads({"vector": "regression", "scores": "labels"}).found_divergence()
    assert isinstance(found, Several)
    assert [type(part.divergence) for part in found.parts] == [Regression, LabelScores, Regression]
    with pytest.raises(ConfigError, match="Did you mean 'scores'"):
        heads({"score": "labels"}).found_divergence()
    with pytest.raises(ConfigError, match="'label'"):
        heads({"scores": "label"})
    alone = UnlabelledTask(nn.Linear(6, 3), randn(60, 6), randn(9, 6), outputs={"a": "values"}, calibration_size=32)
    with pytest.raises(ConfigError, match="one without a name"):
        alone.found_divergence()


# -- tasks ------------------------------------------------------------------------------------------------------------


def classifier(**options: object) -> ClassificationTask:
    torch.manual_seed(0)
    data = randn(60, 6), torch.arange(60) % 3
    return ClassificationTask(nn.Linear(6, 3), data, data, calibration_size=16, **options)  # type: ignore[arg-type]


def test_a_task_finds_its_divergence_once_and_anew_when_told() -> None:
    task = classifier()
    assert task.divergence_name == "KL divergence of class scores"
    assert task.found_divergence() is task.found_divergence()
    assert task.metric_name == "accuracy" and task.metric_is_share
    task.outputs = "regression"
    assert task.divergence_name == "squared error over variance"


class Own(ClassificationTask):
    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        return 0.5

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return (outputs - reference).abs().max()


def test_a_user_s_own_divergence_and_metric_are_used_and_called_so() -> None:
    task = Own(nn.Linear(6, 3), (randn(60, 6), torch.arange(60) % 3), (randn(9, 6), torch.arange(9) % 3))
    assert (task.metric_name, task.metric_is_share) == ("metric", False)
    for given in (task, LabelFreeTask(task, "cosine")):
        assert given.divergence_name == "the task's own divergence"
        assert float(given.divergence(torch.ones(2, 3), torch.zeros(2, 3))) == 1
    assert LabelFreeTask(task, "cosine").metric_name == "cosine"


def test_without_labels_one_number_is_compared_by_r2() -> None:
    torch.manual_seed(0)
    for network in (nn.Linear(6, 1), nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))):
        for outputs in ("classes", "values"):
            task = LabelFreeTask(
                UnlabelledTask(network, randn(60, 6), randn(20, 6, seed=1), outputs=outputs, calibration_size=32)
            )
            assert task.kind == task.metric_name == "r2" and not task.metric_is_share
            inputs, wanted = next(task.test(20))
            with torch.no_grad():
                assert task.metric(task.model()(inputs), wanted) == pytest.approx(1)
            assert task.metric(wanted.mean().expand_as(wanted), wanted) < 0.5
            assert float(task.loss(wanted + 1, wanted)) > 0


def test_the_run_file_overrides(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(TaskConfig(name=f"{__name__}:classifier", outputs="embedding"))
    assert isinstance(task.found_divergence(), Embedding)
    with pytest.raises(ConfigError, match=r"task\.outputs is 'embeding'.*Did you mean 'embedding'"):
        load_task(TaskConfig(name=f"{__name__}:classifier", outputs="embeding"))


def test_tasks_without_a_tensor_are_told_of_the_adapter() -> None:
    class Tuples(ClassificationTask):
        def model(self) -> nn.Module:
            return Pair()

    task = Tuples(nn.Linear(6, 3), (randn(60, 6), torch.arange(60) % 3), (randn(9, 6), torch.arange(9) % 3))
    with pytest.raises(ConfigError, match=r"tasks\.Adapter"):
        task.found_divergence()


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_all_kinds_have_a_name_and_tasks_the_default() -> None:
    assert set(KINDS) == {"classes", "classes_last", "labels", "embedding", "values", "regression"}
    assert Task.outputs == "classes"
