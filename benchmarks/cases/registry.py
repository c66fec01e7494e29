"""Every case: the factory of its task, the public source of its fault, and the right answer in a form that is checked.

Of the sources only the kind of fault was taken; all networks and data are this project's own. Imports no case, as one
of them switches gradients off when it is imported.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from autocompress.tasks import Task

WORKS, REFUSED, NOT_BUILT = (0, 3), (2,), (5,)


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        factory: ``"module:function"`` of its task, inside `benchmarks.cases`.
        source: Issues that the fault is known from, as ``"owner/repository#number"``, or that there is none.
        fault: Its kind.
        answer: What is right, in words.
        exits: Exit codes of a search that are right: 0 and 3 where it works (3: a limit was missed), 2 where data or
            model are refused, 5 where they cannot be exported.
        engine_exits: The same by engine, where a runtime decides.
        says: Regular expressions, each of which stderr of a refused case has to hold.
        named: The same of ``layer: reason`` among what is left alone.
        least_axes: Axes of channels that can be pruned at least.
        never_int8: Layers that must not be int8 in what is delivered.
        most_failed: Trials that may fail.
        most_drop_pp: Points of the metric on test data that what is delivered may lose.
    """

    factory: str
    source: str
    fault: str
    answer: str
    exits: tuple[int, ...] = WORKS
    engine_exits: tuple[tuple[str, tuple[int, ...]], ...] = ()
    says: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    never_int8: tuple[str, ...] = ()
    least_axes: int = 1
    most_failed: int = 0
    most_drop_pp: float = 8.0

    def exits_of(self, engine: str) -> tuple[int, ...]:
        """Return the right exit codes with an engine."""
        return dict(self.engine_exits).get(engine, self.exits)

    def task(self) -> Task:
        """Make its task."""
        module, _, function = self.factory.partition(":")
        made: Task = getattr(importlib.import_module(f"benchmarks.cases.{module}"), function)()
        return made


def _refused(factory: str, source: str, fault: str, answer: str, *says: str) -> Case:
    return Case(factory, source, fault, answer, exits=REFUSED, says=says)


_DICTS, _LABELS = "openvinotoolkit/nncf#2982, #1605", "EricFillion/happy-transformer#248"
_OWN = "none: a kind of task that people have"

CASES: dict[str, Case] = {
    "pixel shuffle": Case(
        "structures:pixel_shuffle", "VainF/Torch-Pruning#98, #420",
        "PixelShuffle changes the number of channels between two layers; Focus slicing before the first",
        "the layer before the shuffle left alone and named; others pruned", named=("^wide ",), least_axes=2,
    ),
    "slopes": Case(
        "normalisation:slopes", "IntelLabs/distiller#409, VainF/Torch-Pruning#26", "PReLU slope per channel",
        "slopes go with the channels", least_axes=4,
    ),
    "hand-written norm": Case(
        "normalisation:hand_written_norm", "VainF/Torch-Pruning#203, #167",
        "hand-written LayerNorm over channels, gate by halves, nn.Parameter of each channel on the residual",
        "pruned right or named; parameters shrink with the channels", named=("^intro ",), least_axes=4,
    ),
    "group norm": Case(
        "normalisation:group_norm", "microsoft/nni#5069, VainF/Torch-Pruning#93",
        "GroupNorm: channels must stay divisible by its groups",
        "only widths that GroupNorm takes are offered; no trial fails for it", least_axes=4,
    ),
    "parametrized weights": Case(
        "normalisation:parametrized", "jhjacobsen/invertible-resnet#34, openvinotoolkit/nncf#1514",
        "weight_norm and spectral_norm", "pruned; exported and stored weights consistent", least_axes=4,
    ),
    "depthwise multiplier": Case(
        "structures:depthwise_multiplier", "openvinotoolkit/nncf#986",
        "depthwise convolutions with a channel multiplier", "pruned in step with their inputs, or named",
    ),
    "broadcast mask": Case(
        "structures:broadcast_mask", "VainF/Torch-Pruning#510",
        "product with a broadcast mask of one channel; FiLM scales from a chunked linear layer",
        "the wide branch alone is pruned, or named", least_axes=2,
    ),
    "weight standardized": Case(
        "normalisation:weight_standardized", "open-mmlab/mmdetection#515",
        "a convolution that standardizes its weight in forward, by view", "pruned", least_axes=3,
    ),
    "auxiliary head": Case(
        "training_habits:auxiliary_head", "pytorch/vision#302, pytorch/tutorials#468",
        "a tuple in training mode, a tensor in eval mode", "fine-tuned by the first output",
        named=("^aux: not reached",), least_axes=3,
    ),
    "batch norm without statistics": _refused(
        "normalisation:batch_norm_without_statistics", "pytorch/pytorch#75252, #45333",
        "BatchNorm without running statistics: outputs depend on the batch", "refused, and the layers named",
        "gives other outputs for a sample alone than in a batch", r"\bna\b.*\bnb\b",
    ),
    "frozen": Case(
        "training_habits:frozen", "FasterAI-Labs/fasterai#63, microsoft/nni#4521", "every parameter frozen",
        "pruned and fine-tuned all the same", least_axes=3,
    ),
    "dead and huge channels": Case(
        "data:dead_and_huge_channels", "NVIDIA/TensorRT#1826, apple/coremltools#2853, microsoft/onnxruntime#6004",
        "channels of scale and variance 0, one 10,000 times too large",
        "no NaN; int8 of the layer behind is found harmful (by the first trial) and not chosen",
        least_axes=3, most_failed=1, never_int8=("c",),
    ),
    "backbone without gradients": Case(
        "training_habits:no_grad_backbone", "VainF/Torch-Pruning#211",
        "a backbone under no_grad, a detached branch: the tracer sees no path", "left alone with the true reason",
        named=("^backbone.0 .*no gradient goes through it", "^backbone.3 .*no gradient goes through it"), least_axes=0,
    ),
    "grouped-query attention": Case(
        "structures:grouped_query_attention", "horseee/LLM-Pruner#64, aim-uofa/LoRAPrune#6",
        "grouped-query attention, rotary positions, RMSNorm, gated MLP", "heads named, MLPs pruned",
        named=("q_proj .channels.",), least_axes=2,
    ),
    "dicts": Case("data:dicts", _DICTS, "samples are dicts", "read as pairs", least_axes=3),
    "one-hot labels": _refused(
        "data:one_hot", _LABELS, "labels are one-hot", "one message that gives the mend", r"int\(label.argmax\(\)\)",
    ),
    "triples": _refused(
        "data:triples", _DICTS, "samples are triples", "one message that gives the mend",
        "found tuple of 3: Tensor, int, str. Give to_input=",
    ),
    "numpy labels": Case("data:numpy_labels", _LABELS, "labels are 0-d arrays", "read as classes", least_axes=3),
    "loaders": Case("data:loaders", _DICTS, "DataLoaders", "their datasets are read", least_axes=3),
    "broken sample": _refused(
        "data:broken_sample", _DICTS, "samples that raise", "one message that names the sample",
        r"train data.*sample \d*7 cannot be read: OSError: image file is truncated",
    ),
    "without labels": _refused(
        "data:without_labels", _LABELS, "labels of -1", "one message that names the labels",
        "labels are no class of the model, such as -1", "Leave samples without a label out",
    ),
    "labels from one": _refused(
        "data:labels_from_one", _LABELS, "labels count from 1", "one message that says so",
        "labels run from 1 to 6, but the classes of model Plain count from 0 to 5. Subtract 1",
    ),
    "compiled": Case(
        "training_habits:compiled", "pytorch/pytorch#150926", "torch.compile", "works", least_axes=3,
    ),
    "traced": _refused(
        "training_habits:traced", "pytorch/pytorch#150926", "torch.jit.trace", "refused, with what to give instead",
        "torch.jit, whose layers cannot be changed. Give the nn.Module",
    ),
    "pruning masks": Case(
        "training_habits:pruning_masks", "pytorch/pytorch#37322", "masks of torch.nn.utils.prune still there",
        "works", least_axes=3,
    ),
    "deformable convolution": Case(
        "structures:deformable", "pytorch/pytorch#185195, openvinotoolkit/openvino#24635, openvinotoolkit/nncf#2794",
        "deformable convolution", "works, or a message that names it",
        engine_exits=(("openvino", (*WORKS, *NOT_BUILT)),), says=("(?i)deform",),
    ),
    "regression": Case(
        "own_tasks:one_number", "openvinotoolkit/nncf#1859, intel/neural-compressor#498",
        "regression, outputs (N,), negative metric", "works", least_axes=3,
    ),
    "global switches": Case(
        "global_switches:task", "choyingw/SynergyNet#22", "gradients switched off at import; prints on stdout",
        "fine-tuning works; --json stays JSON", least_axes=3,
    ),
    "reparametrized": Case(
        "training_habits:reparametrized", "DingXiaoH/RepVGG#26, #66",
        "another computation in eval mode, functional convolutions of modules' weights",
        "named as not reached; fine-tuning sound",
        named=("^r1.big: not reached", "^r1.small: not reached", "^r2.big: not reached"), least_axes=1,
    ),
    "segmentation": Case(
        "own_tasks:segmentation", "open-mmlab/mmsegmentation#3609",
        "labels of pixels, ignored pixels, mean IoU", "works", least_axes=3,
    ),
    "NaN in training images": _refused(
        "data:nan_in_training_images", "NVIDIA/TensorRT#2628, #3112", "NaN and infinity in calibration data",
        "a message that names the data", "calibration samples hold NaN or infinity", "Leave such samples out",
    ),
    "three numbers": Case("own_tasks:three_numbers", _OWN, "regression by a perceptron", "works", least_axes=2),
    "multi-label": Case("own_tasks:multi_label", _OWN, "micro F1 and binary cross-entropy", "works", least_axes=3),
    "two inputs": Case("own_tasks:two_inputs", _OWN, "an image and a vector", "works", least_axes=2),
    "dicts of tokens": Case(
        "own_tasks:dicts_of_tokens", _OWN, "what Hugging Face's Trainer takes", "works", least_axes=2,
    ),
}  # fmt: skip
