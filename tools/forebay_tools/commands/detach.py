"""`forebay detach`: stop serving a volume and give it back."""

import argparse
import asyncio

from forebay_tools.arguments import Commands, add_command, add_run_dir, add_store, add_volume_or_snapshot
from forebay_tools.holder import ask_daemon
from forebay_wire.messages import Detach, Done


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "detach", run, "destage all at the peak of its limit, stop serving a volume and release it"
    )
    add_volume_or_snapshot(parser)
    parser.add_argument(
        "--leave-dirty", action="store_true", help="destage nothing: dirty blocks stay here and so does the epoch"
    )
    add_run_dir(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the daemon; returns when the volume is released."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    await ask_daemon(arguments, arguments.name, Detach(arguments.name, arguments.leave_dirty), Done)
    return 0
