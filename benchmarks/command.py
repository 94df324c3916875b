"""The command line that the benchmarks of the engine share: repeats, threads, where the figures go."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import gpu_table
from copd_engine.gpu_meter import GpuMeter


def main_of(
    name: str,
    description: str | None,
    repeats: int,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
    arguments: Sequence[str] | None = None,
    devices: Sequence[str] = (),
) -> None:
    """Run ``benchmarks.NAME``: print what ``render`` makes of ``run(options)``, its command and its number of threads,
    and write it where it was asked for. ``devices``: the choices of ``--device``, the first by default.

    Where there are GPUs, a table says what they used in the whole command.
    """
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds of what is timed")
    parser.add_argument("--threads", type=int, default=1)
    if devices:
        parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    command = f"python -m benchmarks.{name} {given}".strip()
    with GpuMeter() as meter:
        record = {"command": command, "threads": options.threads, **run(options)}
    record["gpu"] = {index: asdict(use) for index, use in meter.use.items()}
    text = render(record) + gpu_table(meter.use)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)
