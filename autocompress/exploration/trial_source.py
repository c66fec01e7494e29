"""Which network a study wants scored next: queued, proposed by its sampler, or left by a process that died.

Owns what becomes of a proposal on the way to a trial: choices that were refused before are taken back, and what cannot
meet the latency limit is closed before anything is built.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import optuna

from autocompress.exploration.initial_policies import seed_choices
from autocompress.exploration.latency_limit.latency_filter import (
    LatencyFilter,
    LatencyLimitedSampler,
    Proposal,
    explores,
)
from autocompress.exploration.refusals import Refusals
from autocompress.exploration.study_log import in_flight, is_pending
from autocompress.policy import CompressionPolicy
from autocompress.space.search_space import Choice, SearchSpace

# What a trial notes of prediction: the choices that were proposed, and how many proposals were not built.
PROPOSED, SCREENED_OUT = "proposed", "screened_out"
# What a trial notes that was not proposed by the sampler, and runs whatever is predicted of it.
FIRST = "first"
# What a trial notes once all its choices are made, and it is to be run.
_ACCEPTED = "accepted"


@dataclass(frozen=True)
class Asked:
    """What the sampler wants scored next.

    Attributes:
        trial: Its trial, running unless `closed`.
        choices: That were made.
        policy: That they make.
        closed: Whether the trial was ended, as its network cannot meet the limit.
        fresh: Whether it was drawn, not queued.
    """

    trial: optuna.Trial
    choices: dict[str, Choice]
    policy: CompressionPolicy
    closed: bool = False
    fresh: bool = True


class TrialSource:
    """Asks a study for trials.

    Args:
        study: Opened by `open_study`. Its sampler is wrapped where there is a latency limit to filter by.
        space: Turns choices into policies.
        refusals: What failed, and is not proposed any more.
        latency_filter: Moves proposals to just inside the limit; None leaves them as they are.
        limited: Whether there is a limit on latency.
        known: Networks of earlier sessions, which the filter does not return.
    """

    def __init__(
        self, study: optuna.Study, space: SearchSpace, refusals: Refusals, latency_filter: LatencyFilter | None, *,
        limited: bool, known: Iterable[CompressionPolicy] = (),
    ) -> None:  # fmt: skip
        self._study, self._space, self._refusals, self._filter = study, space, refusals, latency_filter
        self._sampler: LatencyLimitedSampler | None = None
        # What the last process was scoring, or asking for, when it died.
        self._left = deque(in_flight(study, space.parameters))
        if latency_filter is not None:
            accepted = [trial.params for trial in self._left if trial.user_attrs.get(_ACCEPTED)]
            left = [space.policy({name: params[name] for name in space.parameters}) for params in accepted]
            latency_filter.taken |= {*left, *known}
            if limited:
                self._sampler = study.sampler = LatencyLimitedSampler(study.sampler, latency_filter)

    def queue(self, choices: dict[str, Choice], **attrs: Any) -> None:
        """Have a network asked for next, unless it is queued or left already."""
        if not is_pending(self._study, choices):
            self._study.enqueue_trial(choices, user_attrs=attrs)

    def keep(self, asked: Asked) -> None:
        """Keep a trial that there is no time for, for whoever goes on."""
        if not asked.closed:
            self._left.appendleft(asked.trial)

    def ask(self) -> Asked:
        """Return what is to be scored next: what was left by a process that died, what is queued, or a proposal."""
        left = bool(self._left)
        trial = self._left.popleft() if left else self._study.ask()
        if trial.user_attrs.get(_ACCEPTED):
            chosen = self._refusals.allowed({name: trial.params[name] for name in self._space.parameters})
            return Asked(trial, chosen, self._space.policy(chosen), fresh=False)
        if left and self._sampler is not None:
            frozen = self._study.get_trials(deepcopy=False)[trial.number]
            if "fixed_params" not in frozen.system_attrs:
                # Its process died while it was asked for: it is proposed once more, which comes to the same.
                offered = self._sampler.infer_relative_search_space(self._study, frozen)
                self._sampler.sample_relative(self._study, frozen, offered)
        asked = self._asked(trial)
        if not asked.closed:
            trial.set_user_attr(_ACCEPTED, True)
        return asked

    def _asked(self, trial: optuna.Trial) -> Asked:
        """Have the sampler choose for a trial."""
        choices: dict[str, Choice] = {}
        for name, offered in self._space.parameters.items():
            # What is drawn is one of the offered choices; Optuna's type says less.
            choices[name] = trial.suggest_categorical(name, offered)  # type: ignore[assignment]
        allowed = self._refusals.allowed(choices)
        if allowed != choices:
            trial.set_user_attr(PROPOSED, choices)
            choices = allowed
        policy = self._space.policy(choices)
        if self._filter is not None:
            self._filter.taken.add(policy)
        if self._sampler is None or trial.user_attrs.get(FIRST):
            return Asked(trial, choices, policy)
        proposal = self._sampler.proposal(trial.number)
        return Asked(trial, choices, policy, not self._passes(trial, choices, proposal), proposal is not None)

    def _passes(self, trial: optuna.Trial, choices: dict[str, Choice], proposal: Proposal | None) -> bool:
        """Whether a trial's network is to be built; notes what the sampler had proposed in its place.

        One that was queued before predictions were trusted is closed when it cannot meet the limit, and fitted later.
        """
        assert self._filter is not None and self._sampler is not None
        if proposal is None:
            hopeless, screened_out = self._filter.impossible(choices), 1
            if hopeless:
                self._sampler.waiting.append(choices)
        else:
            hopeless, screened_out = proposal.hopeless, proposal.screened_out
            if proposal.choices != proposal.proposed:
                trial.set_user_attr(PROPOSED, proposal.proposed)
        if screened_out and (hopeless or proposal is not None):
            trial.set_user_attr(SCREENED_OUT, screened_out)
        if hopeless:
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return not hopeless

    def enqueue_seeds(self, block_order: list[str], *, queue: bool = True) -> None:
        """Put the first policies in the queue, once per study; as far as they are predicted, fitted to the limit.

        Without `queue` only the order of the blocks is noted, the one whose removal changes least first.
        """
        if self._filter is not None:
            self._filter.blocks = tuple(block_order)
        if not queue:
            return
        if self._study.user_attrs.get("seeded"):
            return
        for choices, attrs in self._seeds(block_order):
            # A process killed in the middle of this loop starts it over.
            self._study.enqueue_trial(choices, user_attrs=attrs, skip_if_exists=True)
        self._study.set_user_attr("seeded", True)

    def _seeds(self, block_order: list[str]) -> list[tuple[dict[str, Choice], dict[str, Any]]]:
        """Return the first choices, fitted to the limit where predictions are trusted, and what their trials note."""
        latency_filter, screened_out = self._filter, 0
        found: list[tuple[dict[str, Choice], dict[str, Any]]] = []
        for number, proposed in enumerate(seed_choices(self._space, block_order)):
            choices: dict[str, Choice] = dict(proposed)
            attrs: dict[str, Any] = {}
            if latency_filter is not None and latency_filter.can_filter:
                impossible = latency_filter.impossible(choices)
                screened_out += impossible
                fitted = latency_filter.fit(choices) if impossible or not explores(number) else choices
                if fitted is None:
                    continue
                if fitted != choices:
                    choices, attrs[PROPOSED] = fitted, choices
                if screened_out:
                    attrs[SCREENED_OUT], screened_out = screened_out, 0
            found.append((choices, attrs))
        return found
