"""Which low-rank forms of a layer are offered, and how one is written as a choice.

A choice is the rank ratio of Tucker-2, or of the truncated SVD of a matrix; of any other factorization its name and
the ratio: ``"spatial_svd 0.25"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from autocompress.compress.factorizations import FACTORIZATIONS, factorization_of, ratio_of_energy
from autocompress.compress.shapes import factorized_macs_ratio, window
from autocompress.model.inventory import Inventory, Layer
from autocompress.policy import LayerPolicy

DEFAULT = LayerPolicy.factorization
# Layer to factorization to rank ratios, as `ratios_by_energy` finds them.
Found = Mapping[str, Mapping[str, Sequence[float]]]


def written(factorization: str, ratio: float) -> str | float:
    """Return the choice of a factorization, of `policy.FACTORIZATIONS`, at a rank ratio."""
    return ratio if factorization == DEFAULT else f"{factorization} {ratio:.6g}"


def read(choice: object) -> tuple[str, float] | None:
    """Return the factorization and the rank ratio of what `written` wrote; None for any other choice."""
    if isinstance(choice, int | float):
        return DEFAULT, float(choice)
    name, _, ratio = str(choice).partition(" ")
    return (name, float(ratio)) if ratio and name in FACTORIZATIONS else None


def nearest_choice(among: Sequence[str | float], wanted: str | float) -> str | float:
    """Return the one of `among` that equals `wanted`, or the closest number, or the first.

    Of low-rank forms, the closest of the same factorization comes before those of others.
    """
    aim = read(wanted)
    if wanted in among or aim is None:
        return wanted if wanted in among else among[0]
    name, amount = aim
    known = [(choice, *found) for choice in among if (found := read(choice)) is not None]
    alike = [one for one in known if name == one[1] or one[2] == 1]
    if all(one[2] == 1 for one in alike):
        alike = known
    return min(alike, key=lambda one: abs(one[2] - amount))[0] if alike else among[0]


def offered(
    layer: Layer, ratios: Sequence[float], factorizations: Sequence[str], found: Mapping[str, Sequence[float]]
) -> tuple[str | float, ...]:
    """Return the low-rank forms of a factorizable layer that cut its multiply-accumulates, each rank once.

    Args:
        layer: Of the model.
        ratios: Rank ratios; 1 is left out.
        factorizations: Of `policy.FACTORIZATIONS`.
        found: Factorization to further ratios of this layer.
    """
    return tuple(
        written(name, ratio)
        for name in _of(layer, factorizations)
        for ratio in _paying(layer, name, {*ratios, *found.get(name, ())})
    )


def _paying(layer: Layer, name: str, ratios: set[float]) -> Iterator[float]:
    factorization, seen = factorization_of(name, layer.kernel), set[int]()
    for ratio in sorted(ratios, reverse=True):
        if ratio == 1 or factorized_macs_ratio(layer, name, ratio) >= 1:
            continue
        rank = min(factorization.ranks(layer.in_channels, layer.out_channels, window(layer), ratio))
        if rank not in seen:
            seen.add(rank)
            yield ratio


def _of(layer: Layer, factorizations: Sequence[str]) -> tuple[str, ...]:
    """Return the factorizations that differ for a layer: of a matrix, all are one."""
    matrix = factorization_of(DEFAULT, layer.kernel) is not FACTORIZATIONS[DEFAULT]
    return (DEFAULT,) if matrix else tuple(dict.fromkeys(factorizations))


def ratios_by_energy(
    model: nn.Module, inventory: Inventory, shares: Sequence[float], factorizations: Sequence[str]
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Return for every factorizable layer the smallest rank ratios that keep these shares of its energy.

    Energy is the sum of the squared singular values: of the weight, or for Tucker-2 of its unfoldings on both channel
    axes, each of which keeps the share. Factorizations without singular values (CP) have none.

    Args:
        model: The uncompressed model, rewritten.
        inventory: Of this model.
        shares: In (0, 1].
        factorizations: Of `policy.FACTORIZATIONS`.
    """
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for name, layer in inventory.layers.items() if shares else ():
        if not layer.factorizable:
            continue
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight = weight.detach().reshape(*weight.shape[:2], *window(layer))
        found[name] = {}
        for wanted in _of(layer, factorizations):
            factorization = factorization_of(wanted, layer.kernel)
            energies = factorization.energies(weight)
            if energies:
                found[name][wanted] = tuple(ratio_of_energy(factorization, weight, share, energies) for share in shares)
    return found
