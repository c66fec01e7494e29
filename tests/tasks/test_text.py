from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autocompress.config import TaskConfig
from autocompress.errors import ConfigError
from autocompress.model.inventory import take_inventory
from autocompress.tasks import ClassificationTask, LabelFreeTask, load_task

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 12,
    "max_position_embeddings": 16,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "the", "is", "was", "plot"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT classifier with weights and a tokenizer, as transformers stores them."""
    place = tmp_path_factory.mktemp("bert")
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **SIZES}
    (place / "config.json").write_text(json.dumps(config))
    (place / "vocab.txt").write_text("\n".join(WORDS))
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    save_file({name: value.clone() for name, value in model.state_dict().items()}, place / "model.safetensors")
    return place


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "reviews.txt"
    path.write_text("\n".join(f"the film is {'good' if i % 2 else 'bad'}\t{i % 2}" for i in range(60)))
    return path


def test_labelled_texts_make_a_classification_task(folder: Path, texts: Path) -> None:
    task = load_task(TaskConfig(name=f"transformers:{folder}", data=str(texts), calibration_size=16))
    assert isinstance(task, ClassificationTask)
    assert task.classes == 2
    x, targets = next(task.test(100))
    # As many tokens as the texts take, in eights.
    assert x.shape == (12, 2 * 8)
    # [CLS] the film is bad [SEP], then padding; after the numbers the mask.
    assert x[0].tolist() == [2, 8, 6, 9, 5, 3, *[0] * 2, *[1] * 6, *[0] * 2]
    original = transformers.BertForSequenceClassification.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        ids, mask = x.long().split(8, 1)
        expected = original(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(task.model()(x), expected)
    assert set(targets.tolist()) == {0, 1}


def test_an_encoder_without_labels_is_measured_by_its_own_outputs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], **SIZES}))
    config = TaskConfig(name=f"transformers:{tmp_path}", weights="random", metric="agreement", calibration_size=16)
    task = load_task(config)
    assert isinstance(task, LabelFreeTask)
    assert task.kind == "cosine"
    x, targets = next(task.validation(4))
    assert targets.shape == (len(x), 16)
    with pytest.raises(ConfigError, match="no labels"):
        load_task(config.model_copy(update={"metric": None}))


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("transformers:bertt", "random", "neither a folder with config.json nor a model type.*bert"),
        ("transformers:bert", "none.safetensors", "weights none.safetensors do not exist"),
    ],
)
def test_what_cannot_be_found_is_told(name: str, weights: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_task(TaskConfig(name=name, weights=weights, metric="agreement"))


def test_texts_that_cannot_be_used_are_told(folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match="hold 2 lines; at least 10"):
        load_task(TaskConfig(name=f"transformers:{folder}", data=str(few)))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_task(TaskConfig(name=f"transformers:{folder}", data=str(tmp_path / "none.txt")))


def test_the_length_may_be_fixed(folder: Path, texts: Path) -> None:
    config = TaskConfig(name=f"transformers:{folder}", data=str(texts), calibration_size=16, length=12)
    assert load_task(config).example_inputs().shape == (1, 2 * 12)
    with pytest.raises(ConfigError, match=r"task\.length 17 is more than the 16 tokens that the model takes"):
        load_task(config.model_copy(update={"length": 17}))


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A folder of sentence-transformers: BERT, mean and maximum over its tokens, a dense layer, unit length."""
    config = {"model_type": "bert", "architectures": ["BertModel"], **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3"))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "2_Dense").mkdir()
    dense = {
        "in_features": 32,
        "out_features": 6,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(dense))
    torch.manual_seed(0)
    save_file(
        {"linear.weight": torch.randn(6, 32), "linear.bias": torch.randn(6)}, tmp_path / "2_Dense/model.safetensors"
    )
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_sentence_encoder_keeps_what_comes_behind_its_transformer(sentences: Path, texts: Path) -> None:
    task = load_task(
        TaskConfig(name=f"transformers:{sentences}", data=str(texts), metric="cosine", calibration_size=16)
    )
    x = task.example_inputs(5)
    ids, mask = x.long().split(8, 1)
    bert = transformers.BertModel.from_pretrained(str(sentences)).eval()
    dense = load_file(sentences / "2_Dense/model.safetensors")
    with torch.no_grad():
        hidden = bert(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = [h[m.bool()] for h, m in zip(hidden, mask, strict=True)]
        pooled = torch.stack([torch.cat([r.mean(0), r.amax(0)]) for r in rows])
        expected = torch.nn.functional.normalize(
            (pooled @ dense["linear.weight"].T + dense["linear.bias"]).tanh(), dim=-1
        )
        torch.testing.assert_close(task.model()(x), expected, rtol=1e-4, atol=1e-5)
    # The transformer's own pooler is nobody's.
    assert take_inventory(task.network(), task.example_inputs(2)).skipped["model.transformer.pooler.dense"]


def test_a_module_that_is_not_known_is_named(sentences: Path, texts: Path) -> None:
    modules = json.loads((sentences / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.LSTM"
    (sentences / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="has a LSTM; Pooling, Dense and Normalize are known"):
        load_task(TaskConfig(name=f"transformers:{sentences}", data=str(texts), metric="cosine"))


def test_positions_that_begin_behind_padding_leave_fewer_tokens(tmp_path: Path) -> None:
    # RoBERTa's first token has position 2: of 16 positions 14 are a text's.
    place = tmp_path / "roberta"
    place.mkdir()
    sizes = {**SIZES, "pad_token_id": 1}
    config = {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"], **sizes}
    (place / "config.json").write_text(json.dumps(config))
    task = load_task(TaskConfig(name=f"transformers:{place}", weights="random", metric="agreement"))
    assert task.example_inputs().shape == (1, 2 * 14)
    with torch.no_grad():
        assert task.model()(task.example_inputs()).isfinite().all()
    with pytest.raises(ConfigError, match=r"task\.length 15 is more than the 14 tokens"):
        load_task(TaskConfig(name=f"transformers:{place}", weights="random", metric="agreement", length=15))
