"""`forebay trace convert`: any known trace as our own binary one."""

import argparse
from pathlib import Path

import numpy as np

from forebay_core.errors import ForebayError
from forebay_tools.analysis.trace_record import HEADER, MAGIC, RECORD_DTYPE, WRITE_BIT
from forebay_tools.analysis.traces import read_trace
from forebay_tools.arguments import Commands, add_command


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
                file.write(HEADER.pack(MAGIC, 0))
                for part in read_trace(arguments.source):
                    batch = part.batch
                    rows = np.zeros(batch.keys.size, RECORD_DTYPE)
                    rows["time_ms"] = (batch.times_ms & np.uint64(0xFFFFFFFF)).astype(np.uint32)
                    rows["count_op"] = batch.counts.astype(np.uint32) | np.where(batch.writes, WRITE_BIT, 0)
                    rows["key"] = batch.keys
                    file.write(rows.tobytes())
            except BaseException:
                arguments.target.unlink()
                raise
    except FileExistsError as error:
        raise ForebayError(f"{arguments.target}: exists already; give another name") from error
    return 0
