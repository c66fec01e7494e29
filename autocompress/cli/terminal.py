"""What every command shares: the two consoles, and errors as a message and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from autocompress.errors import AutoCompressError, Stopped

# No text is markup: paths, names and messages come from anywhere. What is to be bold is a `Text`.
out = Console(markup=False)
err = Console(stderr=True, markup=False)
# Of commands that open what somebody else may have made.
trust_option = click.option(
    "--trust", is_flag=True, help="Run code that the folder names, such as its task's module. Else none is run."
)


def echo(text: str) -> None:
    """Print data as they are."""
    click.echo(text, file=out.file)


@contextmanager
def _stdout_for_data() -> Iterator[None]:
    """Have stdout hold `out` and `echo` alone; what a user's model, data or metric print goes to stderr."""
    out.file = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        out.file = None  # type: ignore[assignment]  # stdout, whatever it then is


def plain_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors into a message and an exit code, ``--debug`` shows the traceback; keep stdout for data."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with _stdout_for_data():
                return command(*args, **kwargs)
        except AutoCompressError as error:
            if click.get_current_context().find_root().params.get("debug"):
                raise
            err.print(Text.assemble((type(error).__name__, "bold red"), ": "), end="")
            # Not wrapped: paths and commands in a message are there to be copied.
            err.print(str(error), highlight=False, soft_wrap=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt as error:
            stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
            by = "" if stopped.signal == signal.SIGINT else f" by {stopped.signal.name}"
            err.print(f"Interrupted{by}.", highlight=False)
            sys.exit(stopped.exit_code)

    return run
