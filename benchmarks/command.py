"""The command line that the benchmarks of the engine share: repeats, threads, where the figures go."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def main_of(
    name: str,
    description: str | None,
    repeats: int,
    run: Callable[[int], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
    arguments: Sequence[str] | None = None,
) -> None:
    """Run ``benchmarks.NAME``: print what ``render`` makes of ``run(repeats)``, its command and its number of threads,
    and write it where it was asked for."""
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds of what is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    command = f"python -m benchmarks.{name} {given}".strip()
    record = {"command": command, "threads": options.threads, **run(options.repeats)}
    text = render(record)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)
