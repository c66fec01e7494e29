"""Samplers on made-up problems, and how proposals slow down with the size of the problem and of the study.

    python benchmarks/search/synthetic.py compare [--seeds 3] [--samplers knapsack,tpe,nsga2,random,gp]
    python benchmarks/search/synthetic.py scale

Hypervolume is the share of the box between the floor and the reference that the true (noise-free) figures of the trials
dominate. All samplers try the uncompressed network first. Results go to ``benchmarks/search/results``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import optuna
from made_up import FLOOR, MadeUp, hypervolume

from autocompress.exploration.knapsack.problem import Costs, Pair
from autocompress.exploration.knapsack.sampler import KnapsackSampler
from autocompress.exploration.samplers import make_sampler

RESULTS = Path(__file__).parent / "results"
AT = (5, 10, 15, 20, 25, 50, 100, 200)
# Trials of each sampler; a Gaussian process over categorical choices needs seconds for one, and is cut short.
TRIALS = {"knapsack": 100, "tpe": 200, "nsga2": 200, "random": 200, "gp": 50}


def search(problem: MadeUp, sampler: optuna.samplers.BaseSampler, trials: int) -> tuple[list[float], float]:
    """Return the hypervolume after every trial, and the seconds spent."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.enqueue_trial(problem.reference)
    points: list[tuple[float, float]] = []
    volumes: list[float] = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        choices = {n: trial.suggest_categorical(n, list(row)) for n, row in problem.losses.items()}
        points.append((problem.quality(choices), problem.latency(choices)))
        volumes.append(hypervolume(points, problem.reference_ms))
        return problem.measure(choices)

    started = time.perf_counter()
    study.optimize(objective, n_trials=trials)
    return volumes, time.perf_counter() - started


def compare(seeds: int, samplers: list[str]) -> None:
    """Compare samplers on every kind of problem with every prior; rivals do not see the prior."""
    path = RESULTS / "compare.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {(r["kind"], r["steep"], r["sampler"], r["prior"], r["seed"]) for r in runs}
    for kind, steep in (("network", 1.6), ("additive", 1.6), ("network", 2.5)):
        for name in samplers:
            for prior in ("flat", "rough", "good") if name == "knapsack" else ("none",):
                if name == "gp" and (kind, steep) != ("additive", 1.6):
                    continue
                for seed in range(seeds):
                    if (kind, steep, name, prior, seed) in done:
                        continue
                    problem = MadeUp(seed, kind=kind, steep=steep, prior="flat" if prior == "none" else prior)
                    if name == "knapsack":
                        sampler: optuna.samplers.BaseSampler = KnapsackSampler(
                            problem.costs, problem.prior, seed=seed, floor=FLOOR
                        )
                    else:
                        sampler = make_sampler(name, seed, TRIALS[name])
                    volumes, seconds = search(problem, sampler, TRIALS[name])
                    at = {str(n): round(volumes[n - 1], 4) for n in AT if n <= len(volumes)}
                    runs.append(
                        {
                            "kind": kind, "steep": steep, "sampler": name, "prior": prior, "seed": seed,
                            "parameters": len(problem.losses), "rank_correlation": round(problem.rank_correlation, 3),
                            "hypervolume": at, "seconds_per_trial": round(seconds / TRIALS[name], 4),
                        }
                    )  # fmt: skip
                rows = [
                    r for r in runs if (r["kind"], r["steep"], r["sampler"], r["prior"]) == (kind, steep, name, prior)
                ]
                means = {n: np.mean([r["hypervolume"][n] for r in rows]).round(3) for n in rows[0]["hypervolume"]}
                print(kind, steep, name, prior, " ".join(f"{n}:{v}" for n, v in means.items()), flush=True)
                path.write_text(json.dumps({"command": "compare", "runs": runs}, indent=1) + "\n")


def large(seed: int, *, parameters: int, choices: int, pairs: bool) -> tuple[Costs, dict[str, dict[int, float]]]:
    """Return a problem of that many parameters, and sensitivities."""
    rng = np.random.default_rng(seed)
    ms, losses = {}, {}
    for i in range(parameters):
        ms[f"p{i}"] = dict(enumerate(rng.lognormal(0, 1) * np.linspace(1, 0.1, choices)))
        losses[f"p{i}"] = dict(enumerate(rng.lognormal(0, 1) * np.linspace(0, 1, choices) ** rng.uniform(1, 3)))
    joined = []
    for i in range(parameters - 1) if pairs else ():
        convert = 0.05 * np.abs(np.subtract.outer(np.arange(choices), np.arange(choices))) / choices
        joined.append(Pair(f"p{i}", f"p{i + 1}", convert))
    return Costs(ms, joined), losses


def scale(sizes: list[int]) -> None:
    """Time proposals for 500 parameters of 30 choices while the study grows to 10,000 trials."""
    rows = []
    for parameters, choices, pairs in ((500, 30, True), (500, 30, False), (100, 8, True), (20, 8, True)):
        costs, losses = large(0, parameters=parameters, choices=choices, pairs=pairs)
        distributions = {n: optuna.distributions.CategoricalDistribution(list(row)) for n, row in costs.ms.items()}
        worst = sum(max(row.values()) for row in losses.values())
        rng = np.random.default_rng(1)

        def figures(
            proposal: dict[str, int],
            costs: Costs = costs,
            losses: dict[str, dict[int, float]] = losses,
            worst: float = worst,
        ) -> list[float]:
            lost = sum(losses[n][c] for n, c in proposal.items()) / worst
            return [0.9 * float(np.exp(-3 * lost)), sum(costs.ms[n][c] for n, c in proposal.items())]

        for held in sizes:
            sampler = KnapsackSampler(costs, losses, seed=0, floor=0.0)
            study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)

            trials = []
            for _ in range(held):
                picked = rng.binomial(choices - 1, rng.beta(1, 2, parameters))
                proposal = {n: int(c) for n, c in zip(costs.ms, picked, strict=True)}
                trials.append(
                    optuna.trial.create_trial(params=proposal, distributions=distributions, values=figures(proposal))
                )
            study.add_trials(trials)
            seconds = []
            for _ in range(12):
                trial = study.ask()
                # Processor time: what else runs on the machine does not count.
                started = time.process_time()
                space = sampler.infer_relative_search_space(study, trial._cached_frozen_trial)
                proposal = sampler.sample_relative(study, trial._cached_frozen_trial, space)
                seconds.append(time.process_time() - started)
                for name, choice in proposal.items():
                    distribution = distributions[name]
                    study._storage.set_trial_param(
                        trial._trial_id, name, distribution.to_internal_repr(choice), distribution
                    )
                study.tell(trial, figures(proposal))
            row = {
                "parameters": parameters, "choices": choices, "pairs": pairs, "finished_trials": held,
                "first_cpu_s": round(seconds[0], 3), "median_cpu_s": round(float(np.median(seconds[1:])), 3),
                "worst_later_cpu_s": round(max(seconds[1:]), 3),
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
            (RESULTS / "scale.json").write_text(json.dumps({"command": "scale", "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("part", choices=["compare", "scale"])
    parser.add_argument("--held", default="0,100,1000,10000", help="finished trials")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samplers", default="knapsack,tpe,nsga2,random")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    RESULTS.mkdir(exist_ok=True)
    if options.part == "scale":
        scale([int(n) for n in options.held.split(",")])
    else:
        compare(options.seeds, options.samplers.split(","))


if __name__ == "__main__":
    main()
