"""`forebay snapshot create`: take a snapshot of a volume, attached or not."""

import argparse
import asyncio

from forebay_tools.arguments import Commands, add_command, add_run_dir, add_snapshot, add_store, add_wait
from forebay_tools.holder import ask_holder
from forebay_tools.printing import say
from forebay_wire.messages import CreateSnapshot, SnapshotTaken


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "create", run, "take a snapshot of a volume, while it is attached or not")
    add_snapshot(parser)
    add_wait(parser, "return when the store has it, so that it can be cloned and attached elsewhere", default=False)
    add_run_dir(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Take the snapshot; returns when it is durable."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    volume, snapshot = arguments.snapshot
    message = CreateSnapshot((volume,), snapshot, arguments.wait)
    answer, _ = await ask_holder(arguments, volume, message, SnapshotTaken)
    pending = "; it is on its way to the store" if answer.row.pending else ""
    say(f"snapshot {arguments.snapshot} taken{pending}")
    return 0
