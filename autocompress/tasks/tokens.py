"""How sentences become the inputs of a text model: what a deployed directory needs to take sentences itself."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NotRequired, Self

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from autocompress.documents import Count, validated
from autocompress.errors import ConfigError
from autocompress.files import read_json, write_json

# The tokenizer's file in a run and in a deployed directory, as the `tokenizers` package reads it.
TOKENIZER_NAME = "tokenizer.json"
_SETTINGS_NAME = "tokens.json"


@with_config(ConfigDict(extra="forbid"))
class _Settings(TypedDict):
    """What ``tokens.json`` says."""

    length: Annotated[int, Field(ge=1, le=2**20)]
    pad_id: NotRequired[Count]
    pad_token: NotRequired[Annotated[str, Field(max_length=200)]]
    padding_side: NotRequired[Literal["left", "right"]]


@dataclass(frozen=True)
class TextTokens:
    """Tokens of a fixed length.

    Attributes:
        file: Of the tokenizer, in the format of the `tokenizers` package.
        length: Tokens of one text, padding included.
        pad_id, pad_token: What texts are padded with.
        padding_side: ``"right"``, or ``"left"`` as decoders have it.
    """

    file: Path
    length: int
    pad_id: int = 0
    pad_token: str = "[PAD]"
    padding_side: str = "right"

    def write(self, folder: Path) -> None:
        """Copy the tokenizer into a run directory, and what it is to be used with.

        Raises:
            ConfigError: A file cannot be written.
        """
        try:
            shutil.copyfile(self.file, folder / TOKENIZER_NAME)
        except OSError as error:
            raise ConfigError(f"{folder / TOKENIZER_NAME} cannot be written: {error.strerror or error}.") from error
        settings = {key: value for key, value in asdict(self).items() if key != "file"}
        write_json(folder / _SETTINGS_NAME, settings)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what `write` put into a run directory; None where there is nothing.

        Raises:
            ConfigError: It is damaged.
        """
        file, settings = folder / TOKENIZER_NAME, folder / _SETTINGS_NAME
        if not file.exists() or not settings.exists():
            return None
        return cls(file, **validated(_Settings, read_json(settings), settings))
