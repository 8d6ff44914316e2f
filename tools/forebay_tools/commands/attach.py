"""`forebay attach`: serve a volume, or a snapshot read-only, through the cache daemon."""

import argparse
import asyncio

from forebay_tools.arguments import Commands, add_command, add_run_dir, add_volume_or_snapshot
from forebay_tools.connect import cache_client
from forebay_tools.printing import say_json
from forebay_wire.messages import Attach, Attached


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "attach",
        run,
        "serve a volume, or a snapshot read-only, through the cache daemon; prints its URI as JSON",
    )
    add_volume_or_snapshot(parser)
    parser.add_argument("--read-only", action="store_true", help="refuse writes; nobody else can write meanwhile")
    parser.add_argument("--front", choices=["nbd"], default="nbd", help="how clients reach the volume")
    parser.add_argument(
        "--take-over", action="store_true", help="take the volume from a writer that is gone; fences that writer"
    )
    add_run_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the daemon and print {"uri": ...}."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with cache_client(arguments) as client:
        request = Attach(arguments.name, arguments.read_only, arguments.take_over)
        answer, _ = await client.ask(request, Attached)
    say_json({"uri": answer.uri})
    return 0
