"""Query, key and value in one projection `qkv`, as timm's models have them: all queries, all keys, all values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from autocompress.model.attention.base import AttentionForm, HeadAxis, in_order, taken

# What Swin adds to the scores: a column for each head.
_TABLE = "relative_position_bias_table"


class FusedAttention(AttentionForm):
    """timm's vision transformers and Swins, and whatever else calls its layers so."""

    name = "fused"

    def heads(self, module: nn.Module) -> HeadAxis | None:
        """See `AttentionForm.heads`."""
        qkv, proj, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
        if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or not isinstance(heads, int):
            return None
        size, rest = divmod(proj.in_features, heads)
        if rest or qkv.out_features != 3 * proj.in_features:
            return None
        made = {"qkv": in_order(heads, size, 3)}
        gate = getattr(module, "gate", None)
        if isinstance(gate, nn.Linear) and gate.out_features == proj.in_features:
            made["gate"] = in_order(heads, size)
        return HeadAxis(self.name, "", heads, made, {"proj": in_order(heads, size)})

    def set_heads(self, module: nn.Module, kept: Sequence[int]) -> None:
        """See `AttentionForm.set_heads`."""
        for name, count in (("num_heads", len(kept)), ("attn_dim", module.get_submodule("proj").in_features)):
            if hasattr(module, name):
                setattr(module, name, count)
        table = getattr(module, _TABLE, None)
        if isinstance(table, nn.Parameter):
            setattr(module, _TABLE, taken(table, 1, kept))


FORM = FusedAttention()
