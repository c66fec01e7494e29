"""Entropy coders of symbol streams: each takes symbols ``0 .. alphabet - 1`` and gives bytes, model included.

`constriction` does the coding (Bamler, "Understanding entropy coding with asymmetric numeral systems", 2022). What the
bytes mean, to the bit, is in docs/storage.md.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import constriction
import numpy as np
from numpy.typing import NDArray

from autocompress.catalogue import Method
from autocompress.errors import VerificationError

Symbols = NDArray[np.int64]


METHODS = (
    Method(
        name="huffman",
        family="storage",
        summary="Codes gaps and codebook indices in whole bits by their frequencies",
        source="Huffman 1952; in Han, Mao & Dally, Deep Compression, ICLR 2016",
    ),
    Method(
        name="ans",
        family="storage",
        summary="Codes gaps and codebook indices within a percent or so of their entropy",
        source="Duda, Asymmetric numeral systems, 2013; constriction: Bamler 2022",
    ),
)


class Coder(abc.ABC):
    """One coder.

    Attributes:
        name: As a container names it.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def size(self, symbols: Symbols, alphabet: int) -> int:
        """Return how many bytes `encode` gives."""

    @abc.abstractmethod
    def encode(self, symbols: Symbols, alphabet: int) -> bytes:
        """Return the bytes of `symbols` ``(n,)``, every one below `alphabet`."""

    @abc.abstractmethod
    def decode(self, data: bytes, count: int, alphabet: int) -> Symbols:
        """Return the `count` symbols of `data`.

        Raises:
            VerificationError: `data` is too short.
        """


class Raw(Coder):
    """Every symbol in as many bits as the alphabet needs, most significant bit first."""

    name = "raw"

    def size(self, symbols: Symbols, alphabet: int) -> int:
        """See `Coder.size`."""
        return (len(symbols) * _width(alphabet) + 7) // 8

    def encode(self, symbols: Symbols, alphabet: int) -> bytes:
        """See `Coder.encode`."""
        shifts = np.arange(_width(alphabet))[::-1]
        return np.packbits((symbols[:, None] >> shifts & 1).astype(np.uint8)).tobytes()

    def decode(self, data: bytes, count: int, alphabet: int) -> Symbols:
        """See `Coder.decode`."""
        width = _width(alphabet)
        _at_least(data, (count * width + 7) // 8, self.name)
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width).reshape(count, width)
        weights = 1 << np.arange(width, dtype=np.int64)[::-1]
        return bits.astype(np.int64) @ weights


class Huffman(Coder):
    """A Huffman code of the stream's own frequencies."""

    name = "huffman"

    def size(self, symbols: Symbols, alphabet: int) -> int:
        """See `Coder.size`."""
        if not len(symbols):
            return alphabet
        counts = np.bincount(symbols, minlength=alphabet)
        tree = constriction.symbol.huffman.EncoderHuffmanTree(_probabilities(_frequencies(symbols, alphabet, "<u1")))
        bits = 0
        for symbol in np.flatnonzero(counts):
            probe = constriction.symbol.QueueEncoder()
            probe.encode_symbol(int(symbol), tree)
            bits += int(counts[symbol]) * probe.get_compressed()[1]
        return alphabet + (bits + 7) // 8

    def encode(self, symbols: Symbols, alphabet: int) -> bytes:
        """See `Coder.encode`."""
        frequencies = _frequencies(symbols, alphabet, "<u1")
        tree = constriction.symbol.huffman.EncoderHuffmanTree(_probabilities(frequencies))
        encoder = constriction.symbol.QueueEncoder()
        for symbol in symbols.tolist():
            encoder.encode_symbol(symbol, tree)
        words, bits = encoder.get_compressed()
        coded: bytes = words.astype("<u4").tobytes()[: (bits + 7) // 8]
        return frequencies.tobytes() + coded

    def decode(self, data: bytes, count: int, alphabet: int) -> Symbols:
        """See `Coder.decode`."""
        frequencies, words = _split(data, alphabet, "<u1", self.name)
        if not count or alphabet == 1:  # of one symbol there is nothing to say
            return np.zeros(count, np.int64)
        if not frequencies.any() or count > 8 * (len(data) - len(frequencies)):
            raise _too_short(self.name)
        tree = constriction.symbol.huffman.DecoderHuffmanTree(_probabilities(frequencies))
        decoder = constriction.symbol.QueueDecoder(words)
        try:
            return np.array([decoder.decode_symbol(tree) for _ in range(count)], dtype=np.int64)
        except ValueError as error:
            raise _too_short(self.name) from error


class Ans(Coder):
    """Range asymmetric numeral systems: a fraction of a bit for a symbol that is likely.

    Frequencies are kept as bytes, which is close enough for streams so short that a wider table would not pay.
    """

    name = "ans"
    frequency: ClassVar[str] = "<u1"

    def size(self, symbols: Symbols, alphabet: int) -> int:
        """See `Coder.size`."""
        return len(self.encode(symbols, alphabet))

    def encode(self, symbols: Symbols, alphabet: int) -> bytes:
        """See `Coder.encode`."""
        frequencies = _frequencies(symbols, alphabet, self.frequency)
        coder = constriction.stream.stack.AnsCoder()
        if len(symbols):
            coder.encode_reverse(symbols.astype(np.int32), _categorical(frequencies))
        coded: bytes = coder.get_compressed().astype("<u4").tobytes()
        return frequencies.tobytes() + coded

    def decode(self, data: bytes, count: int, alphabet: int) -> Symbols:
        """See `Coder.decode`."""
        frequencies, words = _split(data, alphabet, self.frequency, self.name)
        if (len(data) - frequencies.nbytes) % 4:
            raise _too_short(self.name)
        if not count:
            return np.zeros(0, np.int64)
        if not frequencies.any():
            raise _too_short(self.name)
        try:
            coder = constriction.stream.stack.AnsCoder(words)
        except ValueError as error:  # it never writes a last word of zero
            raise _too_short(self.name) from error
        found = coder.decode(_categorical(frequencies), count).astype(np.int64)
        if not coder.is_empty():
            raise _too_short(self.name)
        return np.asarray(found)


class WideAns(Ans):
    """The same with frequencies of two bytes: for long streams in which some symbols are rare."""

    name = "ans16"
    frequency = "<u2"


CODERS: dict[str, Coder] = {coder.name: coder for coder in (Raw(), Huffman(), Ans(), WideAns())}


def encode_smallest(symbols: Symbols, alphabet: int, names: tuple[str, ...]) -> tuple[str, bytes]:
    """Return the coder of those named that needs the fewest bytes for `symbols`, and its bytes."""
    best = min((CODERS[name] for name in names), key=lambda coder: coder.size(symbols, alphabet))
    return best.name, best.encode(symbols, alphabet)


def _width(alphabet: int) -> int:
    return max(1, (alphabet - 1).bit_length())


def _frequencies(symbols: Symbols, alphabet: int, dtype: str) -> NDArray[Any]:
    """Return how often each symbol occurs, scaled to the whole range of `dtype`; what occurs at all, once at least."""
    counts = np.bincount(symbols, minlength=alphabet)
    scaled = np.rint(counts * (np.iinfo(dtype).max / max(1, counts.max(initial=0))))
    return np.asarray(np.maximum(scaled, counts > 0), dtype)


def _probabilities(frequencies: NDArray[Any]) -> NDArray[np.float64]:
    return frequencies.astype(np.float64)


def _categorical(frequencies: NDArray[Any]) -> constriction.stream.model.Categorical:
    # A model of one symbol has no probabilities to tell apart; a second one, which never comes, makes it a model.
    shares = _probabilities(frequencies if len(frequencies) > 1 else np.append(frequencies, 0))
    return constriction.stream.model.Categorical(shares, perfect=False)


def _split(data: bytes, alphabet: int, dtype: str, name: str) -> tuple[NDArray[Any], NDArray[np.uint32]]:
    table = alphabet * np.dtype(dtype).itemsize
    _at_least(data, table, name)
    rest = data[table:] + bytes(-(len(data) - table) % 4)
    return np.frombuffer(data[:table], dtype), np.frombuffer(rest, "<u4").astype(np.uint32)


def _at_least(data: bytes, needed: int, name: str) -> None:
    if len(data) < needed:
        raise _too_short(name)


def _too_short(name: str) -> VerificationError:
    return VerificationError(
        f"A stream of the coder {name!r} does not hold the symbols it should; the file is damaged. Pack it again."
    )
