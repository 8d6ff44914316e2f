"""`forebay drain`: destage what was acknowledged so far."""

import argparse
import asyncio

from forebay_tools.arguments import Commands, add_command, add_run_dir, add_store, add_volume
from forebay_tools.holder import ask_daemon
from forebay_wire.messages import Done, Drain


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "drain",
        run,
        "destage all that was written so far, at the peak of its limit; the volume stays attached",
    )
    add_volume(parser)
    add_run_dir(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the daemon; returns when the store has it all."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    await ask_daemon(arguments, arguments.name, Drain(arguments.name), Done)
    return 0
