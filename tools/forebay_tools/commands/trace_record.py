"""`forebay trace record`: what the running cache daemon is asked for, as a trace of our own format."""

import argparse
import asyncio
import os
import signal
import time
from io import FileIO
from pathlib import Path

from forebay_core.errors import ForebayError, StoreUnreachableError, WrongUsageError
from forebay_core.names import check_name
from forebay_tools.analysis.trace_record import HEADER, MAGIC, RECORD, encode_name
from forebay_tools.arguments import Commands, above_zero, add_command, add_run_dir
from forebay_tools.connect import cache_client, refuse_older
from forebay_tools.printing import note, say
from forebay_wire.client import WireClient
from forebay_wire.messages import Done, RecordTrace, TakeTrace, TraceRows

ANSWER_TIMEOUT_S = 10.0


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "record", run, "record what volumes are asked for, until interrupted")
    parser.add_argument("name", metavar="VOL", nargs="?", help="name of the volume; or --all")
    parser.add_argument("file", metavar="FILE", type=Path, help="file to make")
    parser.add_argument("--all", action="store_true", help="record all attached volumes")
    parser.add_argument(
        "--seconds", metavar="COUNT", type=above_zero("number of seconds", 1e9), help="end by itself after so long"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    add_run_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    """Record until the time is over, or SIGINT or SIGTERM."""
    if arguments.all == (arguments.name is not None):
        raise WrongUsageError("record what? give the name of a volume or --all, and a file")
    if arguments.name is not None:
        check_name(arguments.name)
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with cache_client(arguments) as client:
        try:
            await client.ask(RecordTrace(arguments.name or ""), Done, timeout_s=ANSWER_TIMEOUT_S)
        except StoreUnreachableError:
            await refuse_older(arguments)
        with _made(arguments.file, force=arguments.force) as file:
            if arguments.seconds is not None:
                loop.call_later(arguments.seconds, stop.set)
            took = _Took(file)
            try:
                await took.all(client, stop)
            except StoreUnreachableError as error:
                raise ForebayError(
                    f"the cache daemon does not answer any more ({error}); {arguments.file} has the {took.requests} "
                    "requests until then"
                ) from error
    say(f"{arguments.file}: {took.requests} requests in {took.elapsed_s:.0f} s")
    if took.lost:
        note(f"{took.lost} requests are missing: they came faster than they could be written")
    return 0


class _Took:
    """What was recorded so far. The file is whole after each call."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._size = file.write(HEADER.pack(MAGIC, time.time_ns()))
        self._began_s = time.monotonic()
        self.requests = 0
        self.lost = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began_s

    async def all(self, client: WireClient, stop: asyncio.Event) -> None:
        """Take until told to stop, and then what is left."""
        last = False
        while not last:
            last = stop.is_set()
            answer, payload = await client.ask(TakeTrace(last), TraceRows, timeout_s=ANSWER_TIMEOUT_S)
            self._keep(answer, payload)

    def _keep(self, answer: TraceRows, payload: memoryview) -> None:
        names = b"".join(encode_name(volume.key, volume.name) for volume in answer.volumes)
        rest = memoryview(names + bytes(payload))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)  # to whole rows
            raise
        self._size += len(names) + len(payload)
        self.requests += len(payload) // RECORD.size
        self.lost += answer.lost


def _made(path: Path, *, force: bool) -> FileIO:
    """Return a file without a buffer, so that what is in it is what was written."""
    try:
        return path.open("wb" if force else "xb", buffering=0)
    except FileExistsError as error:
        raise ForebayError(f"{path}: exists already; give another name, or --force") from error
