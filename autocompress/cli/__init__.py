"""The command line, a thin face over `autocompress.api`: data on stdout, progress on stderr, exit codes of `errors`."""

from __future__ import annotations

import click

from autocompress import __version__
from autocompress.cli import devices, methods, runs, storage


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def main(debug: bool) -> None:
    """Compress a trained PyTorch model for a latency budget, measured on the device it will run on."""


for _command in (
    runs.search, runs.pareto, runs.deploy, devices.benchmark, devices.measure, devices.profile, devices.build,
    runs.inspect, runs.sensitivity, methods.prune, methods.quantize, methods.distill, methods.methods, storage.pack,
    storage.unpack,
    devices.devices, devices.doctor, devices.env,
):  # fmt: skip
    main.add_command(_command)
