"""Attention heads: which channels of which layers make up a head, for every form of attention that models have.

A form is one file here with a `FORM`; it is found by itself. Nothing is judged here: whether heads can really go is
tried out by `head_groups`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from importlib import import_module

from torch import nn

from autocompress.model.attention.base import AttentionForm, HeadAxis, take_inputs, take_outputs

__all__ = ["FORMS", "AttentionForm", "HeadAxis", "head_axes", "keep_heads"]


def _found() -> Iterator[AttentionForm]:
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        form = getattr(import_module(info.name), "FORM", None)
        if form is not None:
            yield form


FORMS: tuple[AttentionForm, ...] = tuple(_found())


def head_axes(model: nn.Module) -> dict[str, HeadAxis]:
    """Return the heads of every attention module of a known form, by the name of its first projection."""
    found: dict[str, HeadAxis] = {}
    for name, module in model.named_modules():
        axis = next((axis for form in FORMS if (axis := form.heads(module)) is not None), None)
        if axis is not None:
            axis = axis.inside(name)
            found[axis.leader] = axis
    return found


def keep_heads(model: nn.Module, axis: HeadAxis, kept: Sequence[int]) -> None:
    """Remove all heads of an attention module of `model` but these, in place.

    Args:
        model: The model that `axis` was found in, or a copy of it.
        axis: One of `head_axes`.
        kept: Heads that stay, ascending; at least one.
    """
    staying = set(kept)
    for layer, heads in axis.made.items():
        take_outputs(model.get_submodule(layer), [row for row, head in enumerate(heads) if head in staying])
    for layer, heads in axis.read.items():
        take_inputs(model.get_submodule(layer), [column for column, head in enumerate(heads) if head in staying])
    module = model.get_submodule(axis.module)
    next(form for form in FORMS if form.name == axis.form).set_heads(module, sorted(staying))
