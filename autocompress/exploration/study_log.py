"""The log of a run and its study, held together: ``trials.jsonl`` is the truth, ``study.db`` is made to tell the same.

A process may die between the two, or the database may be lost or damaged; what the log has is never run again, and no
trial gets the number of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from autocompress.exploration.constraints import Constraints
from autocompress.exploration.knapsack.sampler import COST_ATTRIBUTE
from autocompress.exploration.latency_limit.machine_speed import MachineSpeed
from autocompress.runs.records import TrialRecord
from autocompress.space.search_space import Choice

# What a trial notes: its network, and that it was not built for what was seen of it.
POLICY_ATTRIBUTE, REJECTED_ATTRIBUTE = "policy_hash", "rejected"


def first_records(history: Iterable[TrialRecord]) -> dict[int, TrialRecord]:
    """Return what each trial came to when it ended, by number; later measurements and fine-tunings are left out."""
    found: dict[int, TrialRecord] = {}
    for record in history:
        if record.stage == "proxy":
            found.setdefault(record.number, record)
    return found


def note(trial: Trial, record: TrialRecord, constraints: Constraints, machine_speed: MachineSpeed | None) -> None:
    """Note with a trial what constraints and samplers want to know of a network that was built and measured."""
    noted = _noted(trial)
    for key, value in constraints.violations(record).items():
        if key not in noted:
            trial.set_constraint(key, value)
    trial.set_user_attr(POLICY_ATTRIBUTE, record.policy.hash)
    trial.set_user_attr(COST_ATTRIBUTE, constraints.cost(record, machine_speed))


def tell(study: optuna.Study, trial: Trial, record: TrialRecord) -> None:
    """Tell the study what a network that was built and measured came to.

    The ratio, not the median: a machine's speed drifts over a search, ratios of the same moment compare.
    """
    assert record.accuracy is not None and record.measurement is not None
    single = len(study.directions) == 1
    study.tell(trial, [record.accuracy] if single else [record.accuracy, record.measurement.ratio])


def tell_rejected(study: optuna.Study, trial: Trial, record: TrialRecord, constraints: Constraints) -> None:
    """Tell the study what was seen and predicted of a network not built: a sampler learns from what is bad, too."""
    assert record.accuracy is not None and record.predicted_ratio is not None
    ratio, budget = record.predicted_ratio, constraints.budget
    if budget is not None and "latency" not in _noted(trial):
        trial.set_constraint("latency", ratio / budget - 1)
    trial.set_user_attr(REJECTED_ATTRIBUTE, True)
    trial.set_user_attr(COST_ATTRIBUTE, ratio)
    single = len(study.directions) == 1
    study.tell(trial, [record.accuracy] if single else [record.accuracy, ratio])


def _noted(trial: Trial) -> Mapping[str, float]:
    """Return the constraints that a process noted that died before it told."""
    return trial.study.get_trials(deepcopy=False)[trial.number].constraints


def _tell_again(study: optuna.Study, trial: Trial, record: TrialRecord, constraints: Constraints) -> None:
    """Tell the study of a trial of an earlier session what the log has of it."""
    if record.state == "complete":
        note(trial, record, constraints, None)
        tell(study, trial, record)
    elif record.state == "rejected" and record.predicted_ratio is not None:
        tell_rejected(study, trial, record, constraints)
    else:
        study.tell(trial, state=TrialState.FAIL)


def disagreement(trials: Iterable[FrozenTrial], records: Mapping[int, TrialRecord]) -> str | None:
    """Return in which trial a study tells something else than the log, and what; None where they agree.

    A study that lacks trials agrees: they can be told. So does one whose process died before it told them.
    """
    for trial in trials:
        record = records.get(trial.number)
        if record is None or trial.state in (TrialState.RUNNING, TrialState.WAITING):
            continue
        policy = trial.user_attrs.get(POLICY_ATTRIBUTE)
        if policy is not None and policy != record.policy.hash:
            return f"trial {trial.number} is another network"
        if record.choices is not None and trial.params and trial.params != dict(record.choices):
            return f"trial {trial.number} chose something else"
        if record.state == "complete" and trial.state == TrialState.COMPLETE and record.accuracy != trial.values[0]:
            return f"trial {trial.number} has another accuracy"
    return None


def restore(
    study: optuna.Study,
    records: Mapping[int, TrialRecord],
    offered: Mapping[str, tuple[Choice, ...]],
    constraints: Constraints,
) -> int:
    """Tell a study the trials of the log that it lacks, under their numbers; return how many.

    Args:
        study: Whose process died before it was told, or which is new.
        records: Of the log, by number.
        offered: Choices by parameter.
        constraints: What the study is told of each trial's limits.
    """
    known, told, sampler = {t.number: t for t in study.get_trials(deepcopy=False)}, 0, study.sampler
    # Nothing is proposed here: parameters come from the records.
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    try:
        for number in range(max(records, default=-1) + 1):
            trial, record = known.get(number), records.get(number)
            if trial is not None and (record is None or trial.state.is_finished()):
                continue
            if record is None or (trial is None and not _fits(record, offered)):
                # A trial that left no record, or one of an old release: its number is not given away again.
                study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
                continue
            _tell_again(study, _running(study, trial, record, offered), record, constraints)
            told += 1
    finally:
        study.sampler = sampler
    return told


def in_flight(study: optuna.Study, offered: Mapping[str, tuple[Choice, ...]]) -> list[Trial]:
    """Return the trials that a process was asking for or scoring when it died; those of another space are ended."""
    found = []
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if all(choice in offered.get(name, ()) for name, choice in frozen.params.items()):
            found.append(Trial(study, frozen._trial_id))
        else:
            study.tell(frozen.number, state=TrialState.FAIL)
    return found


def is_pending(study: optuna.Study, choices: Mapping[str, Choice]) -> bool:
    """Whether a network is queued in the study, or was being scored when the last process died."""
    pending = study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
    return any((t.system_attrs.get("fixed_params") or t.params) == dict(choices) for t in pending)


def _fits(record: TrialRecord, offered: Mapping[str, tuple[Choice, ...]]) -> bool:
    choices = record.choices
    return choices is not None and all(choices.get(name) in offer for name, offer in offered.items())


def _running(
    study: optuna.Study, trial: FrozenTrial | None, record: TrialRecord, offered: Mapping[str, tuple[Choice, ...]]
) -> Trial:
    if trial is not None and trial.state == TrialState.RUNNING:
        return Trial(study, trial._trial_id)
    frozen = optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params=dict(record.choices or {}),
        distributions={name: optuna.distributions.CategoricalDistribution(offer) for name, offer in offered.items()},
    )
    study.add_trial(frozen)
    return Trial(study, study.get_trials(deepcopy=False)[-1]._trial_id)
