"""`forebay store clean`: give the space of what is dead back now, on a running store."""

import argparse

from forebay_core.errors import EXIT_FAILED, ForebayError
from forebay_core.units import format_size
from forebay_tools.arguments import Commands, add_command, add_json, add_store, add_wait
from forebay_tools.connect import store_client
from forebay_tools.interrupt import run_interruptible
from forebay_tools.printing import Json, say, say_json
from forebay_tools.rows import clean_json
from forebay_tools.store_watch import damage_json, follow, known_damage, say_damage, store_status
from forebay_wire.messages import CleanStore, Done, StoreStatus


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "give the space of what is dead back now, on a running store; exit code 1 if damage is known, which it lists"
    parser = add_command(commands, "clean", run, text)
    add_wait(parser, "return when the pass is over, or with --no-wait as soon as it is asked for", default=True)
    add_json(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Clean; an interruption ends only the waiting."""
    return run_interruptible(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        before = await store_status(client)
        await client.ask(CleanStore(), Done)
        if not arguments.wait:
            say("cleaning is asked for; forebay status tells how it is")
            return 0
        after = await follow(client, lambda status: status.clean.passes > before.clean.passes)
        damage = await known_damage(client)
    if after.clean.error:
        raise ForebayError(f"cleaning ended early: {after.clean.error}")
    if arguments.json:
        say_json({**_json(before, after), "damage": [damage_json(row) for row in damage]})
    else:
        say_damage(damage)
        say(_summary(before, after))
    return EXIT_FAILED if damage else 0


def _json(before: StoreStatus, after: StoreStatus) -> dict[str, Json]:
    return {
        **clean_json(after.clean),
        "segments_freed": after.clean.segments_freed - before.clean.segments_freed,
        "bytes_freed": after.clean.bytes_freed - before.clean.bytes_freed,
        "bytes_copied": after.clean.bytes_copied - before.clean.bytes_copied,
        "segment_bytes": after.segment_bytes,
        "live_bytes": after.live_bytes,
    }


def _summary(before: StoreStatus, after: StoreStatus) -> str:
    freed = after.clean.bytes_freed - before.clean.bytes_freed
    segments = after.clean.segments_freed - before.clean.segments_freed
    copied = after.clean.bytes_copied - before.clean.bytes_copied
    return (
        f"{format_size(freed)} in {segments} segments freed, {format_size(copied)} copied; the store has "
        f"{format_size(after.segment_bytes)} on disk for {format_size(after.live_bytes)} that is live"
    )
