"""Small networks, each with one habit that public reports say tools fall over. Random weights, no data.

Each is a factory without arguments; `SHAPES` says what those take that take no ``(N, 3, 16, 16)``, and `EXPECTED` what
is to come of those that are not handled whole: a part that is left alone and named, or a refusal, by its words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from autocompress.tasks.adapters import Adapter, InputSpec

KINDS: dict[str, Callable[[], Any]] = {}
SHAPES: dict[str, tuple[int, ...]] = {}
EXPECTED: dict[str, str] = {}


def kind(shape: tuple[int, ...] = (3, 16, 16), expected: str = "") -> Callable[[Any], Any]:
    """Register a network class or factory under its name."""

    def register(made: Any) -> Any:
        name = made.__name__.strip("_").replace("_", " ")
        KINDS[name], SHAPES[name] = made, shape
        if expected:
            EXPECTED[name] = expected
        return made

    return register


class Middle(nn.Module):
    """A stem to 16 channels, what is looked at, and a head."""

    def __init__(self, *, out: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.tail, self.fc = nn.Conv2d(out, 24, 3, padding=1), nn.Linear(24, 5)

    def middle(self, x: Tensor) -> Tensor:
        """Map ``(N, 16, H, W)`` to ``(N, out, H, W)``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map images to scores ``(N, 5)``."""
        x = self.middle(F.relu(self.norm(self.stem(x))))
        found: Tensor = self.fc(F.relu(self.tail(x)).mean((2, 3)))
        return found


# -- parameters of each channel ---------------------------------------------------------------------------------------


@kind()
class prelu_per_channel(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.act = nn.Conv2d(16, 16, 3, padding=1), nn.PReLU(16)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.act(self.body(x))


@kind()
class layer_scale(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.gamma = nn.Conv2d(16, 16, 3, padding=1), nn.Parameter(torch.rand(16, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.body(x)


@kind()
class residual_scale(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Conv2d(16, 16, 3, padding=1), nn.Parameter(torch.tensor(0.5))

    def middle(self, x: Tensor) -> Tensor:
        return x + self.scale * F.gelu(self.body(x))


@kind()
class squeeze_and_excitation(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y * self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()


@kind()
class linear_gate(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.down, self.up = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 8), nn.Linear(8, 16)

    def middle(self, x: Tensor) -> Tensor:
        y = self.body(x)
        gate = self.up(F.hardswish(self.down(y.mean((2, 3))))).sigmoid()
        return y * gate[:, :, None, None]


@kind()
class hand_written_norm(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight, self.bias = (
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Parameter(torch.rand(16)),
            nn.Parameter(torch.zeros(16)),
        )

    def middle(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x + y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


# -- norms ------------------------------------------------------------------------------------------------------------


@kind()
class group_norm(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.gn = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)

    def middle(self, x: Tensor) -> Tensor:
        return x + F.relu(self.gn(self.body(x)))


@kind()
class group_norm_over_a_concatenation(Middle):
    def __init__(self) -> None:
        super().__init__(out=24)
        self.left, self.right, self.gn = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1), nn.GroupNorm(6, 24)

    def middle(self, x: Tensor) -> Tensor:
        return self.gn(torch.cat([self.left(x), self.right(x)], 1))


@kind()
class instance_norm(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = (
            nn.Conv2d(16, 16, 3, padding=1),
            nn.InstanceNorm2d(16, affine=True),
            nn.InstanceNorm2d(16),
        )

    def middle(self, x: Tensor) -> Tensor:
        return self.b(x + F.relu(self.a(self.body(x))))


@kind()
class instance_norm_with_statistics(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a = (
            nn.Conv2d(16, 16, 3, padding=1),
            nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
        )

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.a(self.body(x)))


@kind()
class local_response_norm(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.lrn = nn.Conv2d(16, 16, 3, padding=1), nn.LocalResponseNorm(5)

    def middle(self, x: Tensor) -> Tensor:
        return self.lrn(F.relu(self.body(x)))


@kind()
class convnext_block(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.depth, self.ln = nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.LayerNorm(16)
        self.wide, self.narrow, self.gamma = nn.Linear(16, 48), nn.Linear(48, 16), nn.Parameter(0.1 * torch.ones(16))

    def middle(self, x: Tensor) -> Tensor:
        y = self.narrow(F.gelu(self.wide(self.ln(self.depth(x).permute(0, 2, 3, 1)))))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


@kind(expected="refused: .*normalise by the batch")
class batch_norm_without_statistics(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(16, track_running_stats=False)

    def middle(self, x: Tensor) -> Tensor:
        return self.bn(x)


# -- computed weights -------------------------------------------------------------------------------------------------


def _computed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = plain()
    for name in ("body", "fc"):
        setattr(model, name, norm(getattr(model, name)))
    return model


@kind()
class plain(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))


@kind()
def weight_norm() -> nn.Module:
    return _computed(parametrizations.weight_norm)


@kind()
def weight_norm_by_hooks() -> nn.Module:
    return _computed(torch.nn.utils.weight_norm)


@kind()
def spectral_norm() -> nn.Module:
    return _computed(parametrizations.spectral_norm)


@kind()
def spectral_norm_by_hooks() -> nn.Module:
    return _computed(torch.nn.utils.spectral_norm)


@kind()
def pruning_masks() -> nn.Module:
    model = plain()
    prune.l1_unstructured(model.body, "weight", amount=0.5)
    model(torch.zeros(1, 3, 16, 16))
    return model


@kind()
class weight_standardized(Middle):
    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            scale = flat.view(len(flat), -1).std(1).view(-1, 1, 1, 1) + 1e-5
            return F.conv2d(x, flat / scale, self.bias, padding=1)

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gn = self.Conv(16, 16, 3, padding=1), nn.GroupNorm(4, 16)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.body(x)))


@kind()
class summed_weights(Middle):
    """RepVGG's way: another computation where it is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.big, self.small = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            return F.relu(self.big(x) + self.small(x))
        weight = self.big.weight + F.pad(self.small.weight, [1, 1, 1, 1])
        return F.relu(F.conv2d(x, weight, self.big.bias + self.small.bias, padding=1))


@kind()
class functional_weights(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(16, 16, 3, 3))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, padding=1))


# -- what is done to channels -----------------------------------------------------------------------------------------


@kind()
class gate_by_halves(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).chunk(2, 1)
        return x + self.narrow(a * b.sigmoid())


@kind()
class glu(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(16, 32, 1)

    def middle(self, x: Tensor) -> Tensor:
        return F.glu(self.wide(x), 1)


@kind()
class late_fusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 20, 5, padding=2)
        self.join, self.fc = nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(self.a(x)).mean((2, 3)), F.relu(self.b(x)).amax((2, 3))]
        return self.fc(F.relu(self.join(torch.cat(parts, 1))))


@kind()
class dense_connections(Middle):
    def __init__(self) -> None:
        super().__init__(out=32)
        self.a, self.b = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(24, 8, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.a(x))], 1)
        return torch.cat([x, F.relu(self.b(x))], 1)


@kind()
class depthwise_multiplier(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.depth, self.point = nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.Conv2d(32, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.point(F.relu(self.depth(x)))


@kind()
class grouped_convolution(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(16, 16, 3, padding=1, groups=4)

    def middle(self, x: Tensor) -> Tensor:
        return x + F.relu(self.body(x))


@kind()
class channel_shuffle(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 16, 1, groups=2)

    def middle(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        x = torch.cat([a, F.relu(self.left(b))], 1)
        n, c, h, w = x.shape
        return self.right(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@kind()
class pixel_shuffle(Middle):
    def __init__(self) -> None:
        super().__init__(out=8)
        self.wide, self.shuffle = nn.Conv2d(16, 32, 3, padding=1), nn.PixelShuffle(2)

    def middle(self, x: Tensor) -> Tensor:
        return self.shuffle(F.relu(self.wide(x)))


@kind()
class focus_slicing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = (
            nn.Conv2d(12, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return self.fc(F.relu(self.body(F.relu(self.stem(x)))).mean((2, 3)))


@kind()
class broadcast_mask(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.mask, self.film = nn.Conv2d(16, 1, 1), nn.Linear(16, 32)

    def middle(self, x: Tensor) -> Tensor:
        x = x * self.mask(x).sigmoid()
        scale, shift = self.film(x.mean((2, 3))).chunk(2, 1)
        return x * scale[..., None, None] + shift[..., None, None]


@kind()
class option_a_shortcut(Middle):
    def __init__(self) -> None:
        super().__init__(out=32)
        self.body = nn.Conv2d(16, 32, 3, 2, 1)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))


@kind()
class called_twice(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def middle(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.relu(self.bn(self.body(x)))
        return x


@kind()
class shared_weight(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.b.weight = self.a.weight

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))


# -- what forward does ------------------------------------------------------------------------------------------------


@kind()
class auxiliary_head(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(16, 5)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.norm(self.stem(x)))
        out = self.fc(F.relu(self.tail(y)).mean((2, 3)))
        return (out, self.aux(y.mean((2, 3)))) if self.training else out


@kind()
class backbone_without_gradients(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.body(x))
        return x


@kind()
class result_that_nobody_reads(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooler = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 16)

    def middle(self, x: Tensor) -> Tensor:
        self.pooler(x.mean((2, 3)))
        return F.relu(self.body(x))


@kind()
class view_of_features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(512, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(F.relu(self.conv(x))))
        return self.fc(x.view(len(x), -1))


@kind()
class in_place_operations(Middle):
    """Runs, but no gradient goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        y = self.body(x).relu_()
        y += x
        y[:, :, 0] *= 2
        return y.clamp_(max=6)


@kind(expected="refused: .*OpenVINO cannot build")
class padding_modes(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(16, 16, 3, padding=2, dilation=2, padding_mode="circular"),
        )
        self.c = nn.Conv2d(16, 16, 4, padding="same")

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))


@kind()
class interpolation(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.body = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        y = F.relu(self.body(F.relu(self.down(x))))
        return x + F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)


@kind()
class transposed_convolution(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 24, 3, 2, 1), nn.ConvTranspose2d(24, 16, 2, 2)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


@kind()
class flattened_maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.a, self.b = (
            nn.Conv2d(3, 8, 3),
            nn.AdaptiveAvgPool2d(2),
            nn.Linear(32, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(torch.flatten(self.pool(F.relu(self.conv(x))), 1))))


@kind(expected="refused: .*data-dependent control flow")
class branch_on_values(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.body(x) if x.mean() > 0 else x


@kind(expected="refused: .*gives other outputs for the same input")
class dropout_that_is_always_on(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True)


@kind(expected="refused: .*(a sample alone than in a batch|reshape with a fixed first size|row of outputs)")
class mean_over_the_batch(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@kind()
class extra_state(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = nn.Conv2d(16, 16, 3, padding=1), 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))


@kind()
class remembers_its_features(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen = nn.Conv2d(16, 16, 3, padding=1), {}

    def middle(self, x: Tensor) -> Tensor:
        self.seen["body"] = self.body(x)
        return F.relu(self.seen["body"])


# -- how a model comes ------------------------------------------------------------------------------------------------


@kind()
def compiled() -> Any:
    return torch.compile(plain())


@kind()
def data_parallel() -> nn.Module:
    return nn.DataParallel(plain())


@kind(expected="refused: .*of torch.jit, whose layers cannot be changed")
def traced() -> Any:
    return torch.jit.trace(plain().eval(), torch.zeros(1, 3, 16, 16))


@kind(expected="refused: .*is on the meta device")
def on_meta() -> nn.Module:
    with torch.device("meta"):
        return plain()


@kind(expected="refused: .*has no shape yet")
def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


@kind()
def bfloat16() -> nn.Module:
    return plain().bfloat16()


@kind()
def half_precision() -> nn.Module:
    return plain().half()


@kind()
def double_precision() -> nn.Module:
    return plain().double()


@kind()
def frozen() -> nn.Module:
    return plain().requires_grad_(False)


@kind()
def left_in_training() -> nn.Module:
    return plain().train()


@kind()
def made_without_gradients() -> nn.Module:
    with torch.no_grad():
        return plain()


@kind()
def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return plain()


# -- other layers -----------------------------------------------------------------------------------------------------


@kind((3, 64))
class one_dimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na, self.b, self.fc = (
            nn.Conv1d(3, 16, 5, padding=2),
            nn.BatchNorm1d(16),
            nn.Conv1d(16, 16, 3, dilation=2),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.na(self.a(x))))).mean(2))


@kind((1, 6, 8, 8))
class three_dimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na, self.b, self.fc = (
            nn.Conv3d(1, 8, 3, padding=1),
            nn.BatchNorm3d(8),
            nn.Conv3d(8, 12, 3),
            nn.Linear(12, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.na(self.a(x))))).mean((2, 3, 4)))


@kind((12,))
class perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na, self.b, self.c = nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(F.selu(self.na(self.a(x))))))


@kind((8, 12))
class lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


@kind((8, 12))
class gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rnn, self.fc = nn.Linear(12, 24), nn.GRU(24, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(F.relu(self.inp(x)))[0].mean(1))


@kind((8, 16))
class transformer_encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.body, self.fc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean(1))


@kind((8,))
class language_model(nn.Module):
    """Grouped-query heads, rotary positions, RMS norm, a gated MLP, as in LLaMA, from token ids."""

    def __init__(self, d: int = 32, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared, self.dim = heads, shared, d // heads
        self.embed, self.n1, self.n2 = nn.Embedding(40, d), nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v = (
            nn.Linear(d, d, bias=False),
            nn.Linear(d, shared * self.dim),
            nn.Linear(d, shared * self.dim),
        )
        self.o, self.gate, self.up, self.down = nn.Linear(d, d), nn.Linear(d, 64), nn.Linear(d, 64), nn.Linear(64, d)
        angle = torch.arange(8)[:, None] * 10000 ** (-torch.arange(0, self.dim, 2) / self.dim)[None]
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, 1), persistent=False)
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, 1), persistent=False)
        self.head = nn.Linear(d, 40, bias=False)
        self.head.weight = self.embed.weight

    def turn(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids.long().clamp(0, 39))
        n, t, _ = x.shape
        h = self.n1(x)
        q = self.turn(self.q(h).view(n, t, self.heads, self.dim).transpose(1, 2))
        k = self.turn(self.k(h).view(n, t, self.shared, self.dim).transpose(1, 2))
        v = self.v(h).view(n, t, self.shared, self.dim).transpose(1, 2)
        k, v = (y.repeat_interleave(self.heads // self.shared, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, -1))
        h = self.n2(x)
        return self.head((x + self.down(F.silu(self.gate(h)) * self.up(h)))[:, -1])


@kind((16,))
class einsum_attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.fc = nn.Linear(4, 48), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(len(x), 4, 4)).view(len(x), 4, 3, 2, 8).unbind(2)
        weights = (torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(8)).softmax(-1)
        return self.fc(self.out(torch.einsum("nhij,njhd->nihd", weights, v).flatten(2)).mean(1))


@kind(expected="named|refused")
class deformable_convolution(Middle):
    def __init__(self) -> None:
        from torchvision.ops import DeformConv2d

        super().__init__()
        self.offset, self.body = nn.Conv2d(16, 18, 3, padding=1), DeformConv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x, self.offset(x)))


@kind(expected="named|refused")
class fourier(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(16, 16, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.body(torch.fft.irfft2(torch.fft.rfft2(x)))


@kind()
class two_paths_and_a_maximum(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        return torch.maximum(self.a(x), self.b(x)) - F.softplus(x)


@kind()
class one_number_a_sample(Middle):
    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


# -- several inputs and outputs ---------------------------------------------------------------------------------------


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.picture, self.vector, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(6, 8), nn.Linear(16, 4)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        x = torch.cat([F.relu(self.picture(image)).mean((2, 3)), F.relu(self.vector(vector))], 1)
        return {"scores": self.fc(x), "features": x}


@kind((3 * 64 + 6,))
def two_inputs_and_two_outputs() -> nn.Module:
    return Adapter(_Pair(), (InputSpec("image", (3, 8, 8)), InputSpec("vector", (6,))))


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(5000, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids.clamp(0, 4999)) * attention_mask[..., None]
        return self.b(F.relu(self.a(x.mean(1))))


@kind((12,))
def token_numbers_and_a_mask() -> nn.Module:
    return Adapter(_Tokens(), (InputSpec("input_ids", (6,), "int64"), InputSpec("attention_mask", (6,), "int64")))
