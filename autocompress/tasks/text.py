"""The ``transformers:<folder or type>`` tasks: text encoders and classifiers of Hugging Face transformers, offline.

A folder holds ``config.json`` and, unless weights are random, ``model.safetensors`` and the tokenizer's files; a type
(``bert``) takes that type's default configuration. One of sentence-transformers (``modules.json``) keeps its pooling
and what comes behind. Every text becomes token numbers and an attention mask of one fixed length, which the data tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress._optional import optional
from autocompress.config import TaskConfig
from autocompress.errors import ConfigError, nearest
from autocompress.tasks.adapters import Adapter, InputSpec, pack
from autocompress.tasks.base import Task
from autocompress.tasks.classification import ClassificationTask
from autocompress.tasks.image_task import RANDOM
from autocompress.tasks.label_free import UnlabelledTask
from autocompress.tasks.sentence_encoder import is_sentence_encoder, longest_text, sentence_encoder
from autocompress.tasks.split import SplitTask
from autocompress.tasks.tokens import TOKENIZER_NAME, TextTokens
from autocompress.tasks.weights import apply_weights, read_weights

transformers: Any = optional("transformers", "transformers", "A text task")

LENGTH = 128  # tokens of a text where no texts tell
# Texts longer than this share of them are cut, and lengths are multiples of so many tokens.
_LONGEST, _STEP = 0.95, 8
_NOISE_SIZE = 256  # texts made where there is no data
_WEIGHTS = "model.safetensors"
# What an encoder or a classifier is used for, by what its output calls it; the first that is there is kept.
_OUTPUTS = ("logits", "pooler_output", "last_hidden_state")
_TEST_SHARE = 5  # every fifth text is for testing


def transformers_task(config: TaskConfig, name: str) -> Task:
    """Return a text model with its texts: ``task.data`` is a UTF-8 file with a text per line.

    A line that ends in a tab and a class number is labelled; if all are, and the model gives logits, accuracy is
    measured, else `TaskConfig.metric` says how. Without data, token numbers are drawn at random.

    Raises:
        ConfigError: Configuration, weights or data are missing or cannot be used.
    """
    where = f"Task {config.name!r}"
    folder = Path(name).expanduser()
    model = _model(where, folder, name, config)
    most = _most_tokens(folder, model)
    labels: list[int] | None = None
    tokens: TextTokens | None = None
    notes: tuple[str, ...] = ()
    if config.data is None:
        specs = _specs(_length(where, config.length, most, torch.tensor([LENGTH])))
        inputs = _noise(int(model.config.vocab_size), specs)
    else:
        texts, labels = _read(Path(config.data).expanduser())
        tokenizer = _tokenizer(where, folder)
        counts = torch.tensor([len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]])
        length = _length(where, config.length, min(most, int(tokenizer.model_max_length)), counts)
        specs = _specs(length)
        made = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        inputs = pack(made, specs)
        tokens = _stored(folder, tokenizer, length)
        cut = int((counts > length).sum())
        notes = (f"texts become {length} tokens each: {cut} of {len(texts)} are cut (task.length sets another)",)
    kept = None
    if is_sentence_encoder(folder):
        model = sentence_encoder(where, folder, model)
    else:
        with torch.no_grad():
            given = model(**{spec.name: torch.ones(1, *spec.shape, dtype=torch.int64) for spec in specs})
        kept = next((key for key in _OUTPUTS if given.get(key) is not None), None)
    adapted = Adapter(model, specs, () if kept is None else (kept,))
    held = torch.arange(len(inputs)) % _TEST_SHARE == 0
    options: dict[str, Any] = {
        "name": f"transformers-{folder.name}",
        "validation_fraction": config.validation_fraction,
        "calibration_size": config.calibration_size,
        "seed": config.seed,
    }
    if labels is not None and kept == "logits" and config.metric is None:
        targets = torch.tensor(labels)
        task = ClassificationTask(adapted, (inputs[~held], targets[~held]), (inputs[held], targets[held]), **options)
        return _told(task, tokens, notes)
    if config.metric is None:
        raise ConfigError(
            f"{where}: there are no labels. Give --metric agreement (task.metric) to measure by the uncompressed "
            "model's own outputs, or end every line of task.data in a tab and a class number."
        )
    outputs = "classes" if kept == "logits" else "values"
    return _told(UnlabelledTask(adapted, inputs[~held], inputs[held], outputs=outputs, **options), tokens, notes)


def _told(task: SplitTask, tokens: TextTokens | None, notes: tuple[str, ...]) -> Task:
    task.tokens, task.data_notes = tokens, (*task.data_notes, *notes)
    return task


def _specs(length: int) -> list[InputSpec]:
    return [InputSpec("input_ids", (length,), "int64"), InputSpec("attention_mask", (length,), "int64")]


def _most_tokens(folder: Path, model: Any) -> int:
    """Return the most tokens of one text that a model takes."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from behind the one that padding has.
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == positions]
    taken = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
    known = [longest_text(folder), positions and positions - taken]
    return min((int(most) for most in known if most), default=LENGTH)


def _length(where: str, wanted: int | None, most: int, counts: Tensor) -> int:
    """Return how many tokens every text gets: what is wanted, or what all but the longest texts take.

    Args:
        where: Who asks, for messages.
        wanted: The user's.
        most: That the model takes.
        counts: Tokens of each text ``(n,)``.

    Raises:
        ConfigError: The model does not take so many.
    """
    if wanted is not None:
        if wanted > most:
            raise ConfigError(f"{where}: task.length {wanted} is more than the {most} tokens that the model takes.")
        return wanted
    usual = int(torch.quantile(counts.double(), _LONGEST, interpolation="higher"))
    return min(most, -(-usual // _STEP) * _STEP)


def _stored(folder: Path, tokenizer: Any, length: int) -> TextTokens | None:
    """Return how a deployed model makes tokens; None where the folder has no tokenizer that needs no other package."""
    file = folder / TOKENIZER_NAME
    if not file.exists() or tokenizer.pad_token_id is None:
        return None
    return TextTokens(file, length, int(tokenizer.pad_token_id), str(tokenizer.pad_token), str(tokenizer.padding_side))


def _model(where: str, folder: Path, name: str, config: TaskConfig) -> Any:
    if (folder / "config.json").exists():
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    elif name in transformers.CONFIG_MAPPING:
        settings = transformers.AutoConfig.for_model(name)
    else:
        raise ConfigError(
            f"{where}: {name!r} is neither a folder with config.json nor a model type of transformers."
            f"{nearest(name, list(transformers.CONFIG_MAPPING))}"
        )
    weights = config.weights or str(folder / _WEIGHTS)
    if weights != RANDOM and not Path(weights).expanduser().exists():
        raise ConfigError(
            f"{where}: weights {weights} do not exist. Give task.weights: a safetensors file, or 'random' to measure "
            "latency only."
        )
    architecture = next(iter(settings.architectures or ()), None)
    maker = getattr(transformers, architecture or "", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        # The plain form of attention: its products are matrix products that every exporter and tracer knows.
        if maker is None:
            model = transformers.AutoModel.from_config(settings, attn_implementation="eager")
        else:
            model = maker._from_config(settings, attn_implementation="eager")
    if weights != RANDOM:
        _load(model, weights)
    return model.eval()


def _load(model: nn.Module, weights: str) -> None:
    """Load weights, whose names may lack or have more of the base model's prefix, and buffers that are now made."""
    state, own = read_weights(weights), model.state_dict()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    named = {}
    for key, value in state.items():
        shorter = key.removeprefix(prefix)
        found = next((name for name in (key, shorter, prefix + key) if name in own), None)
        if found is not None:
            named[found] = value
        elif not key.endswith(("position_ids", "token_type_ids")):
            named[key] = value
    apply_weights(model, named, weights)


def _read(path: Path) -> tuple[list[str], list[int] | None]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Texts {path} cannot be read: {error}. task.data is a UTF-8 file, a text per line."
        ) from error
    if len(lines) < 2 * _TEST_SHARE:
        raise ConfigError(f"Texts {path} hold {len(lines)} lines; at least {2 * _TEST_SHARE} are needed.")
    parts = [line.rpartition("\t") for line in lines]
    if all(tab and label.strip().isdigit() for _, tab, label in parts):
        return [text for text, _, _ in parts], [int(label) for _, _, label in parts]
    return lines, None


def _tokenizer(where: str, folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {folder} holds no tokenizer that transformers can load: {error}") from error


def _noise(vocabulary: int, specs: list[InputSpec]) -> Tensor:
    length = specs[0].shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (_NOISE_SIZE, length), generator=generator)
    lengths = torch.randint(length // 4, length + 1, (_NOISE_SIZE, 1), generator=generator)
    return pack({"input_ids": ids, "attention_mask": torch.arange(length) < lengths}, specs)
