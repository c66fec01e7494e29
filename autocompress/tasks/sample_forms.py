"""What one sample of a user's data is: how it becomes an input tensor and a class number, and what is said of others.

Owns single values and samples; knows no data set and no model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Keys that hold a sample's class in dict samples, in this order where there are several.
LABEL_KEYS = ("label", "labels", "target", "targets", "class", "y", "fine_label", "label_ids")
TOKENS_NEEDED = (
    "a network takes tokens, not text. Tokenize it (a function from a sample to ({'input_ids': ids, 'attention_mask': "
    "mask}, class) is to_input=...), or give the folder of a Hugging Face model as the task transformers:FOLDER"
)


class SampleError(ValueError):
    """What is wrong with one sample, to be said behind its name: begins with its own separator."""


def read_pair(sample: object) -> tuple[Tensor, int]:
    """Return the input ``(...)`` and the class number of a sample that is a pair of them.

    Raises:
        SampleError: It is none.
    """
    if not (isinstance(sample, (tuple, list)) and len(sample) == 2):
        raise SampleError(f" must be (input tensor, class number), found {described(sample)}.")
    inputs = numbers(sample[0])
    if inputs is None or (inputs.ndim == 0 and not isinstance(sample[0], Tensor)):
        kind = type(sample[0]).__name__
        mend = (
            "Add a transform that makes tensors" if not isinstance(sample[0], str) else f"It is text: {TOKENS_NEEDED}"
        )
        raise SampleError(
            f" must be (input tensor, class number), found {type(sample).__name__} with a {kind} for input. {mend}."
        )
    return inputs, class_number(sample[1])


def numbers(value: object) -> Tensor | None:
    """Return a value as a tensor of plain class, sharing memory where it can; None where it holds no numbers."""
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        try:
            return torch.stack([part.as_subclass(Tensor) for part in value])
        except (TypeError, RuntimeError, AttributeError):
            return None
    if isinstance(value, (np.ndarray, np.generic, bool, int, float, list, tuple)):
        try:
            # torch.as_tensor makes float32 of Python's floats and keeps the dtype of arrays.
            return torch.as_tensor(value if not isinstance(value, np.generic) else np.asarray(value))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return None
    return None


def class_number(label: object) -> int:
    """Return the class number that a label is.

    Raises:
        SampleError: It is a word, a fraction, or several values.
    """
    if isinstance(label, (list, tuple)):
        label = numbers(label) if numbers(label) is not None else label
    size = label.numel() if isinstance(label, Tensor) else label.size if isinstance(label, np.ndarray) else 1
    where = ": the label must be a class number, found"
    if size != 1:
        raise SampleError(
            f"{where} {size} values. If it is one-hot, give the position of the one: int(label.argmax()). "
            "If the sample is a batch, give its samples one by one."
        )
    try:
        number = float(label.item() if isinstance(label, (Tensor, np.ndarray)) else label)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise SampleError(f"{where} {label!r}. Number the classes from 0 on.") from error
    if not number.is_integer():
        raise SampleError(
            f"{where} {number:.6g}. For values instead of classes, write a Task of your own (docs/tasks.md)."
        )
    return int(number)


def label_key(sample: Mapping[Any, Any]) -> Any:
    """Return the key of a dict sample that holds its class, or None."""
    found = [key for name in LABEL_KEYS for key in sample if str(key).lower() == name]
    return found[0] if found else None


def described(sample: object) -> str:
    """Return what a sample is that is no pair, and how to make it one."""
    wrap = "Give to_input=, a function from such a sample to"
    if isinstance(sample, str):
        return f"text, {sample[:40]!r}: {TOKENS_NEEDED}"
    if isinstance(sample, Mapping):
        keys = ", ".join(map(repr, sample))
        return (
            f"a {type(sample).__name__} with keys {keys}. Name the class number one of "
            f"{', '.join(map(repr, LABEL_KEYS[:4]))}, or give to_input=, a function from such a sample to two of them"
        )
    if isinstance(sample, (tuple, list)):
        kinds = ", ".join(type(part).__name__ for part in sample)
        pair = "two of them, or to ({name: tensor}, class number)"
        return f"{type(sample).__name__} of {len(sample)}: {kinds}. {wrap} {pair}"
    return f"{type(sample).__name__}. {wrap} both"


def bytes_of(value: object) -> int:
    """Return about how many bytes a sample takes in memory, with what Python needs about it."""
    if isinstance(value, Tensor):
        return 256 + value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return 128 + value.nbytes
    if isinstance(value, (Mapping, list, tuple)):
        parts = value.values() if isinstance(value, Mapping) else value
        return 64 + sum(32 + bytes_of(part) for part in parts)
    size = getattr(value, "size", None)  # a picture's width and height
    if hasattr(value, "getbands") and isinstance(size, tuple):
        return 256 + int(size[0]) * int(size[1]) * len(value.getbands())
    return sys.getsizeof(value)


def owned(value: Any) -> Any:
    """Return a sample that shares no memory with a reader that may write the next one into the same place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: owned(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(owned(part) for part in value)
    return value
