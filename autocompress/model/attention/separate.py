"""Query, key and value in a projection each, as BERT and most models of Hugging Face's transformers have them.

Their forward passes go by the size of a head and take as many heads as there are.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autocompress.model.attention.base import AttentionForm, HeadAxis, in_order

# Query, key, value and output, as they are called in: BERT, RoBERTa and ELECTRA; earlier ViTs; ALBERT; DistilBERT;
# ViTs of late; CLIP.
_SPELLINGS = (
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("query", "key", "value", "dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
)
_SIZES = ("attention_head_size", "head_dim")
_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_WIDTH = "all_head_size"


class SeparateAttention(AttentionForm):
    """Four linear layers, all heads of one size."""

    name = "separate"

    def heads(self, module: nn.Module) -> HeadAxis | None:
        """See `AttentionForm.heads`."""
        for names in _SPELLINGS:
            layers = [_layer(module, name) for name in names]
            linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
            if len(linear) < len(layers):
                continue
            size = next((s for a in _SIZES if isinstance(s := getattr(_owner(module, names), a, None), int)), 0)
            width = linear[-1].in_features
            if size < 1 or width % size or any(layer.out_features != width for layer in linear[:-1]):
                return None
            heads = in_order(width // size, size)
            return HeadAxis(
                self.name, "", width // size, dict.fromkeys(names[:-1], heads), dict.fromkeys(names[-1:], heads)
            )
        return None

    def set_heads(self, module: nn.Module, kept: Sequence[int]) -> None:
        """See `AttentionForm.set_heads`."""
        names = next(names for names in _SPELLINGS if all(_layer(module, name) is not None for name in names))
        owner = _owner(module, names)
        for name in _COUNTS:
            if hasattr(owner, name):
                setattr(owner, name, len(kept))
        if hasattr(owner, _WIDTH):
            setattr(owner, _WIDTH, module.get_submodule(names[-1]).in_features)


def _layer(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _owner(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return the module that holds the query, and the sizes."""
    return module.get_submodule(names[0].rpartition(".")[0])


FORM = SeparateAttention()
