"""Int8 of every linear layer of a transformer, by range alone, with outliers moved, and with the worst layers left out.

    python benchmarks/methods/smoothquant.py minilm --weights DIR --sentences FILE --pairs FILE
    python benchmarks/methods/smoothquant.py vit
    python benchmarks/methods/smoothquant.py --table

*minilm*: all-MiniLM-L6-v2. DIR holds its ``config.json``, tokenizer and weights; FILE has a sentence per line, of which
the first 1,024 calibrate and the last 200 are held out; a line of the pairs is two sentences and a tab between. Figures
are the mean cosine to the fp32 embeddings, and Spearman's correlation of the pairs' similarities with those of fp32.
*vit*: a DeiT-tiny of four blocks, trained here on scikit-learn's digits; mean cosine of the logits to fp32, and
the accuracy. Accuracy alone is measured, never time. Writes benchmarks/methods/results/smoothquant-NAME.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from importances import RESULTS
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from autocompress import environment
from autocompress.compress import CompressionContext, apply_policy, rewrite
from autocompress.compress.quantization import calibrate, quantization_mode, quantized_layers
from autocompress.compress.smoothing import divisors
from autocompress.config import QuantizationConfig
from autocompress.engines import EngineOptions, get_engine
from autocompress.files import read_json, write_json
from autocompress.graph.builder import exported, ranges_for
from autocompress.graph.export import save_onnx
from autocompress.model.inventory import take_inventory
from autocompress.policy import CompressionPolicy, LayerPolicy
from autocompress.tasks import Adapter, InputSpec, pack

LENGTH, BATCH, CALIBRATED, HELD_OUT = 32, 256, 1024, 200
# Layers left out, those that lose most when they alone are int8.
LEFT_OUT = 4
ENGINES = ("openvino", "onnxruntime")


@dataclass(frozen=True)
class Subject:
    """One network and its data.

    Attributes:
        model: Rewritten, in eval mode.
        calibration: Inputs ``(N, ...)``.
        evaluated: Inputs to what is measured of them, ``(N, ...)`` each.
        figures: Name to what outputs ``(N, C)`` and those of fp32 make.
    """

    model: nn.Module
    calibration: Tensor
    evaluated: dict[str, Tensor]
    figures: Callable[[str, Tensor, Tensor], dict[str, float]]


def cosine(outputs: Tensor, wanted: Tensor) -> float:
    """Return the mean cosine of rows ``(N, C)``."""
    return float(functional.cosine_similarity(outputs, wanted, dim=1).mean())


class Encoder(nn.Module):
    """The normalised mean of a BERT's tokens ``(N, C)``."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token ids and their mask ``(N, LENGTH)``."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(hidden.dtype)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


def minilm(arguments: argparse.Namespace) -> Subject:
    """Return MiniLM with sentences and pairs of them."""
    from transformers import AutoModel, AutoTokenizer

    specs = [InputSpec("input_ids", (LENGTH,), "int64"), InputSpec("attention_mask", (LENGTH,), "int64")]
    tokenizer = AutoTokenizer.from_pretrained(arguments.weights)

    def tokens(texts: list[str]) -> Tensor:
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return pack({spec.name: found[spec.name] for spec in specs}, specs)

    def similarities(outputs: Tensor) -> Tensor:
        return functional.cosine_similarity(outputs[0::2], outputs[1::2], dim=1)

    def figures(name: str, outputs: Tensor, wanted: Tensor) -> dict[str, float]:
        found = {f"cosine, {name}": cosine(outputs, wanted)}
        if name == "pairs":
            found["Spearman"] = float(spearmanr(similarities(outputs), similarities(wanted))[0])
        return found

    lines = arguments.sentences.read_text().splitlines()
    pairs = [side for line in arguments.pairs.read_text().splitlines() for side in line.split("\t")]
    bert = AutoModel.from_pretrained(arguments.weights, add_pooling_layer=False)
    return Subject(
        rewrite(Adapter(Encoder(bert).eval(), specs)).eval(),
        tokens(lines[:CALIBRATED]),
        {"held out": tokens(lines[-HELD_OUT:]), "pairs": tokens(pairs)},
        figures,
    )


def vit(arguments: argparse.Namespace) -> Subject:
    """Return a small DeiT trained on digits."""
    from sklearn.datasets import load_digits
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    train, test = slice(0, 1400), slice(1400, None)
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=192, depth=4, num_heads=3, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=0.05)
    for _ in range(arguments.epochs):
        for chosen in torch.randperm(1400).split(64):
            loss = functional.cross_entropy(model(images[train][chosen]), labels[train][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def figures(name: str, outputs: Tensor, wanted: Tensor) -> dict[str, float]:
        right = outputs.argmax(1) == labels[test]
        return {f"cosine, {name}": cosine(outputs, wanted), "accuracy": float(right.float().mean())}

    return Subject(rewrite(model.eval()), images[train][:512], {"test": images[test]}, figures)


SUBJECTS = {"minilm": minilm, "vit": vit}


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a model gives ``(N, C)``."""
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(BATCH)])


class Bench:
    """All settings of one network."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.wanted = {name: outputs_of(subject.model, inputs) for name, inputs in subject.evaluated.items()}
        inventory = take_inventory(subject.model, subject.calibration[:2])
        self.layers = [name for name, layer in inventory.layers.items() if layer.quantizable]

    def int8(self, layers: list[str], calibration: str, *, smooth: bool) -> nn.Module:
        """Return the network with these layers in int8."""
        policy = CompressionPolicy(layers=dict.fromkeys(layers, LayerPolicy("int8")))
        config = QuantizationConfig(calibration=calibration)
        context = CompressionContext(self.subject.calibration[:2], quantization=config)
        model = apply_policy(self.subject.model, policy, context)
        batches = self.subject.calibration.split(BATCH)
        if smooth:
            calibrate(model, batches)
            return model
        with quantization_mode(model, "observe"), torch.no_grad():
            for batch in batches:
                model(batch)
        for name, layer in quantized_layers(model):
            layer.input_quantizer.finish(name)
            layer.simulate = True
        return model

    def worst(self, calibration: str) -> list[str]:
        """Return the layers that lose most alone, by the cosine on calibration data."""
        inputs = self.subject.calibration[:64]
        wanted = outputs_of(self.subject.model, inputs)
        model = self.int8(self.layers, calibration, smooth=False)
        found = {}
        for name, layer in quantized_layers(model):
            with quantization_mode(model, "off"):
                layer.simulate, layer.input_quantizer.mode = True, "quantize"
                found[name] = cosine(outputs_of(model, inputs), wanted)
        return sorted(found, key=lambda name: found[name])[:LEFT_OUT]

    def measured(self, outputs: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the figures of what makes outputs of inputs."""
        found: dict[str, float] = {}
        for name, inputs in self.subject.evaluated.items():
            found |= self.subject.figures(name, outputs(inputs), self.wanted[name])
        return {name: round(value, 5) for name, value in found.items()}

    def by_engine(self, model: nn.Module, engine: str, config: QuantizationConfig) -> dict[str, float]:
        """Return the figures of a built file, run sample by sample."""
        example = self.subject.calibration[:1]
        graph = exported(model, example, ranges_for(engine, model, [self.subject.calibration], config), engine)
        with tempfile.TemporaryDirectory() as folder:
            save_onnx(graph.model, Path(folder) / "model.onnx")
            runtime = get_engine(engine)
            file = runtime.build(Path(folder) / "model.onnx", EngineOptions("fp32", 1, 1), Path(folder) / "built")
            with runtime.open(file) as runner:
                return self.measured(
                    lambda inputs: torch.from_numpy(np.concatenate([runner.infer(x.numpy()) for x in inputs.split(1)]))
                )

    def run(self) -> dict[str, Any]:
        """Return the figures of every setting."""
        worst = self.worst("minmax")
        settings: dict[str, tuple[list[str], str, bool]] = {
            "ranges by mse": (self.layers, "mse", False),
            "ranges by minmax": (self.layers, "minmax", False),
            f"minmax, {LEFT_OUT} worst left out": ([n for n in self.layers if n not in worst], "minmax", False),
            "mse and SmoothQuant": (self.layers, "mse", True),
            "minmax and SmoothQuant": (self.layers, "minmax", True),
        }
        found: dict[str, Any] = {"fp32": {"torch": self.measured(lambda x: outputs_of(self.subject.model, x))}}
        for name, (layers, calibration, smooth) in settings.items():
            model = self.int8(layers, calibration, smooth=smooth)
            row: dict[str, Any] = {"int8": len(layers), "divided": len(divisors(model))}
            row["torch"] = self.measured(lambda x, model=model: outputs_of(model, x))
            for engine in ENGINES:
                row[engine] = self.by_engine(model, engine, QuantizationConfig(calibration=calibration))
            found[name] = row
            print(name, row, flush=True)
        return found


def table() -> None:
    """Print every result as Markdown."""
    for path in sorted(RESULTS.glob("smoothquant-*.json")):
        result = read_json(path)
        rows = result["settings"]
        names = list(rows["fp32"]["torch"])
        print(f"**{result['name']}**, {result['layers']} layers in int8\n")
        print("| int8 | divided | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
        for setting, row in rows.items():
            cells = [
                " / ".join(f"{row[where][name]:.4f}" for where in ("torch", *ENGINES) if where in row) for name in names
            ]
            print(f"| {setting} | {row.get('divided', '')} | " + " | ".join(cells) + " |")
        print()


def main() -> None:
    """Measure one network, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(SUBJECTS))
    parser.add_argument("--weights", help="folder of MiniLM")
    parser.add_argument("--sentences", type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--epochs", type=int, default=30, help="of the ViT's training")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table or arguments.name is None:
        table()
        return
    bench = Bench(SUBJECTS[arguments.name](arguments))
    result = {"name": arguments.name, "layers": len(bench.layers), "settings": bench.run()}
    write_json(RESULTS / f"smoothquant-{arguments.name}.json", {**result, "environment": environment.describe()})


if __name__ == "__main__":
    main()
