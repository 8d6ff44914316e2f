"""`forebay trace convert`: any known trace as our own binary one."""

import argparse
import sys
from pathlib import Path
from typing import BinaryIO

from forebay_core.errors import ForebayError
from forebay_tools.analysis.trace_record import HEADER, MAGIC, encode_batch, encode_name
from forebay_tools.analysis.traces import read_trace
from forebay_tools.arguments import Commands, add_command
from forebay_tools.progress import Progress


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "convert", run, "write a trace of any known format as forebay's own")
    parser.add_argument("source", metavar="TRACE", type=Path, help="trace of block accesses")
    parser.add_argument("target", metavar="FILE", type=Path, help="file to make; it must not exist")


def run(arguments: argparse.Namespace) -> int:
    """Convert; a target that could not be finished is removed."""
    try:
        with arguments.target.open("xb") as file:
            try:
                _convert(arguments.source, file)
            except BaseException:
                arguments.target.unlink()
                raise
    except FileExistsError as error:
        raise ForebayError(f"{arguments.target}: exists already; give another name") from error
    return 0


def _convert(source: Path, file: BinaryIO) -> None:
    names: dict[int, str] = {}
    progress = Progress("converting", source.stat().st_size, sys.stderr, lines=False)
    try:
        file.write(HEADER.pack(MAGIC, 0))
        for part in read_trace(source):
            for key, name in part.volumes.items():
                if names.get(key) != name:
                    names[key] = name
                    file.write(encode_name(key, name))
            file.write(encode_batch(part.batch))
            progress.reach(part.done)
    finally:
        progress.close()
