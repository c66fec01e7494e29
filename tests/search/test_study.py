from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Callable

import optuna
import pytest

from autocompress.config import SAMPLERS, RunConfig
from autocompress.errors import ConfigError, StudyMismatchError, UnsupportedDtypeError
from autocompress.policy import CompressionPolicy
from autocompress.results import TrialRecord
from autocompress.run_directory import RunDirectory
from autocompress.search.pareto import Constraints
from autocompress.search.sampler import make_sampler
from autocompress.search.study import TrialLoop, load_study, open_study
from tests.search.conftest import BASELINE, IDENTITY, Bench, figures, refuse

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
    study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, 0, n))
    constraints = Constraints.of(RunConfig(target_latency="0.75x"), BASELINE)
    loop = TrialLoop(bench.pipeline, space, study, constraints)  # type: ignore[arg-type]
    loop.run(n, FOREVER)
    reached = [r.accuracy or 0 for r in loop.records.values() if (r.latency_ms or 0) <= limit]
    # One feasible network drawn at random is, on average, in the middle; the best found is in the top tenth, and those
    # who learn keep inside the limit more often than those who draw.
    assert max(reached) >= feasible[len(feasible) // 10]
    if sampler in ("tpe", "nsga2"):
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
    assert [d.name for d in bench.loop(RunConfig(max_size="1MB")).study.directions] == ["MAXIMIZE"]


# -- duplicates, exhaustion, budgets ----------------------------------------------------------------------------------


def test_a_network_is_never_evaluated_twice_and_an_exhausted_space_ends(bench: Bench) -> None:
    space = bench.space(pruning={"ratios": [0, 0.5], "include": ["c0", "c1"]})
    loop = bench.loop(HALF, space)
    loop.run(100, FOREVER)
    assert len(bench.pipeline.asked) == len(set(bench.pipeline.asked)) == len(loop.records) == 4
    assert len(bench.told) == len(bench.run.history()) == 4
    # The study learned the known figures for the repeated choices.
    assert set(states(bench.run)) == {"COMPLETE"} and len(states(bench.run)) > 4


def test_the_deadline_ends_the_loop_before_a_trial_that_would_not_fit(bench: Bench) -> None:
    loop = bench.loop(HALF)
    loop.run(10, time.monotonic())
    assert not loop.records
    slow = bench.pipeline.evaluate

    def evaluate(policy: CompressionPolicy, number: int) -> TrialRecord:
        time.sleep(0.5)
        return slow(policy, number)

    bench.pipeline.evaluate = evaluate  # type: ignore[method-assign]
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
    assert bench.pipeline.asked[0] == CompressionPolicy()
    assert len(bench.pipeline.asked[1].int8_layers) == 6
    # A process killed before it noted that all are queued: those that are there are not queued again.
    loop.study.set_user_attr("seeded", False)
    loop.enqueue_seeds(["b1", "b0"])
    assert len(loop.study.trials) == queued


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_trial_costs_one_trial(bench: Bench) -> None:
    bench.pipeline.fails = lambda number, policy: refuse(number, policy) if number in (1, 3) else None
    loop = bench.loop(HALF)
    loop.run(6, FOREVER)
    failed = [r for r in bench.run.history() if r.state == "failed"]
    assert [r.number for r in failed] == [1, 3] and len(loop.records) == len(bench.told) == 6
    assert failed[0].error == "BuildError: the runtime refused it"
    assert states(bench.run) == ["COMPLETE", "FAIL", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_bug_in_a_station_costs_one_trial_too(bench: Bench) -> None:
    bench.pipeline.fails = lambda number, policy: ZeroDivisionError("oops") if number == 0 else None
    loop = bench.loop(HALF)
    loop.run(2, FOREVER)
    assert loop.records[0].error == "ZeroDivisionError: oops" and loop.records[1].state == "complete"


@pytest.mark.parametrize("error", [ConfigError("disk full"), UnsupportedDtypeError("gone"), KeyboardInterrupt()])
def test_what_is_not_the_candidates_fault_ends_the_search_and_resumes(error: BaseException, bench: Bench) -> None:
    def fails(number: int, policy: CompressionPolicy) -> None:
        if number == 2:
            raise error

    bench.pipeline.fails = fails
    with pytest.raises(type(error)):
        bench.loop(HALF).run(10, FOREVER)
    assert [r.number for r in bench.run.history()] == [0, 1]
    loop = bench.loop(HALF)
    assert states(bench.run) == ["COMPLETE", "COMPLETE", "FAIL"]
    loop.run(4, FOREVER)
    assert len(loop.records) == 4 and len(bench.pipeline.asked) == 5 and set(loop.records) >= {0, 1}


def test_a_study_that_cannot_be_written_is_said_plainly(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = bench.loop(HALF)
    loop.run(2, FOREVER)

    def full(*_: object, **__: object) -> None:
        raise optuna.exceptions.StorageInternalError("no") from sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(loop.study, "tell", full)
    with pytest.raises(ConfigError, match=r"study\.db: database or disk is full.*--resume"):
        loop.run(5, FOREVER)


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_resuming_fails_stale_trials_and_keeps_finished_ones(bench: Bench) -> None:
    bench.loop(HALF).run(3, FOREVER)
    bench.loop(HALF).study.ask()  # as if killed here
    loop = bench.loop(HALF)
    assert states(bench.run) == ["COMPLETE"] * 3 + ["FAIL"]
    assert sorted(loop.records) == [0, 1, 2]
    loop.run(5, FOREVER)
    assert len(loop.records) == 5 and len(bench.pipeline.asked) == 5
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
        open_study(bench.run, RunConfig(), {**IDENTITY, "seed": 7, "space": "new"})
    text = str(caught.value)
    assert "objectives: 'accuracy' in the run, 'accuracy, latency ratio' now" in text
    assert "seed: 0 in the run, 7 now" in text and "space: None in the run, 'new' now" in text
    assert "engine" not in text and "--out" in text and str(bench.run.path) in text
    assert bench.loop(HALF).records.keys() == {0}


def test_a_target_may_be_changed_on_resume(bench: Bench) -> None:
    bench.loop(HALF).run(1, FOREVER)
    assert bench.loop(HALF.model_copy(update={"target_latency": "0.3x"})).records


def test_a_damaged_study_is_a_config_error(bench: Bench) -> None:
    bench.run.study_file.write_bytes(b"not a database at all" * 100)
    with pytest.raises(ConfigError, match=r"study\.db cannot be opened"):
        open_study(bench.run, HALF, IDENTITY)


def test_a_run_without_a_study_says_so(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="has no study yet"):
        load_study(bench.run)
