"""The run file: defaults, files, options and --set laid over each other; every mistake names its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from autocompress.config import SAMPLERS, RunConfig, load_config
from autocompress.errors import ConfigError
from autocompress.quantities import Limit


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


def test_the_defaults_are_valid_and_set_no_limit() -> None:
    config = load_config()
    assert config == RunConfig()
    assert (config.latency_limit, config.drop_limit, config.size_limit, config.timeout_seconds) == (None,) * 4


def test_limits_are_kept_as_written_and_parsed() -> None:
    config = load_config(overrides={"target_latency": "0.5x", "max_drop": "1pp", "max_size": "20MB", "timeout": "4m"})
    assert config.target_latency == "0.5x"
    assert config.latency_limit == Limit(0.5, relative=True)
    assert config.drop_limit == pytest.approx(0.01)
    assert config.size_limit == Limit(20e6, relative=False)
    assert config.timeout_seconds == 240


def test_file_then_options_then_sets(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 1\nn_trials: 10\nthreads: 2\ntask: {name: digits, seed: 5}\n")
    config = load_config(
        file, {"n_trials": 20, "threads": None, "task.model": "m:f"}, ["seed=3", "recovery.epochs=1e-1"]
    )
    assert (config.seed, config.n_trials, config.threads) == (3, 20, 2)
    assert (config.task.seed, config.task.model, config.recovery.epochs) == (5, "m:f", 0.1)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == RunConfig()


def test_a_set_can_clear_a_key() -> None:
    assert load_config(overrides={"target_latency": "5ms"}, sets=["target_latency="]).target_latency is None


def test_what_is_dumped_loads_again(tmp_path: Path) -> None:
    config = load_config(overrides={"target_latency": "5ms", "recovery.enabled": False})
    assert load_config(write(tmp_path, yaml.safe_dump(config.model_dump()))) == config


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("attention", {"attention": None}),
        ("[logits, attention]", {"logits": None, "attention": None}),
        ("{logits: 1, features: 0.5}", {"logits": 1.0, "features": 0.5}),
    ],
)
def test_methods_of_distillation_with_and_without_weights(
    written: str, meant: dict[str, float | None], tmp_path: Path
) -> None:
    config = load_config(write(tmp_path, f"recovery: {{distill: {written}, distill_at: [layer1]}}"))
    assert config.recovery.distill == meant and config.recovery.distill_at == {"layer1": "layer1"}
    assert load_config(sets=[f"recovery.distill={written}"]).recovery.distill == meant
    assert load_config(write(tmp_path, yaml.safe_dump(config.model_dump()))) == config
    assert RunConfig().recovery.distill == {"logits": None}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(sampler: str) -> None:
    assert load_config(overrides={"sampler": sampler}).sampler == sampler


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("n_trial: 5", ["unknown key 'n_trial'", "Did you mean 'n_trials'?"]),
        ("task: {modle: x}", ["unknown key 'task.modle'", "Did you mean 'model'?"]),
        ("recovery: {epoch: 1}", ["unknown key 'recovery.epoch'", "'epochs'"]),
        ("1: 2", ["1"]),
        ("n_trials: 0", ["n_trials = 0", "greater than or equal to 1"]),
        ("recovery: {alpha: 2}", ["recovery.alpha = 2"]),
        ("recovery: {distill: {logits: 0}}", ["recovery.distill", "weight of 'logits' is 0.0"]),
        ("recovery: {distill: []}", ["recovery.distill"]),
        ("recovery: {distill: 3}", ["recovery.distill = 3"]),
        ("recovery: {distill_at: layer1}", ["recovery.distill_at = 'layer1'"]),
        ("task: 3", ["task = 3"]),
        ("task: {validation_fraction: 0.9}", ["task.validation_fraction = 0.9", "less than 0.5"]),
        ("dense_dtype: fp8", ["dense_dtype = 'fp8'", "'bf16'"]),
        ("sampler: tpee", ["sampler = 'tpee'", "Did you mean 'tpe'?", "nsga2"]),
        ("seed: [1]", ["seed = [1]"]),
        ("n_trials: 0\nthreads: 0", ["n_trials = 0", "threads = 0"]),
    ],
)
def test_mistakes_name_file_key_and_nearest_word(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"In {file}: ")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"target_latency": "5"}, "target latency '5' has no unit"),
        ({"target_latency": 5}, "target latency '5' has no unit. Write it as '5ms'"),
        ({"timeout": 90}, "timeout '90' has no unit. Write it as '90s'"),
        ({"max_drop": "1%"}, "maximum drop '1%'"),
        ({"max_drop": 0.01}, "maximum drop '0.01'"),
        ({"max_size": "20mb"}, "unknown unit 'mb'"),
        ({"timeout": True}, "timeout = True"),
    ],
)
def test_bad_limits_are_found_before_anything_runs(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must be a mapping of keys, found list"),
        ("just words", "found str"),
        ("a: [", "cannot be read"),
        ("!!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_files_that_are_no_run_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "must be written key=value"),
        ("=3", "must be written key=value"),
        ("seed=[", "not a YAML scalar"),
        ("seed.x=1", "seed"),
        ("task.modle=1", "task.modle"),
    ],
)
def test_bad_sets(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides={"seed": 1}, sets=[text])


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 1  # type: ignore[misc]
