"""Deep Compression of LeNet-300-100 and LeNet-5: how small is the file at no more test error than the dense network.

    python benchmarks/methods/deep_compression.py --data DIR --out benchmarks/methods/results/deep-compression.json
    python benchmarks/methods/deep_compression.py --table benchmarks/methods/results/deep-compression.json

DIR holds the four IDX files of MNIST or of a set in its form, such as Debian's package dataset-fashion-mnist has in
/usr/share/datasets/fashion-mnist. The ratio is the bytes of the dense fp32 weights as a .safetensors file over those of
our container on disk; the error is that of the network whose weights were read back from it. Training, pruning and
sharing see 55,000 images; 5,000 are held out to choose settings by; test images train nothing. While it is pruned and
shared, a network sees images moved by up to a pixel, which the dense one did not; what the dense one gains from as
many epochs of those is measured, too.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autocompress.files import read_json, write_json
from autocompress.recovery.distillation import distillation_loss
from autocompress.storage import pack, unpack
from autocompress.storage.coders import CODERS
from autocompress.storage.quantizers import quantizer
from autocompress.storage.sharing import share_weights
from autocompress.storage.sparsity import bake, gradual_sparsity, magnitude_masks, masked_weights, set_masks

BATCH = 128
VALIDATION = 5000
# Masks are renewed this often while sparsity rises.
PRUNE_EVERY = 50
# Of the distillation from the dense network while it is pruned and shared.
ALPHA, TEMPERATURE = 0.3, 3.0
# Pixels by which images move then, at most, each way.
SHIFT = 1


def lenet_300_100() -> nn.Module:
    """Return LeCun's network of two hidden layers, 266,610 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )  # fmt: skip


def lenet_5() -> nn.Module:
    """The one of Caffe, 431,080 parameters, which the papers compress."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    ).to(memory_format=torch.channels_last)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How one network is trained and compressed: sparsity and bits per parameter, epochs and learning rates."""

    make: Callable[[], nn.Module]
    sparsity: dict[str, float]
    bits: dict[str, int]
    goal: float
    dense_epochs: int = 20
    dense_lr: float = 0.1
    prune_epochs: int = 12
    retrain_epochs: int = 12
    share_epochs: int = 4
    prune_lr: float = 0.05
    share_lr: float = 5e-4


RECIPES = {
    "LeNet-300-100": Recipe(
        lenet_300_100,
        {"1.weight": 0.919, "3.weight": 0.84, "5.weight": 0.3},
        {"1.weight": 4, "3.weight": 4, "5.weight": 4, "1.bias": 4, "3.bias": 4},
        40,
        retrain_epochs=28,
        prune_lr=0.1,
        share_lr=2e-4,
    ),
    "LeNet-5": Recipe(
        lenet_5,
        {"0.weight": 0.3, "2.weight": 0.7, "5.weight": 0.94, "7.weight": 0.7},
        {"0.weight": 5, "2.weight": 4, "5.weight": 4, "7.weight": 4, "5.bias": 5},
        39,
        dense_epochs=12,
        dense_lr=0.05,
        prune_epochs=5,
        retrain_epochs=8,
        share_epochs=2,
    ),
}


@dataclass(frozen=True)
class Data:
    """Images ``(N, 1, 28, 28)`` and classes ``(N,)``, normalised."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(folder: Path) -> Data:
    """Read the IDX files, gzipped or not."""

    def idx(name: str, offset: int) -> np.ndarray:
        file = folder / f"{name}.gz"
        raw = gzip.decompress(file.read_bytes()) if file.exists() else (folder / name).read_bytes()
        return np.frombuffer(raw, np.uint8, offset=offset)

    def part(name: str) -> tuple[Tensor, Tensor]:
        pixels = idx(f"{name}-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28)
        images = torch.from_numpy(pixels.copy()).float() / 255
        return images, torch.from_numpy(idx(f"{name}-labels-idx1-ubyte", 8).copy()).long()

    (images, labels), test = part("train"), part("t10k")
    mean, std = images.mean(), images.std()
    images, test = (images - mean) / std, ((test[0] - mean) / std, test[1])
    return Data((images[VALIDATION:], labels[VALIDATION:]), (images[:VALIDATION], labels[:VALIDATION]), test)


def error(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Return the share of wrong top-1 answers."""
    model.eval()
    with torch.no_grad():
        wrong = sum(
            int((model(images).argmax(1) != labels).sum())
            for images, labels in zip(part[0].split(1000), part[1].split(1000), strict=True)
        )
    return wrong / len(part[1])


def train(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    generator: torch.Generator,
    *,
    teacher: nn.Module | None = None,
    shift: int = 0,
    before_step: Callable[[int, int], None] = lambda step, steps: None,
) -> None:
    """Train in place for the labels, and for the outputs of a teacher where one is given; images move by `shift`."""
    images, labels = data.train
    padded = nn.functional.pad(images[:, 0], (shift,) * 4, value=float(images.min()))
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], steps + 1, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for step, batch in enumerate(_batches(len(labels), epochs, generator)):
        before_step(step, steps)
        optimizer.zero_grad()
        seen = _moved(padded, batch, shift, generator) if shift else images[batch]
        outputs = model(seen)
        loss = nn.functional.cross_entropy(outputs, labels[batch])
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(seen)
            loss = (1 - ALPHA) * loss + ALPHA * distillation_loss(outputs, wanted, TEMPERATURE)
        loss.backward()
        optimizer.step()
        schedule.step()


def _moved(padded: Tensor, batch: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return images `(batch, 1, 28, 28)` cut out of padded ones, each at a place of its own."""
    side = torch.arange(padded.shape[-1] - 2 * shift)
    down, right = torch.randint(0, 2 * shift + 1, (2, len(batch), 1), generator=generator)
    return padded[batch[:, None, None], (down + side)[:, :, None], (right + side)[:, None, :]].unsqueeze(1)


def _batches(count: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator)[: count // BATCH * BATCH].view(-1, BATCH)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer of the dense and of the pruned network."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def prune(model: nn.Module, data: Data, recipe: Recipe, generator: torch.Generator, teacher: nn.Module) -> None:
    """Raise the sparsity of every layer while training, then train on at what it has."""
    parameters = dict(model.named_parameters())
    set_masks(model, {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in recipe.sparsity})
    share = recipe.prune_epochs / (recipe.prune_epochs + recipe.retrain_epochs)

    def renew(step: int, steps: int) -> None:
        progress = step / steps / share
        if step % PRUNE_EVERY == 0 and progress <= 1 + PRUNE_EVERY / steps / share:
            wanted = {name: gradual_sparsity(progress, final) for name, final in recipe.sparsity.items()}
            set_masks(model, magnitude_masks(masked_weights(model), wanted))

    epochs = recipe.prune_epochs + recipe.retrain_epochs
    optimizer = sgd(model, recipe.prune_lr)
    train(model, data, optimizer, epochs, generator, teacher=teacher, shift=SHIFT, before_step=renew)
    bake(model)


def share(model: nn.Module, data: Data, recipe: Recipe, generator: torch.Generator, teacher: nn.Module) -> None:
    """Share weights and train the levels."""
    share_weights(model, recipe.bits, quantizer("codebook"))
    train(
        model,
        data,
        torch.optim.Adam(model.parameters(), recipe.share_lr),
        recipe.share_epochs,
        generator,
        teacher=teacher,
        shift=SHIFT,
    )
    bake(model)


def run(name: str, seed: int, data: Data) -> dict[str, Any]:
    """Return the figures of one network and seed, at every stage."""
    recipe, started = RECIPES[name], time.monotonic()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = recipe.make()
    errors: dict[str, dict[str, float]] = {}

    def note(stage: str, of: nn.Module = model) -> None:
        errors[stage] = {"validation": error(of, data.validation), "test": error(of, data.test)}
        print(f"{name} seed {seed} {stage}: {errors[stage]}, {time.monotonic() - started:.0f} s", flush=True)

    train(model, data, sgd(model, recipe.dense_lr), recipe.dense_epochs, generator)
    note("dense")
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.safetensors"
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, dense)
        original = dense.stat().st_size
        teacher = copy.deepcopy(model).eval()
        longer = copy.deepcopy(model)
        epochs = recipe.prune_epochs + recipe.retrain_epochs
        train(longer, data, sgd(longer, recipe.prune_lr), epochs, generator, teacher=teacher, shift=SHIFT)
        note("dense, trained on", longer)
        prune(model, data, recipe, generator, teacher)
        note("pruned")
        share(model, data, recipe, generator, teacher)
        note("shared")
        state = {key: value.clone() for key, value in model.state_dict().items()}
        packed = pack(state, Path(folder) / "packed")
        by_coder = {
            coder: pack(state, Path(folder) / coder, coders=("raw", coder)).size_bytes for coder in CODERS
        }  # fmt: skip
        back = unpack(Path(folder) / "packed")
    same = all(torch.equal(back[key].view(torch.int32), state[key].view(torch.int32)) for key in state)
    model.load_state_dict(back)
    note("unpacked")
    ratio = original / packed.size_bytes
    print(f"{name} seed {seed}: {original} -> {packed.size_bytes} bytes, {ratio:.2f}x, identical {same}", flush=True)
    return {
        "network": name, "seed": seed, "goal": recipe.goal, "errors": errors, "original_bytes": original,
        "size_bytes": packed.size_bytes, "ratio": ratio, "bit_identical": same, "size_bytes_by_coder": by_coder,
        "met": ratio >= recipe.goal and errors["unpacked"]["test"] <= errors["dense"]["test"],
        "tensors": [one.to_dict() for one in packed.tensors],
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table, one line per network: mean and range over seeds."""
    lines = [
        "| network | dense | ours | ratio (least) | test error, dense | ours | per seed | met | dense, trained on |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(one["network"] for one in runs):
        of = [one for one in runs if one["network"] == name]
        dense = [one["errors"]["dense"]["test"] for one in of]
        ours = [one["errors"]["unpacked"]["test"] for one in of]
        pairs = ", ".join(f"{a:.2%} → {b:.2%}" for a, b in zip(dense, ours, strict=True))
        ratios = [one["ratio"] for one in of]
        cells = (
            name, f"{of[0]['original_bytes']:,} B", f"{statistics.mean(one['size_bytes'] for one in of):,.0f} B",
            f"{statistics.mean(ratios):.1f}x ({min(ratios):.1f}x), goal {of[0]['goal']:g}x",
            f"{statistics.mean(dense):.2%}", f"{statistics.mean(ours):.2%}", pairs,
            f"{sum(one['met'] for one in of)} of {len(of)}",
            f"{statistics.mean(one['errors']['dense, trained on']['test'] for one in of):.2%}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Folder of the IDX files.")
    parser.add_argument("--networks", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="JSON; runs of other networks and seeds that it has are kept.")
    parser.add_argument("--table", type=Path, metavar="JSON", help="Print what a file holds, run nothing.")
    options = parser.parse_args()
    if options.table:
        print(table(read_json(options.table)["runs"]))
        return
    data = load(options.data)
    for name in options.networks:
        for seed in options.seeds:
            found = run(name, seed, data)
            if options.out is None:
                continue
            before = read_json(options.out)["runs"] if options.out.exists() else []
            kept = [one for one in before if (one["network"], one["seed"]) != (name, seed)]
            runs = sorted([*kept, found], key=lambda one: (list(RECIPES).index(one["network"]), one["seed"]))
            write_json(options.out, {"data": options.data.name, "torch": torch.__version__, "runs": runs})


if __name__ == "__main__":
    main()
