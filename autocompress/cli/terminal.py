"""What every command shares: the two consoles, and errors as a message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click
from rich.console import Console

from autocompress.errors import EXIT_INTERRUPTED, AutoCompressError

out = Console()
err = Console(stderr=True)


def plain_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors into a message and an exit code; ``--debug`` shows the traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except AutoCompressError as error:
            if click.get_current_context().find_root().params.get("debug"):
                raise
            err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
            # Not wrapped: paths and commands in a message are there to be copied.
            err.print(str(error), markup=False, highlight=False, soft_wrap=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            err.print("Interrupted.", highlight=False)
            sys.exit(EXIT_INTERRUPTED)

    return run
