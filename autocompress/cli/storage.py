"""Commands about weights on disk: pack, unpack."""

from __future__ import annotations

import json
from pathlib import Path

import click

from autocompress.cli.terminal import echo, err, out, plain_errors


@click.command(
    short_help="Write weights into one small file.",
    epilog="Example: autocompress pack runs/digits --out digits.packed --sparsity 0.8 --bits 5",
)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", "to", required=True, type=click.Path(path_type=Path), metavar="FILE", help="New file.")
@click.option("--sparsity", type=float, help="Fraction of the weights removed, those of least magnitude. Default none.")
@click.option("--scope", default="layer", show_default=True, help="Sparsity of each layer, or global: of all together.")
@click.option("--bits", type=int, help="Share weights among 2^BITS levels per layer, 1 to 8. Default: keep them.")
@click.option(
    "--quantizer", default="codebook", show_default=True,
    help="codebook, uniform, asymmetric, fixed-point, power-of-two, ternary or binary.",
)  # fmt: skip
@click.option(
    "--granularity", default="tensor", show_default=True,
    help="What has levels of its own: tensor, channel, or so many weights (16, 32, … 512).",
)  # fmt: skip
@click.option("--coder", "coders", multiple=True, help="raw, huffman, ans, ans16; default: the smallest, per stream.")
@click.option("--json", "as_json", is_flag=True, help="Print the sizes as JSON.")
@plain_errors
def pack(
    source: Path,
    to: Path,
    sparsity: float | None,
    bits: int | None,
    *,
    scope: str,
    quantizer: str,
    granularity: str,
    coders: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the weights of SOURCE into one small file: Deep Compression storage.

    SOURCE is a .safetensors file, a run (its best result), an artefact or a deployed directory. Without --sparsity and
    --bits, `unpack` gives the same weights to the bit. For storage and transport only: an engine runs no faster for it.
    """
    from autocompress.report.storage import sizes_table
    from autocompress.storage import pack as write
    from autocompress.storage.coders import CODERS

    packed = write(
        source, to, sparsity=sparsity, scope=scope, weight_bits=bits, scheme=quantizer,
        granularity=int(granularity) if granularity.isdecimal() else granularity, coders=coders or tuple(CODERS),
    )  # fmt: skip
    if as_json:
        echo(json.dumps(packed.to_dict(), indent=2))
    else:
        out.print(sizes_table(packed))
    if not packed.lossless:
        err.print("Weights were changed and accuracy was not measured: unpack and test them.", highlight=False)


@click.command(short_help="Write the weights of a packed file out again.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", "to", required=True, type=click.Path(path_type=Path), metavar="FILE", help="New .safetensors.")
@click.option("--json", "as_json", is_flag=True, help="Print the tensors as JSON.")
@plain_errors
def unpack(file: Path, to: Path, as_json: bool) -> None:
    """Write the weights of FILE, made by `pack`, into a .safetensors file, after checking that it is whole."""
    from autocompress.storage import unpack as read

    state = read(file, to)
    size = to.stat().st_size
    if as_json:
        tensors = {name: {"shape": list(one.shape), "dtype": str(one.dtype)[6:]} for name, one in state.items()}
        echo(json.dumps({"path": str(to), "size_bytes": size, "tensors": tensors}, indent=2))
    else:
        out.print(f"{len(state)} tensors, {size} bytes: {to}", highlight=False, soft_wrap=True)
