from __future__ import annotations

import itertools
import json
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from autocompress.config import SAMPLERS, RunConfig
from autocompress.errors import ConfigError, StudyMismatchError, UnsupportedDtypeError
from autocompress.exploration import trial_loop
from autocompress.exploration.pareto import Constraints
from autocompress.exploration.samplers import FORESIGHTED, make_sampler
from autocompress.exploration.study import load_study, open_study
from autocompress.exploration.trial_loop import TrialLoop
from autocompress.measurement.protocol import Protocol
from autocompress.policy import CompressionPolicy
from autocompress.runs.directory import RunDirectory
from autocompress.runs.records import TrialRecord
from tests.exploration.conftest import BASELINE, IDENTITY, Bench, figures, knowledge, refuse
from tests.exploration.known import Known

FOREVER = float("inf")
HALF = RunConfig(target_latency="0.5x", sampler="random", n_trials=10)


def states(run: RunDirectory) -> list[str]:
    return [t.state.name for t in load_study(run).trials]


# -- samplers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_does_better_than_chance_on_an_additive_problem(sampler: str, bench: Bench) -> None:
    space = bench.space(pruning={"ratios": [0, 0.25, 0.5, 0.75], "include": ["c[0-3]"]})
    combinations = itertools.product(*space.parameters.values())
    every = [figures(space.policy(dict(zip(space.parameters, c, strict=True)))) for c in combinations]
    limit = 0.75 * figures(CompressionPolicy())[1]
    feasible = sorted((accuracy for accuracy, latency in every if latency <= limit), reverse=True)
    # Gaussian processes learn this from fewer trials, and cost more.
    n = 25 if sampler == "gp" else 60
    study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, 0, n, knowledge(space, 0.75)))
    constraints = Constraints.of(RunConfig(target_latency="0.75x"), BASELINE)
    ahead = sampler in FORESIGHTED
    loop = TrialLoop(bench.evaluator, space, study, constraints, ahead=ahead)  # type: ignore[arg-type]
    loop.run(n, FOREVER)
    reached = [r.accuracy or 0 for r in loop.records.values() if (r.latency_ms or 0) <= limit]
    # One feasible network drawn at random is, on average, in the middle; the best found is in the top tenth, and those
    # who learn keep inside the limit more often than those who draw.
    assert max(reached) >= feasible[len(feasible) // 10]
    if sampler in ("knapsack", "tpe", "nsga2"):
        assert len(reached) / n > len(feasible) / len(every)


# -- what a trial leaves ----------------------------------------------------------------------------------------------


def test_constraints_are_set_in_every_trial(bench: Bench) -> None:
    loop = bench.loop(RunConfig(target_latency="0.5x", max_size="0.5x", sampler="random"))
    loop.run(6, FOREVER)
    for trial in load_study(bench.run).trials:
        found = trial.constraints
        latency = figures(loop.records[trial.number].policy)[1]
        assert found["latency"] == pytest.approx(latency / (0.5 * 11.5) - 1)
        assert found["size"] == pytest.approx(1.0)


def test_records_are_on_disk_and_told_before_the_next_trial(bench: Bench) -> None:
    loop = bench.loop(HALF)
    seen: list[int] = []
    loop._on_trial = lambda record: seen.append(len(bench.run.history()))
    loop.run(4, FOREVER)
    assert seen == [1, 2, 3, 4]
    assert bench.run.history() == list(loop.records.values())
    assert all(t.user_attrs["policy_hash"] == loop.records[t.number].policy.hash for t in load_study(bench.run).trials)


def test_a_target_makes_one_objective_and_none_makes_two(bench: Bench) -> None:
    assert [d.name for d in bench.loop(HALF).study.directions] == ["MAXIMIZE"]


def test_without_a_target_the_whole_front_is_sought(bench: Bench) -> None:
    loop = bench.loop(RunConfig(sampler="random"))
    loop.run(2, FOREVER)
    assert [d.name for d in loop.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    trial = load_study(bench.run).trials[0]
    accuracy, _ = figures(loop.records[0].policy)
    measured = loop.records[0].measurement
    assert measured is not None
    assert trial.values == pytest.approx([accuracy, measured.ratio])
    assert trial.constraints == {}


def test_a_size_limit_alone_is_a_target_too(bench: Bench) -> None:
    assert [d.name for d in bench.loop(RunConfig(max_size="1MB", sampler="random")).study.directions] == ["MAXIMIZE"]


# -- duplicates, exhaustion, budgets ----------------------------------------------------------------------------------


def test_a_network_is_never_evaluated_twice_and_an_exhausted_space_ends(bench: Bench) -> None:
    space = bench.space(pruning={"ratios": [0, 0.5], "include": ["c0", "c1"]})
    loop = bench.loop(HALF, space)
    loop.run(100, FOREVER)
    assert len(bench.evaluator.asked) == len(set(bench.evaluator.asked)) == len(loop.records) == 4
    assert len(bench.told) == len(bench.run.history()) == 4
    # The study learned the known figures for the repeated choices.
    assert set(states(bench.run)) == {"COMPLETE"} and len(states(bench.run)) > 4


def test_the_deadline_ends_the_loop_before_a_trial_that_would_not_fit(bench: Bench) -> None:
    loop = bench.loop(HALF)
    loop.run(10, time.monotonic())
    assert not loop.records
    slow = bench.evaluator.evaluate

    def evaluate(policy: CompressionPolicy, number: int, *, meanwhile: Callable[[], None] | None) -> TrialRecord:
        time.sleep(0.5)
        return slow(policy, number, meanwhile=meanwhile)

    bench.evaluator.evaluate = evaluate  # type: ignore[method-assign]
    loop.run(10, time.monotonic() + 0.7)
    assert len(loop.records) in (1, 2)


def test_progress_counts_finished_trials(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    bench.loop(HALF).run(2, FOREVER, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_seeds_come_first_and_are_queued_once(bench: Bench) -> None:
    space = bench.space(pruning={"ratios": [0, 0.5]}, dtype={"choices": ["dense", "int8"]}, blocks={"remove": True})
    loop = bench.loop(HALF, space)
    loop.enqueue_seeds(["b1", "b0"])
    queued = len(loop.study.trials)
    loop.enqueue_seeds(["b1", "b0"])
    assert len(loop.study.trials) == queued > 4
    loop.run(2, FOREVER)
    assert bench.evaluator.asked[0] == CompressionPolicy()
    assert len(bench.evaluator.asked[1].int8_layers) == 6
    # A process killed before it noted that all are queued: those that are there are not queued again.
    loop.study.set_user_attr("seeded", False)
    loop.enqueue_seeds(["b1", "b0"])
    assert len(loop.study.trials) == queued


# -- ahead of its turn ------------------------------------------------------------------------------------------------


def test_each_network_but_the_first_ones_is_prepared_while_the_one_before_is_scored(bench: Bench) -> None:
    loop = bench.loop(HALF, bench.space(pruning={"ratios": [i / 16 for i in range(16)]}))
    loop.run(6, FOREVER)
    # What the first ones tell is waited for.
    assert bench.evaluator.prepared == bench.evaluator.asked[3:] and len(bench.evaluator.asked) == 6
    # None is left over that was asked for and not scored.
    assert states(bench.run) == ["COMPLETE"] * 6


def test_what_was_asked_for_and_has_no_time_left_goes_first_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = bench.loop(HALF, bench.space(pruning={"ratios": [i / 16 for i in range(16)]}))
    evaluate, now, deadline = bench.evaluator.evaluate, 0.0, 100.0
    # A clock of its own: how long the trials really take on a busy machine says nothing here.
    monkeypatch.setattr(trial_loop, "time", SimpleNamespace(monotonic=lambda: now))

    def slow(policy: CompressionPolicy, number: int, *, meanwhile: Callable[[], None] | None) -> TrialRecord:
        nonlocal now
        now = deadline if number == 3 else now + 1
        return evaluate(policy, number, meanwhile=meanwhile)

    bench.evaluator.evaluate = slow  # type: ignore[method-assign]
    loop.run(10, deadline)
    assert states(bench.run) == [*["COMPLETE"] * 4, "RUNNING"] and len(loop.records) == 4
    left = load_study(bench.run).trials[4].params
    bench.evaluator.evaluate = evaluate  # type: ignore[method-assign]
    again = bench.loop(HALF, bench.space(pruning={"ratios": [i / 16 for i in range(16)]}))
    again.run(5, FOREVER)
    assert again.records[4].policy == again.space.policy(left)


def test_an_error_in_asking_ahead_does_not_cost_the_trial_before(bench: Bench) -> None:
    loop = bench.loop(HALF)

    def gone(policy: CompressionPolicy, *, look: bool) -> None:
        raise ZeroDivisionError("in compressing")

    bench.evaluator.prepare = gone  # type: ignore[method-assign]
    loop.run(5, FOREVER)
    assert states(bench.run) == ["COMPLETE"] * 5
    ask = loop.study.ask

    def failing() -> optuna.Trial:
        if len(loop.records) == 6:
            raise ConfigError("the sampler broke")
        return ask()

    loop.study.ask = failing  # type: ignore[assignment, method-assign]
    with pytest.raises(ConfigError, match="the sampler broke"):
        loop.run(9, FOREVER)
    assert len(loop.records) == 7


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_trial_costs_one_trial(bench: Bench) -> None:
    bench.evaluator.fails = lambda number, policy: refuse(number, policy) if number in (1, 3) else None
    loop = bench.loop(HALF)
    loop.run(6, FOREVER)
    failed = [r for r in bench.run.history() if r.state == "failed"]
    assert [r.number for r in failed] == [1, 3] and len(loop.records) == len(bench.told) == 6
    assert failed[0].error == "BuildError: the runtime refused it"
    # The study learns that what was refused is worth no more than the worst that was built.
    assert states(bench.run) == ["COMPLETE"] * 6
    values = [trial.values[0] for trial in loop.study.trials]
    built = [value for number, value in enumerate(values) if number not in (1, 3)]
    assert max(values[1], values[3]) <= min(built[0], max(built)) and loop.study.trials[1].user_attrs["refused"]


def test_a_bug_in_a_station_costs_one_trial_too(bench: Bench) -> None:
    bench.evaluator.fails = lambda number, policy: ZeroDivisionError("oops") if number == 0 else None
    loop = bench.loop(HALF)
    loop.run(2, FOREVER)
    assert loop.records[0].error == "ZeroDivisionError: oops" and loop.records[1].state == "complete"


@pytest.mark.parametrize("error", [ConfigError("disk full"), UnsupportedDtypeError("gone"), KeyboardInterrupt()])
def test_what_is_not_the_candidates_fault_ends_the_search_and_resumes(error: BaseException, bench: Bench) -> None:
    def fails(number: int, policy: CompressionPolicy) -> None:
        if number == 2:
            raise error

    bench.evaluator.fails = fails
    with pytest.raises(type(error)):
        bench.loop(HALF).run(10, FOREVER)
    assert [r.number for r in bench.run.history()] == [0, 1]
    bench.evaluator.fails = lambda number, policy: None
    loop = bench.loop(HALF)
    # What it was scoring is scored now, under its own number.
    assert states(bench.run) == ["COMPLETE", "COMPLETE", "RUNNING"]
    loop.run(4, FOREVER)
    assert set(loop.records) == {0, 1, 2, 3} and len(bench.evaluator.asked) == 5
    assert bench.evaluator.asked[2] == bench.evaluator.asked[3] == loop.records[2].policy


def test_a_study_that_cannot_be_written_is_said_plainly(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = bench.loop(HALF)
    loop.run(2, FOREVER)

    def full(*_: object, **__: object) -> None:
        raise optuna.exceptions.StorageInternalError("no") from sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(loop.study, "tell", full)
    with pytest.raises(ConfigError, match=r"study\.db: database or disk is full.*--resume"):
        loop.run(5, FOREVER)


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_resuming_goes_on_with_a_trial_that_chose_nothing_yet_and_keeps_finished_ones(bench: Bench) -> None:
    bench.loop(HALF).run(3, FOREVER)
    bench.loop(HALF).study.ask()  # as if killed here
    loop = bench.loop(HALF)
    assert states(bench.run) == ["COMPLETE"] * 3 + ["RUNNING"]
    assert sorted(loop.records) == [0, 1, 2]
    loop.run(5, FOREVER)
    assert sorted(loop.records) == [0, 1, 2, 3, 4] and len(bench.evaluator.asked) == 5
    assert len({r.policy for r in loop.records.values()}) == 5


def test_a_resumed_sampler_does_not_draw_the_same_again(bench: Bench) -> None:
    first = bench.loop(HALF)
    first.run(8, FOREVER)
    again = bench.loop(HALF)
    again.run(12, FOREVER)
    params = [t.params for t in load_study(bench.run).trials]
    assert params[:4] != params[len(first.records) : len(first.records) + 4]
    assert len(again.records) == 12


def test_fine_tuned_records_are_not_learned_from(bench: Bench, make_record: Callable[..., TrialRecord]) -> None:
    bench.loop(HALF).run(2, FOREVER)
    proxy = bench.run.records()[1]
    bench.run.append(make_record(1, stage="recovered"))
    assert bench.loop(HALF).records[1] == proxy


def test_a_mismatch_lists_every_difference_and_no_other(bench: Bench) -> None:
    bench.loop(HALF).run(1, FOREVER)
    with pytest.raises(StudyMismatchError) as caught:
        open_study(bench.run, RunConfig(sampler="random"), {**IDENTITY, "seed": 7, "space": "new"})
    text = str(caught.value)
    assert "objectives: 'accuracy' in the run, 'accuracy, latency ratio' now" in text
    assert "seed: 0 in the run, 7 now" in text and "space: None in the run, 'new' now" in text
    assert "engine" not in text and "--out" in text and str(bench.run.path) in text
    assert bench.loop(HALF).records.keys() == {0}


def test_a_target_may_be_changed_on_resume(bench: Bench) -> None:
    bench.loop(HALF).run(1, FOREVER)
    assert bench.loop(HALF.model_copy(update={"target_latency": "0.3x"})).records


def lost(run: RunDirectory) -> None:
    run.study_file.unlink()


def damaged(run: RunDirectory) -> None:
    run.study_file.write_bytes(b"not a database at all" * 100)


def torn(run: RunDirectory) -> None:
    run.study_file.write_bytes(run.study_file.read_bytes()[:20_000])


def another(run: RunDirectory) -> None:
    """Put the database of another run there."""
    other = Bench(run.path.with_name("other"))
    other.loop(HALF, None, None, **IDENTITY).study.add_trial(
        optuna.trial.create_trial(value=0.1, user_attrs={"policy_hash": "another"})
    )
    run.study_file.write_bytes(other.run.study_file.read_bytes())


@pytest.mark.parametrize("harm", [lost, damaged, torn, another])
def test_the_study_is_made_anew_of_the_log(harm: Callable[[RunDirectory], None], bench: Bench) -> None:
    bench.evaluator.fails = lambda number, policy: ZeroDivisionError("oops") if number == 1 else None
    first = bench.loop(HALF)
    first.run(5, FOREVER)
    before = load_study(bench.run).trials
    harm(bench.run)
    said: list[str] = []
    open_study(bench.run, HALF, IDENTITY, on_message=said.append)
    assert (harm is lost) == (not said)
    assert all("set aside as study.db.damaged-1" in text for text in said)
    bench.evaluator.fails = lambda number, policy: None
    again = bench.loop(HALF)
    after = load_study(bench.run).trials
    assert [(t.number, t.state, t.params, t.values) for t in after] == [
        (t.number, t.state, t.params, t.values) for t in before
    ]
    assert [(t.constraints, t.user_attrs.get("cost")) for t in after if t.values] == [
        (t.constraints, t.user_attrs.get("cost")) for t in before if t.values
    ]
    again.run(7, FOREVER)
    # No number is given away twice, nothing is scored again (but for what failed, should it be drawn).
    numbers = [r.number for r in bench.run.history()]
    assert len(numbers) == len(set(numbers)) == len(bench.evaluator.asked) == 7


def test_a_run_whose_study_is_lost_still_knows_what_it_was_made_with(bench: Bench) -> None:
    bench.loop(HALF).run(2, FOREVER)
    lost(bench.run)
    with pytest.raises(StudyMismatchError, match="seed: 0 in the run, 7 now"):
        open_study(bench.run, HALF, {**IDENTITY, "seed": 7})


def test_a_trial_that_is_in_the_log_but_was_not_told_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = bench.loop(HALF)
    loop.run(2, FOREVER)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial_loop, "tell", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.run(3, FOREVER)
    monkeypatch.undo()
    assert states(bench.run) == ["COMPLETE", "COMPLETE", "RUNNING"] and len(bench.run.history()) == 3
    bench.loop(HALF)
    trial = load_study(bench.run).trials[2]
    assert trial.state.name == "COMPLETE" and trial.values == [bench.run.history()[2].accuracy]


def test_a_trial_of_an_old_log_without_choices_keeps_its_number(bench: Bench) -> None:
    bench.loop(HALF).run(3, FOREVER)
    lines = [json.loads(line) for line in bench.run.trials_file.read_text().splitlines()]
    bench.run.trials_file.write_text("".join(json.dumps({**line, "choices": None}) + "\n" for line in lines))
    lost(bench.run)
    loop = bench.loop(HALF)
    assert states(bench.run) == ["FAIL"] * 3 and sorted(loop.records) == [0, 1, 2]
    loop.run(4, FOREVER)
    # What is drawn twice is known from the log.
    assert len(loop.records) == 4 and max(loop.records) >= 3 and len(bench.evaluator.asked) == 4


def test_a_run_without_a_study_says_so(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="has no study yet"):
        load_study(bench.run)


# -- prediction -------------------------------------------------------------------------------------------------------


def ratios(loop: TrialLoop) -> dict[int, float]:
    return {n: r.measurement.ratio for n, r in loop.records.items() if r.measurement is not None}


def late(networks: int) -> Known:
    """A predictor that must have seen some networks first."""

    class Late(Known):
        @property
        def ready(self) -> bool:
            return self.size >= networks

        @ready.setter
        def ready(self, value: bool) -> None:
            pass

    return Late()


def test_trials_run_inside_the_limit_and_near_it(bench: Bench) -> None:
    loop = bench.loop(HALF, predictor=Known())
    loop.run(24, FOREVER)
    found = ratios(loop)
    assert len(found) == 24 and all(ratio <= 0.5 for ratio in found.values())
    assert median(found.values()) > 0.44
    fitted = [t for t in load_study(bench.run).trials if "proposed" in t.user_attrs]
    assert len(fitted) >= 15
    for trial in fitted:
        # What ran is what the study learns from; what was proposed is noted.
        assert loop.space.policy(trial.params) == loop.records[trial.number].policy
        assert (
            trial.user_attrs["proposed"] != trial.params and trial.user_attrs["proposed"].keys() == trial.params.keys()
        )
    found_by_prediction = loop.prediction()
    assert found_by_prediction is not None
    assert found_by_prediction["fitted"] == len(fitted) and found_by_prediction["screened_out"] > 5
    assert found_by_prediction["networks_known"] == 24


def test_every_record_keeps_what_was_predicted(bench: Bench) -> None:
    known = Known()
    known.off = 1.05
    loop = bench.loop(HALF, predictor=known)
    loop.run(6, FOREVER)
    for record in bench.run.history():
        assert record.measurement is not None
        assert record.predicted_ratio == pytest.approx(1.05 * record.measurement.ratio)
    assert loop.prediction() == {
        "networks_known": 6, "screened_out": loop.prediction()["screened_out"], "fitted": loop.prediction()["fitted"],  # type: ignore[index]
        "rejected": 0, "mape": pytest.approx(0.05),
    }  # fmt: skip
    attrs = load_study(bench.run).trials[0].user_attrs["predicted"]
    assert attrs == pytest.approx([loop.records[0].predicted_ratio] * 3)


def test_without_a_predictor_nothing_is_said_of_prediction(bench: Bench) -> None:
    loop = bench.loop(HALF)
    loop.run(3, FOREVER)
    assert loop.prediction() is None
    assert all(record.predicted_ratio is None for record in loop.records.values())
    assert not any({"proposed", "predicted"} & t.user_attrs.keys() for t in load_study(bench.run).trials)


@pytest.mark.parametrize("options", [{}, {"max_size": "1MB"}])
def test_without_a_latency_limit_nothing_is_screened_but_all_is_predicted(
    options: dict[str, str], bench: Bench
) -> None:
    loop = bench.loop(RunConfig(sampler="random", **options), predictor=Known())  # type: ignore[arg-type]
    loop.enqueue_seeds([])
    loop.run(6, FOREVER)
    assert bench.evaluator.asked[0] == CompressionPolicy()
    found = loop.prediction()
    assert found is not None and (found["screened_out"], found["fitted"]) == (0, 0)
    assert found["mape"] == pytest.approx(0)


def test_an_empty_predictor_learns_from_the_trials_and_then_screens(bench: Bench) -> None:
    loop = bench.loop(HALF, predictor=late(10))
    loop.run(30, FOREVER)
    found = ratios(loop)
    early, after = [found[n] for n in range(10)], [r for n, r in found.items() if n >= 10]
    assert max(early) > 0.5 and max(after) <= 0.5
    assert all(loop.records[n].predicted_ratio is None for n in range(10))


def test_a_resumed_run_teaches_what_it_measured_and_counts_on(bench: Bench) -> None:
    first = bench.loop(HALF, predictor=late(10))
    first.run(16, FOREVER)
    before = first.prediction()
    again = bench.loop(HALF, predictor=late(10))
    assert again.prediction() == before
    again.run(24, FOREVER)
    assert all(ratio <= 0.5 for n, ratio in ratios(again).items() if n >= 16)
    assert len({r.policy for r in again.records.values()}) == 24
    after = again.prediction()
    assert before is not None and after is not None
    assert after["networks_known"] == 24 and after["screened_out"] > before["screened_out"]


def test_seeds_are_fitted_when_predictions_are_trusted_from_the_start(bench: Bench) -> None:
    space = bench.space(pruning={"ratios": [0, 0.25, 0.5, 0.75]}, dtype={"choices": ["dense", "int8"]})
    loop = bench.loop(HALF, space, predictor=Known())
    loop.enqueue_seeds([])
    queued = load_study(bench.run).trials
    loop.run(len(queued), FOREVER)
    found = ratios(loop)
    assert len(found) == len(queued) >= 8 and max(found.values()) <= 0.5
    assert sum(ratio > 0.42 for ratio in found.values()) >= len(found) - 2
    # The uncompressed network, for one, was not built.
    assert CompressionPolicy() not in bench.evaluator.asked
    prediction = loop.prediction()
    assert prediction is not None and prediction["screened_out"] >= 4


def test_seeds_queued_before_are_closed_and_fitted_when_it_turns_out_that_they_cannot_meet_the_limit(
    bench: Bench,
) -> None:
    loop = bench.loop(HALF, predictor=late(1))
    loop.enqueue_seeds([])
    queued = [t.system_attrs["fixed_params"] for t in load_study(bench.run).trials]
    loop.run(12, FOREVER)
    study = load_study(bench.run)
    closed = [t for t in study.trials if t.state.name == "PRUNED"]
    assert closed and all(t.user_attrs["screened_out"] == 1 for t in closed)
    proposed = [t.user_attrs.get("proposed") for t in study.trials]
    for trial in closed:
        assert trial.params in queued and trial.params in proposed
        assert Known().predict(loop.space.policy(trial.params)).ratio > 0.5
    assert len(loop.records) == 12
    assert all(ratio <= 0.5 for number, ratio in ratios(loop).items() if number >= 1)


def test_an_exhausted_space_ends_with_prediction_too(bench: Bench) -> None:
    space = bench.space(pruning={"ratios": [0, 0.5], "include": ["c0", "c2"]})
    loop = bench.loop(HALF.model_copy(update={"target_latency": "0.85x"}), space, predictor=Known())
    loop.run(100, FOREVER)
    assert {r.policy.pruning.get("c2") for r in loop.records.values()} == {0.5}
    assert len(bench.evaluator.asked) == len(loop.records) == 2


def test_a_fitted_trial_that_fails_costs_one_trial(bench: Bench) -> None:
    bench.evaluator.fails = lambda number, policy: refuse(number, policy) if number == 1 else None
    loop = bench.loop(HALF, predictor=Known())
    loop.run(5, FOREVER)
    assert [r.state for r in loop.records.values()] == ["complete", "failed", "complete", "complete", "complete"]
    assert len(set(bench.evaluator.asked)) == 5


# -- trials that were not the sampler's --------------------------------------------------------------------------------


def test_a_trial_of_given_choices_runs_once(bench: Bench) -> None:
    loop = bench.loop(HALF)
    choices = loop.space.everywhere(prune=0.5)
    first = loop.attempt(choices)
    assert first is not None and dict(first.policy.pruning) == {f"c{i}": 0.5 for i in range(5)}
    assert loop.attempt(choices) is first and len(bench.evaluator.asked) == 1
    assert loop.choices_of(first.number) == choices
    # No time for another one as long as the last.
    loop._longest = 5.0
    assert loop.attempt(loop.space.everywhere(prune=0.25), time.monotonic() + 4.0) is None
    bench.evaluator.fails = refuse
    assert loop.attempt(loop.space.everywhere(prune=0.75)) is None


def test_a_network_far_inside_the_limit_that_is_not_accurate_is_followed_by_a_milder_one(bench: Bench) -> None:
    config = HALF.model_copy(update={"max_drop": "5pp"})
    cost = lambda policy: figures(policy)[1] / figures(CompressionPolicy())[1]  # noqa: E731
    study = open_study(bench.run, config, IDENTITY)
    evaluator: Any = bench.evaluator
    constraints = Constraints.of(config, BASELINE)
    loop = TrialLoop(evaluator, bench.space(), study, constraints, bench.told.append, cost=cost)
    harsh: dict[str, Any] = loop.space.everywhere(prune=0.75)
    study.enqueue_trial(harsh)
    loop.run(2, FOREVER)
    first, second = (bench.told[n].measurement for n in (0, 1))
    assert first is not None and second is not None
    assert first.ratio == pytest.approx(0.25) and 0.43 <= second.ratio <= 0.5
    assert (bench.told[1].accuracy or 0) > (bench.told[0].accuracy or 0)


@pytest.mark.usefixtures("whole_protocols")
def test_what_may_be_inside_the_limit_is_measured_until_that_is_known(bench: Bench) -> None:
    evaluate, asked = bench.evaluator.evaluate, []

    def once(*given: Any, **named: Any) -> TrialRecord:
        found = evaluate(*given, **named)
        assert found.measurement is not None
        return replace(found, measurement=replace(found.measurement, ratio_high=1.1 * found.measurement.ratio))

    def measure_again(found: TrialRecord, protocol: Protocol) -> TrialRecord:
        asked.append((found.number, protocol.occasions))
        assert found.measurement is not None
        return replace(found, measurement=replace(found.measurement, ratio_high=found.measurement.ratio))

    bench.evaluator.evaluate = once  # type: ignore[method-assign]
    bench.evaluator.measure_again = measure_again  # type: ignore[attr-defined]
    loop = bench.loop(RunConfig(target_latency="0.5x", n_trials=40, sampler="random"))
    loop.run(40, float("inf"))
    assert asked and all(count == 2 for _, count in asked)
    limit, best = loop.constraints.latency, 0.0
    assert limit is not None
    for number, found in loop.records.items():
        assert found.measurement is not None and found.accuracy is not None
        ratio = found.measurement.ratio
        near = ratio <= limit.value < 1.1 * ratio
        # Not one that is less accurate than what is inside already.
        assert (number in dict(asked)) == (near and found.accuracy >= best - loop.constraints.tie)
        if loop.constraints.within_budget(found):
            best = max(best, found.accuracy)
