"""The edge between models as people write them and one tensor in, one tensor out, which is what engines are fed.

Several named inputs of a model travel as one float tensor ``(N, total)``, each flattened, one behind the other; what a
model gives as a tuple, a dict or a data class becomes one tensor ``(N, ...)``. Nothing else in the package knows of
either. Float32 holds every integer up to 2**24 exactly, so token numbers and masks travel unharmed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.errors import ConfigError

DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: Of the forward's argument.
        shape: Of one sample, without the batch axis.
        dtype: ``"float32"``, ``"int64"`` or ``"bool"``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"Input {self.name!r} is of dtype {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")

    @property
    def size(self) -> int:
        """Numbers in one sample."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class OutputSpec:
    """One output of a model.

    Attributes:
        name: The model's own, a number where it has none; empty for a model that gives a tensor.
        shape: Of one sample, without the batch axis.
    """

    name: str
    shape: tuple[int, ...]


def pack(inputs: Mapping[str, Tensor], specs: Sequence[InputSpec]) -> Tensor:
    """Return named inputs ``(N, ...)`` as one float tensor ``(N, total)``, in the order of `specs`.

    Raises:
        ConfigError: An input is missing or of another shape.
    """
    parts = []
    for spec in specs:
        value = inputs.get(spec.name)
        if value is None or tuple(value.shape[1:]) != spec.shape:
            found = "missing" if value is None else f"{tuple(value.shape)}"
            raise ConfigError(f"Input {spec.name!r} must be (N, {', '.join(map(str, spec.shape))}); it is {found}.")
        parts.append(value.reshape(len(value), -1).float())
    return torch.cat(parts, 1)


def as_tensor(outputs: object, keep: Sequence[str] = ()) -> Tensor:
    """Return a model's outputs as one float tensor ``(N, ...)``.

    One tensor stays as it is; several become ``(N, total)``, each flattened, in the model's order.

    Args:
        outputs: A tensor, or tuples, lists, dicts and data classes of them.
        keep: Names of the outputs wanted, when they have names; empty takes all floating-point ones.

    Raises:
        ConfigError: There is no such output, or no tensor at all.
    """
    tensors = [tensor for _, tensor in _kept(outputs, keep)]
    return tensors[0] if len(tensors) == 1 else torch.cat([_flat(tensor) for tensor in tensors], 1)


def output_specs(outputs: object, keep: Sequence[str] = ()) -> tuple[OutputSpec, ...]:
    """Return what `as_tensor` puts behind each other, in its order.

    Raises:
        ConfigError: See `as_tensor`.
    """
    return tuple(OutputSpec(name, tuple(tensor.shape[1:])) for name, tensor in _kept(outputs, keep))


def _kept(outputs: object, keep: Sequence[str]) -> list[tuple[str, Tensor]]:
    if keep:
        named = _mapping(outputs)
        missing = [name for name in keep if named.get(name) is None]
        if missing:
            known = ", ".join(named) or "none with a name"
            raise ConfigError(f"The model has no output {missing[0]!r}; it has {known}.")
        outputs = {name: named[name] for name in keep}
    tensors = _tensors(outputs)
    if not tensors:
        raise ConfigError(f"The model gives no tensor, but {type(outputs).__name__}.")
    return tensors


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1)


def _mapping(outputs: object) -> Mapping[str, object]:
    return outputs if isinstance(outputs, Mapping) else dict(getattr(outputs, "__dict__", {}))


def _tensors(outputs: object, name: str = "") -> list[tuple[str, Tensor]]:
    """Return the floating-point tensors in a model's outputs with their names, dotted where they lie deeper."""
    if isinstance(outputs, Tensor):
        return [(name, outputs)] if outputs.is_floating_point() and outputs.ndim > 0 else []
    inner: Iterable[tuple[object, object]]
    if isinstance(outputs, Mapping):
        inner = outputs.items()
    elif isinstance(outputs, Sequence) and not isinstance(outputs, str):
        fields = getattr(outputs, "_fields", range(len(outputs)))  # a named tuple's names
        inner = zip(fields, outputs, strict=True)
    else:
        named = getattr(outputs, "__dict__", None)
        inner = () if named is None or isinstance(outputs, nn.Module) else named.items()
    return [pair for key, value in inner for pair in _tensors(value, f"{name}.{key}" if name else str(key))]


class Adapter(nn.Module):
    """A model that takes several inputs or gives more than a tensor, as one from a tensor to a tensor.

    Args:
        model: The user's network; its layers are named ``model.…`` here.
        inputs: What the packed input ``(N, total)`` holds (`pack` makes one); None passes it on as it is.
        keep: See `as_tensor`.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[InputSpec] | None = None, keep: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.inputs = None if inputs is None else tuple(inputs)
        self.keep = tuple(keep)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map inputs to outputs ``(N, ...)``.

        Args:
            inputs: One packed tensor ``(N, total)``, or the model's own inputs ``(N, ...)`` in the order of the specs.
        """
        return as_tensor(self._outputs(*inputs), self.keep)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Return the model's own inputs ``(N, ...)`` by name, each in its dtype."""
        specs = self.inputs or ()
        parts = torch.split(packed, [spec.size for spec in specs], 1)
        return {
            spec.name: part.reshape(-1, *spec.shape).to(DTYPES[spec.dtype])
            for spec, part in zip(specs, parts, strict=True)
        }

    def _outputs(self, *inputs: Tensor) -> object:
        if self.inputs is None:
            return self.model(*inputs)
        if self._are_named(inputs):
            return self.model(**{spec.name: given for spec, given in zip(self.inputs, inputs, strict=True)})
        return self.model(**self.unpack(*inputs))

    def _are_named(self, inputs: Sequence[Tensor]) -> bool:
        """Whether these are the model's own inputs, not packed ones, which are floats."""
        if len(inputs) > 1 or self.inputs is None:
            return True
        (spec,) = self.inputs if len(self.inputs) == 1 else (None,)
        return spec is not None and inputs[0].dtype == DTYPES[spec.dtype] and tuple(inputs[0].shape[1:]) == spec.shape

    def output_specs(self, packed: Tensor) -> tuple[OutputSpec, ...]:
        """Return the outputs that `forward` makes one tensor of, in their order."""
        return output_specs(self._outputs(packed), self.keep)


class DetectorNetwork(nn.Module):
    """What a one-stage torchvision detector computes before boxes are chosen: ``(N, anchors, classes + 4 (+ 1))``.

    Resizing the images and non-maximum suppression depend on the data and stay outside of an engine.

    Args:
        detector: With a `backbone` and a `head` (SSD, SSDlite, RetinaNet, FCOS).

    Raises:
        ConfigError: It is a two-stage detector, whose second stage works on proposals.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        backbone, head = (getattr(detector, name, None) for name in ("backbone", "head"))
        if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module):
            raise ConfigError(
                f"{type(detector).__name__} is a two-stage detector: what its second stage computes depends on the "
                "boxes that its first stage finds, which no fixed graph can hold. Take a one-stage detector (SSD, "
                "RetinaNet, FCOS)."
            )
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, 3, H, W)`` to scores and box offsets ``(N, anchors, ...)``."""
        features = self.backbone(images)
        found: dict[str, Tensor] = self.head(list(features.values()) if isinstance(features, dict) else [features])
        return torch.cat(list(found.values()), -1)
