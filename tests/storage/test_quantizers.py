"""Weight quantizers for storage, each on an example worked by hand, and what all of them owe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autocompress.errors import CompressionError, ConfigError
from autocompress.storage.quantizers import QUANTIZERS, quantizer
from autocompress.storage.quantizers.codebook import Codebook


def fitted(name: str, values: list[float], bits: int) -> list[float]:
    found = quantizer(name).fit(torch.tensor(values), bits)
    assert found.levels.dtype == torch.float32 and bool((found.levels.diff() > 0).all())
    return found.values().tolist()


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_codebook_gives_cluster_means() -> None:
    # Linear start at 0 and 10: {0, 1, 2} and {9, 10}; their means are 1 and 9.5, and nobody changes sides.
    assert fitted("codebook", [0.0, 10.0, 1.0, 2.0, 9.0], 1) == [1.0, 9.5, 1.0, 1.0, 9.5]


def test_codebook_moves_until_nothing_moves() -> None:
    # Start 0 and 8: {0, 1, 3} and {5, 6, 8}, means 4/3 and 19/3; the middle is 23/6, so all stay.
    found = fitted("codebook", [0.0, 1.0, 3.0, 5.0, 6.0, 8.0], 1)
    assert found == pytest.approx([4 / 3] * 3 + [19 / 3] * 3)


@pytest.mark.parametrize(
    ("initialization", "start"), [("linear", [0.0, 3.0, 6.0, 9.0]), ("density", [0.0, 0.0, 1.0, 9.0])]
)
def test_codebook_starts(initialization: str, start: list[float]) -> None:
    ordered = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 5.0, 9.0], dtype=torch.float64)
    found = Codebook(initialization)._start(ordered, 4).tolist()
    # Quantiles at 1/8, 3/8, 5/8 and 7/8 of eight values: those at places 1, 3, 5 and 7.
    assert found == (start if initialization == "linear" else [0.0, 1.0, 1.0, 9.0])


def test_codebook_of_random_start_repeats_by_seed() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    once, again = (Codebook("random", seed=3).fit(values, 3).values() for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, Codebook("random", seed=4).fit(values, 3).values())


def test_uniform() -> None:
    # 3 bits: codes -3..3, scale 6 / 3 = 2; 1.1 / 2 = 0.55 rounds to 1, 3 / 2 = 1.5 to the even 2.
    assert fitted("uniform", [-6.0, 1.1, 3.0, 0.9], 3) == [-6.0, 2.0, 4.0, 0.0]


def test_fixed_point() -> None:
    # 3 bits: codes -4..3; 2 / 3 needs the scale 1, the least power of two above it; 1.6 rounds to 2, -2 stays.
    assert fitted("fixed-point", [1.6, -2.0, 0.4, 2.0], 3) == [2.0, -2.0, 0.0, 2.0]


def test_binary() -> None:
    assert fitted("binary", [1.0, -2.0, 3.0], 1) == [2.0, -2.0, 2.0]


def test_ternary() -> None:
    # Mean magnitude 2, threshold 1.4; of the larger 2, 3 and 4 the mean is 3.
    assert fitted("ternary", [2.0, -3.0, 1.0, 0.0, 4.0], 2) == [3.0, -3.0, 0.0, 0.0, 3.0]


def test_power_of_two() -> None:
    # 3 bits: three powers; floor(log2(4/3 * 5)) = 2 gives 4, 2, 1; 5 is nearest to 4, 1.4 to 1, 0.4 to 0.
    assert fitted("power-of-two", [5.0, -1.4, 0.4, 3.5, -2.1], 3) == [4.0, -1.0, 0.0, 4.0, -2.0]


# -- all of them ------------------------------------------------------------------------------------------------------

CASES = [(name, bits) for name, kind in QUANTIZERS.items() for bits in kind.BITS]


def normal() -> Tensor:
    return torch.randn(40, 25, generator=torch.Generator().manual_seed(1)) / 10


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_levels_fit_the_bits_and_are_all_used(name: str, bits: int) -> None:
    found = quantizer(name).fit(normal(), bits)
    assert found.indices.shape == (40, 25)
    assert found.indices.unique().tolist() == list(range(len(found.levels)))
    assert 1 <= len(found.levels) <= 2**bits
    assert QUANTIZERS[name].method.family == "storage" and not QUANTIZERS[name].method.speeds_up


@pytest.mark.parametrize("name", [name for name, kind in QUANTIZERS.items() if len(kind.BITS) > 1])
def test_more_bits_are_closer(name: str) -> None:
    errors = [float((quantizer(name).fit(normal(), bits).values() - normal()).square().mean()) for bits in (2, 4, 6)]
    assert errors == sorted(errors, reverse=True)


def test_codebook_beats_the_others_at_the_same_bits() -> None:
    errors = {
        name: float((quantizer(name).fit(normal(), 4).values() - normal()).square().mean())
        for name in ("codebook", "uniform", "fixed-point", "power-of-two")
    }
    assert min(errors, key=lambda name: errors[name]) == "codebook"


@pytest.mark.parametrize(("name", "bits"), CASES)
@pytest.mark.parametrize("values", [[0.25], [0.0, 0.0], [-3.0, -3.0]])
def test_equal_values_are_kept_or_come_near(name: str, bits: int, values: list[float]) -> None:
    found = quantizer(name).fit(torch.tensor(values), bits).values()
    assert bool(((found - torch.tensor(values)).abs() <= 1.0).all())


@pytest.mark.parametrize(
    ("name", "bits"), [("codebook", 9), ("codebook", 0), ("binary", 2), ("ternary", 1), ("uniform", 1)]
)
def test_bits_it_cannot_do(name: str, bits: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*not {bits}"):
        quantizer(name).fit(normal(), bits)


@pytest.mark.parametrize(
    ("values", "said"), [([], "no weights"), ([1.0, float("nan")], "NaN"), ([float("inf")], "NaN")]
)
def test_values_it_cannot_use(values: list[float], said: str) -> None:
    with pytest.raises(CompressionError, match=said):
        quantizer("codebook").fit(torch.tensor(values), 2)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'codebook'"):
        quantizer("code-book")
    with pytest.raises(ConfigError, match="linear"):
        Codebook("lineal")
