"""The command line, a thin face over `autocompress.api`: data on stdout, progress on stderr, exit codes of `errors`."""

from __future__ import annotations

import os
import sys

import click

from autocompress import __version__
from autocompress.cli import devices, methods, runs, storage


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def main(debug: bool) -> None:
    """Compress a trained PyTorch model for a latency budget, measured on the device it will run on."""
    _keep_stdout_clean(chatter=debug)


def _keep_stdout_clean(*, chatter: bool) -> None:
    """Keep what libraries print from C, as HiGHS does, off stdout, which is for data that somebody may parse.

    It goes to stderr where `chatter` is wanted, else nowhere: names of its functions tell a user nothing.
    """
    if sys.stdout is not sys.__stdout__ or sys.stdout is None or sys.stdout.fileno() != 1:
        return
    sys.stdout.flush()
    ours = os.dup(1)
    elsewhere = os.dup(2) if chatter else os.open(os.devnull, os.O_WRONLY)
    os.dup2(elsewhere, 1)
    os.close(elsewhere)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)


for _command in (
    runs.search, runs.pareto, runs.deploy, devices.benchmark, devices.measure, devices.profile, devices.build,
    runs.repair, runs.inspect, runs.sensitivity, methods.prune, methods.quantize, methods.distill, methods.methods,
    storage.pack, storage.unpack,
    devices.devices, devices.doctor, devices.env,
):  # fmt: skip
    main.add_command(_command)
