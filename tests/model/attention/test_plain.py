"""`nn.MultiheadAttention` by layers computes what torch's own does, however it is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import rewrite
from autocompress.graph.builder import GraphBuilder
from autocompress.model.attention.plain import PlainAttention, plain
from autocompress.model.inventory import take_inventory
from tests.attention_networks import torchvision_vit

N, LENGTH, WIDTH, HEADS = 2, 5, 12, 3


def pair(**settings: Any) -> tuple[nn.MultiheadAttention, PlainAttention]:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(WIDTH, HEADS, **settings).eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    written = plain(copy.deepcopy(original))
    assert written is not None
    return original, written


PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [3]])
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "none": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding without weights": {"key_padding_mask": PADDING, "need_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "need_weights": False},
    "added": {"attn_mask": torch.randn(LENGTH, LENGTH), "need_weights": False},
    "for each head": {"attn_mask": torch.randn(N * HEADS, LENGTH, LENGTH), "need_weights": False},
}


def same(original: nn.MultiheadAttention, written: PlainAttention, *inputs: Tensor, **options: Any) -> None:
    with torch.no_grad():
        wanted, found = original(*inputs, **options), written(*inputs, **options)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert (found[1] is None) == (wanted[1] is None)
    if wanted[1] is not None:
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "batch second"])
@pytest.mark.parametrize("name", CALLS)
def test_it_computes_what_torch_does(name: str, first: bool) -> None:
    original, written = pair(batch_first=first)
    x = torch.randn(N, LENGTH, WIDTH) if first else torch.randn(LENGTH, N, WIDTH)
    same(original, written, x, x, x, **CALLS[name])


@pytest.mark.parametrize("bias", [True, False])
def test_queries_of_another_sequence_and_no_bias(bias: bool) -> None:
    original, written = pair(batch_first=True, bias=bias)
    query, keys = torch.randn(N, 3, WIDTH), torch.randn(N, LENGTH, WIDTH)
    same(original, written, query, keys, keys)
    same(original, written, keys, keys, keys)


def test_one_sample_without_a_batch() -> None:
    original, written = pair()
    x = torch.randn(LENGTH, WIDTH)
    same(original, written, x, x, x)


@pytest.mark.parametrize("settings", [{"kdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_it_does_not_compute_stays_as_it_is(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, **settings))
    assert type(rewrite(model)[0]) is nn.MultiheadAttention


class Encoder(nn.Module):
    """torch's own encoder, whose layers ask their attention whether a fast path may be taken."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x).mean(1))


def test_torchs_encoder_has_heads_and_widths_to_prune() -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, LENGTH, WIDTH)
    written = rewrite(model)
    with torch.no_grad():
        torch.testing.assert_close(written(x), model(x), rtol=1e-4, atol=1e-5)
    groups = take_inventory(written, x).groups
    assert {name: group.channels for name, group in groups.items()} == {
        f"encoder.layers.{i}.{layer}": width
        for i in range(2)
        for layer, width in (("self_attn.in_proj", HEADS), ("linear1", 16))
    }


def test_a_network_with_attention_keeps_its_identity_and_its_blocks() -> None:
    """Latency tables are of the network, which is the same one."""
    model, x = torchvision_vit()
    model.eval()
    written = rewrite(model)
    before, after = take_inventory(model, x), take_inventory(written, x)
    assert before.blocks.keys() == after.blocks.keys()
    hashes = [GraphBuilder(m, x[:1], i, "openvino").layout.hash for m, i in ((model, before), (written, after))]
    assert hashes[0] == hashes[1]
