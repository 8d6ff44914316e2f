"""`forebay store scrub`: read and verify everything a running store holds, and list what is damaged."""

import argparse
import sys

from forebay_core.errors import EXIT_FAILED, ForebayError
from forebay_core.units import format_size
from forebay_tools.arguments import Commands, add_command, add_json, add_store, add_wait, transfer_rate
from forebay_tools.connect import store_client
from forebay_tools.interrupt import run_interruptible
from forebay_tools.printing import say, say_json
from forebay_tools.progress import Progress
from forebay_tools.rows import scrub_json
from forebay_tools.store_watch import damage_json, follow, known_damage, say_damage, store_status
from forebay_wire.client import WireClient
from forebay_wire.messages import Done, ScrubStore, StoreStatus


def add(commands: Commands) -> None:
    """Declare the command."""
    text = (
        "read and verify all that a running store holds; lists damage by volume and block, exit code 1 if there is any"
    )
    parser = add_command(commands, "scrub", run, text)
    parser.add_argument(
        "--rate", metavar="RATE", type=transfer_rate, default=0, help="bytes a second, else as the store's settings say"
    )
    add_wait(parser, "return when all was read, or with --no-wait as soon as it is asked for", default=True)
    add_json(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Scrub; an interruption ends only the waiting."""
    return run_interruptible(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        before = await store_status(client)
        await client.ask(ScrubStore(arguments.rate), Done)
        after = await _follow(client, before) if arguments.wait else await store_status(client)
        damage = await known_damage(client)
    if arguments.json:
        say_json({**scrub_json(after.scrub), "damage": [damage_json(row) for row in damage]})
    else:
        say_damage(damage)
        say(_summary(after, len(damage), waited=arguments.wait))
    return EXIT_FAILED if damage else 0


async def _follow(client: WireClient, before: StoreStatus) -> StoreStatus:
    progress = Progress("scrubbing", 0, sys.stderr)

    def over(status: StoreStatus) -> bool:
        progress.reach_of(status.scrub.checked_size, status.scrub.total_size)
        return not status.scrub.running

    try:
        status = await follow(client, over)
    finally:
        progress.close()
    if status.scrub.finished_ns == before.scrub.finished_ns:
        raise ForebayError(
            "the scrub ended before everything was read; run this again to go on, the store's log says why"
        )
    return status


def _summary(status: StoreStatus, damaged: int, *, waited: bool) -> str:
    found = f"{damaged} damaged extents are known" if damaged else "no damage is known"
    if waited:
        return f"{format_size(status.scrub.checked_size)} verified; {found}"
    return f"the scrub is under way, {found}; forebay status tells how it is"
