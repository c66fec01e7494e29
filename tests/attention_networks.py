"""Tiny networks of each form of attention, random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.compress import rewrite
from autocompress.tasks.adapters import Adapter, InputSpec, pack

HEADS, SIZE, LENGTH = 4, 8, 6
WIDTH = HEADS * SIZE
FORMS = ("fused", "plain", "separate")


def timm_vit() -> tuple[nn.Module, Tensor]:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    model: nn.Module = vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS, mlp_ratio=2, num_classes=5
    )
    return model, torch.rand(4, 3, 16, 16)


def torchvision_vit() -> tuple[nn.Module, Tensor]:
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=HEADS, hidden_dim=WIDTH, mlp_dim=2 * WIDTH, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight)
    return model, torch.rand(4, 3, 16, 16)


def text(kind: str = "Bert", **settings: Any) -> tuple[nn.Module, Tensor]:
    """Return a classifier of transformers, its attention mask leaving some tokens out."""
    transformers = pytest.importorskip("transformers")
    named = {
        "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
        "vocab_size": 50, "max_position_embeddings": LENGTH + 4, **settings,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**named)
    maker = getattr(transformers, f"{kind}ForSequenceClassification")
    specs = [InputSpec("input_ids", (LENGTH,), "int64"), InputSpec("attention_mask", (LENGTH,), "int64")]
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [3], [4], [LENGTH]])
    inputs = pack({"input_ids": torch.randint(3, 50, (4, LENGTH)), "attention_mask": mask}, specs)
    return Adapter(maker._from_config(config, attn_implementation="eager"), specs, ("logits",)), inputs


def make(form: str) -> tuple[nn.Module, Tensor]:
    """Return a model of a form, rewritten, and inputs ``(4, ...)``; weights large enough for attention to matter."""
    torch.manual_seed(0)
    model, inputs = {"fused": timm_vit, "plain": torchvision_vit, "separate": text}[form]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0 if form != "plain" else 1.0)
    return rewrite(model.eval()), inputs
