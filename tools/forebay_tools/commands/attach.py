"""`forebay attach`: serve a volume, or a snapshot read-only, through the cache daemon.

A block device of the kernel has sectors of 512 bytes unless told otherwise: partition tables count in sectors, and
images that were made for virtual machines count in those.
"""

import argparse
import asyncio
from typing import Final

from forebay_core.errors import WrongUsageError
from forebay_tools.arguments import Commands, add_command, add_run_dir, add_volume_or_snapshot
from forebay_tools.connect import cache_client
from forebay_tools.printing import say_json
from forebay_wire.messages import Attach, Attached

FRONTS: Final = ("nbd", "kernel", "fuse", "loop")
FRONT_HELP: Final = "how the volume is reached: NBD only, or by a file or block device too, which outlive the daemon"


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "attach",
        run,
        "serve a volume, or a snapshot read-only, through the cache daemon; prints its URI or path as JSON",
    )
    add_volume_or_snapshot(parser)
    parser.add_argument("--read-only", action="store_true", help="refuse writes; nobody else can write meanwhile")
    parser.add_argument("--front", choices=FRONTS, default="nbd", help=FRONT_HELP)
    parser.add_argument("--block-size", choices=["512", "4096"], help="sector size of a kernel device (512)")
    parser.add_argument(
        "--take-over", action="store_true", help="take the volume from a writer that is gone; fences that writer"
    )
    add_run_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the daemon and print {"uri": ...}, or {"path": ...} of a file or device."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    if arguments.take_over and "@" in arguments.name:
        raise WrongUsageError(f"{arguments.name} is a snapshot: nobody writes it, so there is nothing to --take-over")
    block_size = _block_size(arguments)
    async with cache_client(arguments) as client:
        request = Attach(arguments.name, arguments.read_only, arguments.take_over, arguments.front, block_size)
        answer, _ = await client.ask(request, Attached)
    if not answer.path:
        say_json({"uri": answer.uri})
    elif not answer.link:
        say_json({"path": answer.path})
    else:
        say_json({"path": answer.path, "link": answer.link})
    return 0


def _block_size(arguments: argparse.Namespace) -> int:
    if arguments.front == "kernel":
        return int(arguments.block_size or 512)
    if arguments.block_size:
        raise WrongUsageError(f"--block-size is for --front kernel, not for {arguments.front}")
    return 0
