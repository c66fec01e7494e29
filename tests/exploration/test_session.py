"""What a session decides by itself; whole searches are in tests/test_api.py and tests/test_cli.py."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autocompress.config import RunConfig
from autocompress.errors import WorkerLostError
from autocompress.exploration import session as module
from autocompress.exploration.pareto import Constraints
from autocompress.exploration.session import SearchSession
from autocompress.files import write_json
from autocompress.measurement.protocol import Protocol
from autocompress.prediction.predictor import LatencyPredictor
from autocompress.runs.directory import RunDirectory
from autocompress.runs.observer import Observer
from autocompress.runs.records import QUIET, Figures, Occasion, TrialRecord
from autocompress.runs.time_ledger import TimeLedger
from tests.exploration.conftest import BASELINE, make_measurement, record
from tests.prediction import made_up


def make(path: Path, **options: Any) -> SearchSession:
    """A session on a directory, without a pipeline."""
    session: Any = object.__new__(SearchSession)
    session.config = RunConfig.model_validate(options)
    session.run, session.observer, session.started = RunDirectory(path), Observer(), 1000.0
    session.evaluator = SimpleNamespace(baseline=BASELINE, forecast=None, base=None)
    session.constraints = Constraints.of(session.config, BASELINE)
    session._best = None
    return session  # type: ignore[no-any-return]


def finish(session: SearchSession, found: TrialRecord) -> TrialRecord:
    """Leave what `CandidateEvaluator.score` leaves."""
    assert found.artifact is not None
    write_json(session.run.path / found.artifact / "record.json", found.to_dict())
    session.run.append(found)
    return found


def held(session: SearchSession) -> tuple[int, float]:
    data = json.loads((session.run.best / "record.json").read_text())
    return data["number"], data["accuracy"]


@pytest.mark.parametrize(
    ("timeout", "left"), [("10s", 5), ("60s", 50), ("5m", 285), ("1h", 3540)]
)  # half, 10 s, 5 %, a minute
def test_time_is_kept_back_for_the_end(timeout: str, left: float, tmp_path: Path) -> None:
    assert make(tmp_path, timeout=timeout).deadline == pytest.approx(1000 + left)
    assert make(tmp_path).deadline is None


def test_best_always_holds_the_best_so_far(tmp_path: Path) -> None:
    session = make(tmp_path, target_latency="0.5x")
    for found, expected in (
        (record(0, 0.6, 9), (0, 0.6)),  # nothing fits yet: the closest
        (record(1, 0.5, 5), (1, 0.5)),
        (record(2, 0.7, 9), (1, 0.5)),
        (record(3, 0.7, 5), (3, 0.7)),
        (record(4, 0.6, 4), (3, 0.7)),
    ):
        session._finished(finish(session, found))
        assert held(session) == expected
    session._finished(TrialRecord(5, BASELINE.policy, "failed", error="no"))
    assert held(session) == (3, 0.7)
    front = json.loads((tmp_path / "pareto.json").read_text())
    assert front["front"] == [4, 3] and [r["number"] for r in front["records"]] == [4, 3]


def test_what_is_chosen_is_measured_again_until_that_changes_nothing(tmp_path: Path) -> None:
    session = make(tmp_path, target_latency="0.5x")
    found = [record(number, 0.9 - number / 100, 5.6 - number / 100) for number in range(6)]
    records = {r.number: r for r in found}
    session.loop = SimpleNamespace(  # type: ignore[assignment]
        records=records, replace=lambda again: records.update({again.number: again})
    )
    session._confirmed = set()
    asked = []
    # Trials 0 and 1 had been lucky.
    slow = {0: 5.9, 1: 5.8}

    def measure_again(one: TrialRecord) -> TrialRecord:
        asked.append(one.number)
        again = replace(one, measurement=make_measurement(slow.get(one.number, 5.5)))
        write_json(session.run.path / str(one.artifact) / "record.json", again.to_dict())
        return again

    session.evaluator = SimpleNamespace(baseline=BASELINE, measure_again=measure_again, forecast=None)  # type: ignore[assignment]
    for one in found:
        session._finished(finish(session, one))
    assert held(session)[0] == 0

    def best() -> list[TrialRecord]:
        assert session._best is not None
        return [session._best]

    assert [r.number for r in session._confirm(best)] == [2] and asked == [0, 1, 2]
    assert held(session)[0] == 2 and session.run.records()[0].latency_ms == 5.9
    # What is known is not measured once more.
    assert [r.number for r in session._confirm(best)] == [2] and asked == [0, 1, 2]


def test_what_is_lost_when_it_is_measured_again_costs_only_that(tmp_path: Path) -> None:
    session = make(tmp_path, target_latency="0.5x")
    found, said = record(0, 0.9, 5.0), []
    session.observer.warn = said.append  # type: ignore[method-assign]
    session.loop = SimpleNamespace(records={0: found}, replace=None)  # type: ignore[assignment]
    session._confirmed = set()
    session._finished(finish(session, found))

    def lost(one: TrialRecord, protocol: Protocol | None = None) -> TrialRecord:
        raise WorkerLostError("Measuring it: the worker process was killed by SIGSEGV.")

    session.evaluator = SimpleNamespace(baseline=BASELINE, measure_again=lost, forecast=None)  # type: ignore[assignment]
    assert [r.number for r in session._confirm(lambda: [found])] == [0] and held(session)[0] == 0
    assert said == [
        "Trial 0 could not be measured again; its trial's figures stand: Measuring it: the worker process was killed "
        "by SIGSEGV."
    ]


def test_the_end_has_its_reserve_even_after_a_search_that_overran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make(tmp_path, timeout="60s")
    session.plan = cast(Any, SimpleNamespace(reserve=25.0))
    for now, left in ((1050.0, 35.0), (1090.0, 25.0)):
        monkeypatch.setattr("autocompress.runs.deadline.time.monotonic", lambda now=now: now)
        assert session.verified_by.left() == left
    session = make(tmp_path)
    assert not session.verified_by.finite


@pytest.mark.usefixtures("whole_protocols")
def test_occasions_of_the_best_are_spread_over_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, now = make(tmp_path, target_latency="0.5x"), [1000.0]
    asked: list[tuple[int, int]] = []
    replaced: list[TrialRecord] = []

    def moment() -> Occasion:
        return Occasion(now[0], {QUIET: Figures(5.0, 11.5, 5 / 11.5)})

    def measure_again(one: TrialRecord, protocol: Protocol) -> TrialRecord:
        asked.append((one.number, protocol.occasions))
        assert one.measurement is not None
        measured = replace(one.measurement, occasions=(*one.measurement.occasions, moment()))
        again = replace(one, measurement=measured)
        write_json(session.run.path / str(one.artifact) / "record.json", again.to_dict())
        return again

    monkeypatch.setattr(module, "timestamp", lambda: now[0])
    session.evaluator = SimpleNamespace(baseline=BASELINE, measure_again=measure_again, forecast=None)  # type: ignore[assignment]
    session.loop = SimpleNamespace(replace=replaced.append)  # type: ignore[assignment]
    best = record(1, 0.9, 5.0)
    assert best.measurement is not None
    session._finished(finish(session, replace(best, measurement=replace(best.measurement, occasions=(moment(),)))))
    for later, times in ((1030.0, 0), (1061.0, 1), (1100.0, 1), (1122.0, 2)):
        now[0] = later
        session._finished(finish(session, record(2, 0.5, 5.0)))
        assert asked == [(1, 1)] * times
    assert session._best is not None and session._best.measurement is not None
    assert [one.at for one in session._best.measurement.occasions] == [1000.0, 1061.0, 1122.0]
    assert len(replaced) == 2 and held(session) == (1, 0.9)
    assert session.run.records()[1] == session._best


@pytest.mark.parametrize(
    ("options", "done", "expected"),
    [
        (
            {"target_latency": "0.5x"},
            44,
            ["44 after 88", "confirm", "near", "finish", "50 after 100", "confirm"],
        ),
        # Nothing is left to be done near the best, and nothing is said of it.
        ({"target_latency": "0.5x"}, 50, ["44 after 88", "confirm", "finish", "50 after 100", "confirm"]),
        ({"max_drop": "1pp"}, 40, ["50 after 100", "confirm"]),
    ],
)
def test_the_last_trials_start_from_the_best_once_it_is_confirmed(
    options: dict[str, Any], done: int, expected: list[str], tmp_path: Path
) -> None:
    session = make(tmp_path, n_trials=50, **options)
    seen: list[str] = []
    begun = time.monotonic()
    session.observer.stage = lambda text: seen.extend(["near"] * ("near" in text))  # type: ignore[method-assign]
    session.loop = SimpleNamespace(  # type: ignore[assignment]
        records=range(done),
        run=lambda trials, until, progress, done_when: seen.append(f"{trials} after {until - begun:.0f}"),
        finish=lambda: seen.append("finish"),
    )
    session._confirm = lambda choose: seen.append("confirm")  # type: ignore[method-assign,assignment]
    session._reach = lambda space, until: False  # type: ignore[method-assign]
    session._search(cast("Any", None), begun, begun + 100.0, lambda done, total: None)
    assert seen == expected


def test_what_needs_no_fine_tuning_leaves_its_time_to_trials_that_go_on(tmp_path: Path) -> None:
    session = make(tmp_path, n_trials=50, target_latency="0.5x", stop_early=False, timeout="1000s")
    session.started = begun = time.monotonic()
    ends: list[float] = []
    session.loop = SimpleNamespace(  # type: ignore[assignment]
        records=range(9), run=lambda trials, until, *_, **__: ends.append(until - begun), finish=lambda: None
    )
    session._confirm = lambda choose: []  # type: ignore[method-assign]
    session._reach = lambda space, until: False  # type: ignore[method-assign]
    session._settled = lambda: True  # type: ignore[method-assign]
    session._search(cast("Any", None), begun, begun + 100.0, lambda done, total: None)
    assert session.deadline is not None
    left = session.deadline - begun
    assert ends == pytest.approx([88, 0.88 * left, left])


def test_where_no_network_is_inside_the_limit_the_closest_one_goes_on_to_it(tmp_path: Path) -> None:
    session = make(tmp_path, n_trials=50, target_latency="0.5x")
    found = [record(0, 0.9, 9.9), record(1, 0.8, 7.0), record(2, 0.7, 6.9)]
    # Nothing was chosen of trial 2 that could be gone on from.
    choices = {0: {"prune/a": 0.0}, 1: {"prune/a": 0.5}}
    session.loop = SimpleNamespace(  # type: ignore[assignment]
        records={r.number: r for r in found}, choices_of=choices.get, run=lambda *_, **__: None, finish=lambda: None
    )
    asked: list[Any] = []

    def reach(chosen: Any, cost: float) -> None:
        asked.append((chosen, cost))
        session.loop.records[3] = record(3, 0.6, 4.0)

    session._first_candidates = lambda space, until: SimpleNamespace(reach=reach)  # type: ignore[method-assign,assignment,return-value]
    session._confirm = lambda choose: []  # type: ignore[method-assign]
    now = time.monotonic()
    session._search(cast("Any", None), now, now + 100.0, lambda done, total: None)
    assert asked == [({"prune/a": 0.5}, session.constraints.cost(found[1]))]


def test_without_a_latency_limit_nothing_is_measured_again(tmp_path: Path) -> None:
    session = make(tmp_path, max_drop="1pp")
    found = record(1, 0.9, 5)
    assert session._confirm(lambda: [found]) == [found]


def test_ties_do_not_lead_downwards_step_by_step(tmp_path: Path) -> None:
    session = make(tmp_path, target_latency="0.5x")
    # Of 3,000 samples 0.55 points are one standard error.
    offered = []
    for number, (accuracy, latency) in enumerate([(0.900, 5.0), (0.896, 4.9), (0.892, 4.8), (0.902, 5.1)]):
        session._finished(finish(session, record(number, accuracy, latency, samples=3000)))
        offered.append(held(session)[0])
    # Trial 1 is as good as trial 0 and faster. Trial 2 is as good as trial 1, but not as trial 0.
    assert offered == [0, 1, 0, 0]
    assert json.loads((tmp_path / "pareto.json").read_text())["front"] == [2, 0]


def test_where_nothing_is_worth_offering_best_holds_the_model_itself(tmp_path: Path) -> None:
    session = make(tmp_path, target_latency="0.5x", max_drop="1pp")
    finish(session, BASELINE)
    session.run.trials_file.unlink()
    assert session._resumed_best(BASELINE) is BASELINE and held(session) == (0, 0.95)
    session._best = BASELINE
    # A network that has collapsed does not take its place, nor does the model's own number hide trial 0.
    session._finished(finish(session, record(0, 0.15, 2)))
    assert held(session) == (0, 0.95) and session._best is BASELINE
    session._finished(finish(session, record(1, 0.945, 9)))
    assert held(session) == (1, 0.945)
    session._finished(finish(session, record(2, 0.943, 5)))
    assert held(session) == (2, 0.943)


def test_trial_0_is_offered_once_something_else_was_tried(tmp_path: Path) -> None:
    session = make(tmp_path, target_latency="0.5x", max_drop="1pp")
    finish(session, BASELINE)
    session._best = BASELINE
    finish(session, record(0, 0.945, 5))  # killed here, before it was copied
    session._finished(finish(session, record(1, 0.3, 2)))
    assert held(session) == (0, 0.945)


def test_a_worse_second_round_does_not_replace_the_first(tmp_path: Path) -> None:
    session = make(tmp_path, target_latency="0.5x")
    folder = "artifacts/trial-00001/recovered"
    session._improve(finish(session, record(1, 0.9, 5, stage="recovered", artifact=folder)))
    session._improve(finish(session, record(1, 0.8, 5, stage="recovered", artifact=folder)))
    assert held(session) == (1, 0.9)
    # Nor does resuming, although the latest record of trial 1 is the worse one.
    again = make(tmp_path, target_latency="0.5x")
    best = again._resumed_best(BASELINE)
    assert best is not None and best.accuracy == 0.9 and held(again) == (1, 0.9)


def test_resuming_mends_best_after_a_crash_between_recording_and_copying(tmp_path: Path) -> None:
    session = make(tmp_path, target_latency="0.5x")
    session._finished(finish(session, record(0, 0.5, 5)))
    finish(session, record(1, 0.8, 5))  # killed here
    again = make(tmp_path, target_latency="0.5x")
    assert again._resumed_best(BASELINE) == record(1, 0.8, 5) and held(again) == (1, 0.8)


def test_resuming_with_another_limit_chooses_again(tmp_path: Path) -> None:
    session = make(tmp_path, target_latency="0.5x")
    for found in (record(0, 0.9, 5), record(1, 0.7, 2)):
        session._finished(finish(session, found))
    assert held(session) == (0, 0.9)
    tighter = make(tmp_path, target_latency="0.2x")
    tighter._resumed_best(BASELINE)
    assert held(tighter) == (1, 0.7)


@pytest.mark.parametrize(("accuracy", "latency", "settled"), [(0.949, 5, True), (0.949, 9, False), (0.9, 5, False)])
def test_a_lossless_result_within_the_budget_needs_no_fine_tuning(
    accuracy: float, latency: float, settled: bool, tmp_path: Path
) -> None:
    session = make(tmp_path, target_latency="0.5x")
    session._best = record(1, accuracy, latency)
    assert session._settled() is settled
    open_ended = make(tmp_path)
    open_ended._best = record(1, accuracy, latency)
    assert not open_ended._settled()


# -- the space and what a latency table knows of it -------------------------------------------------------------------


class Heard(Observer):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)


def with_space(path: Path, predictor: Any, **options: Any) -> tuple[SearchSession, Heard]:
    """A session that can bind its space to the made-up model."""
    session = make(path, **options)
    heard = session.observer = Heard()
    session.predictor = predictor
    session._space_file = made_up.SPACE.file
    session.evaluator = SimpleNamespace(  # type: ignore[assignment]
        base=None,
        inventory=made_up.LAYOUT.inventory,
        capabilities=("bf16", "int8"),
        baseline=BASELINE,
        ledger=TimeLedger(),
    )
    return session, heard


def table(count: int) -> LatencyPredictor:
    return made_up.predictor(made_up.measure(count, seed=0, noise=0.002))


def test_choices_that_cannot_pay_are_left_out_and_stay_so_on_resuming(tmp_path: Path) -> None:
    session, heard = with_space(tmp_path, table(150))
    space, whole = session._space(BASELINE), with_space(tmp_path, None)[0]._space(BASELINE)
    count = [sum(map(len, s.every.values())) for s in (whole, space)]
    assert count[1] < count[0] and f"{count[0] - count[1]} of {count[0]} choices" in heard.stages[-1]
    # The table has grown, or is gone: an old study still is of the same space.
    (tmp_path / "study.db").touch()
    for predictor in (table(200), None):
        assert with_space(tmp_path, predictor)[0]._space(BASELINE).hash == space.hash != whole.hash


def test_a_study_of_the_whole_space_stays_one(tmp_path: Path) -> None:
    whole = with_space(tmp_path, None)[0]._space(BASELINE)
    (tmp_path / "study.db").touch()
    assert with_space(tmp_path, table(150))[0]._space(BASELINE).hash == whole.hash


def test_a_table_of_another_device_leaves_nothing_out(tmp_path: Path) -> None:
    session, heard = with_space(tmp_path, table(150), allow_foreign_table=True)
    assert session._space(BASELINE).hash == with_space(tmp_path, None)[0]._space(BASELINE).hash and not heard.stages
