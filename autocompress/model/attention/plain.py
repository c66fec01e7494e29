"""`nn.MultiheadAttention` with its projections as layers, so that they can be pruned, factorized and quantized.

torch's own keeps the weight of query, key and value as a bare parameter, computes the output projection past the layer
that holds its weight, and takes the width of all heads to be that of its input. This form computes the same by the
same operations in the same order, and has heads of a size of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.model.attention.base import AttentionForm, HeadAxis, in_order


class PlainAttention(nn.Module):
    """Multi-head attention by two linear layers; called as `nn.MultiheadAttention`.

    Args:
        attention: What it takes the place of; see `plain`.

    Attributes:
        in_proj: All queries, all keys and all values, each head by head. Where query, key and value are not one
            tensor, the rows of its weight are used one by one, past the layer.
        out_proj: What the heads say together.
        num_heads: How many there are.
    """

    # What torch's encoder layers ask before they take a fast path that reads the weights of torch's own form.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width, bias = attention.embed_dim, attention.in_proj_bias
        self.embed_dim, self.num_heads = width, attention.num_heads
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        self.in_proj = nn.Linear(width, 3 * width, bias=bias is not None)
        self.out_proj = nn.Linear(width, width, bias=attention.out_proj.bias is not None)
        self.in_proj.weight = attention.in_proj_weight
        if bias is not None:
            self.in_proj.bias = bias
        self.out_proj.weight = attention.out_proj.weight
        if attention.out_proj.bias is not None:
            self.out_proj.bias = attention.out_proj.bias
        self.train(attention.training)

    def forward(  # noqa: PLR0917 - as torch has it
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `nn.MultiheadAttention.forward` does: outputs, and weights where they are needed."""
        one = query is key and key is value
        batched = query.dim() == 3
        given: tuple[Tensor, ...] = (query,) if one else (query, key, value)
        if not batched:
            given = tuple(x.unsqueeze(1) for x in given)
        elif self.batch_first:
            given = tuple(x.transpose(1, 0) for x in given)
        length, samples, _ = given[0].shape
        rows = samples * self.num_heads
        if one:
            joined = self.in_proj(given[0]).unflatten(-1, (3, -1))
            joined = joined.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
            projected = [joined[0], joined[1], joined[2]]
        else:
            bias: Tensor | None = self.in_proj.bias
            biases = (None, None, None) if bias is None else bias.chunk(3)
            parts = zip(given, self.in_proj.weight.chunk(3), biases, strict=True)
            projected = [functional.linear(x, weight, bias) for x, weight, bias in parts]
        size = projected[0].shape[-1] // self.num_heads
        q, k, v = (x.view(len(x), rows, size).transpose(0, 1) for x in projected)
        mask = self._mask(attn_mask, key_padding_mask, rows, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = torch.bmm(q * math.sqrt(1.0 / size), k.transpose(-2, -1))
            shares = functional.softmax(scores if mask is None else scores + mask, -1)
            shares = functional.dropout(shares, dropout, self.training)
            heads = torch.bmm(shares, v).transpose(0, 1)
            weights = shares.view(samples, self.num_heads, length, -1)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            if mask is not None:
                mask = mask.reshape(-1, self.num_heads, *mask.shape[1:]) if len(mask) > 1 else mask.unsqueeze(0)
            q, k, v = (x.view(samples, self.num_heads, x.shape[1], size) for x in (q, k, v))
            heads = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
            heads = heads.permute(2, 0, 1, 3).contiguous()
        output = self.out_proj(heads.reshape(length * samples, self.num_heads * size))
        output = output.view(length, samples, output.shape[1])
        if not batched:
            return output.squeeze(1), weights
        return (output.transpose(1, 0) if self.batch_first else output), weights

    def _mask(self, scores: Tensor | None, padding: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the scores: ``(1, L, S)`` or ``(rows, L or 1, S)``, a row for each sample and head.

        A causal mask is given as `attn_mask` too: torch takes ``is_causal`` as a hint alone.
        """
        if scores is not None:
            scores = _added(scores, dtype)
            scores = scores.unsqueeze(0) if scores.dim() == 2 else scores
        if padding is None:
            return scores
        padding = _added(padding, dtype)
        padding = padding.view(-1, 1, 1, padding.shape[-1]).expand(-1, self.num_heads, -1, -1)
        padding = padding.reshape(rows, 1, -1)
        return padding if scores is None else scores + padding


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask


def plain(attention: nn.MultiheadAttention) -> PlainAttention | None:
    """Return the same as a `PlainAttention`, its parameters shared; None for what that does not compute.

    These are keys and values of another width than queries, learned extra keys, and zeros among the keys.
    """
    extra = attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn
    joined: Tensor | None = attention.in_proj_weight
    if extra or joined is None or type(attention) is not nn.MultiheadAttention:
        return None
    return PlainAttention(attention)


class PlainForm(AttentionForm):
    """The heads of a `PlainAttention`."""

    name = "plain"

    def heads(self, module: nn.Module) -> HeadAxis | None:
        """See `AttentionForm.heads`."""
        if not isinstance(module, PlainAttention) or not isinstance(module.in_proj, nn.Linear):
            return None
        size = module.out_proj.in_features // module.num_heads
        made, read = in_order(module.num_heads, size, 3), in_order(module.num_heads, size)
        return HeadAxis(self.name, "", module.num_heads, {"in_proj": made}, {"out_proj": read})

    def set_heads(self, module: nn.Module, kept: Sequence[int]) -> None:
        """See `AttentionForm.set_heads`."""
        assert isinstance(module, PlainAttention)
        module.num_heads = len(kept)


FORM = PlainForm()
