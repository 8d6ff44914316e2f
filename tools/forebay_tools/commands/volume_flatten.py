"""`forebay volume flatten`: give a clone all its blocks, so that it does not need its origin any more."""

import argparse
import asyncio
import sys
import time
from typing import Final

from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, format_size
from forebay_tools.arguments import Commands, add_command, add_store, add_volume, add_wait
from forebay_tools.connect import store_client
from forebay_tools.interrupt import run_interruptible
from forebay_tools.printing import say
from forebay_tools.progress import Progress
from forebay_tools.view import mapped, view_of_volume
from forebay_wire.client import WireClient
from forebay_wire.messages import Done, FlattenVolume, GetStoreStatus, GetVolume, StoreStatus, Volume, VolumeRow

POLL_S: Final = 0.2
STUCK_S: Final = 60.0
"""When the store copied nothing for so long, as where the origin can't be read, nobody needs to wait."""


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "copy into a clone what it still reads from its origin, in the background, and cut the tie"
    parser = add_command(commands, "flatten", run, text)
    add_volume(parser)
    add_wait(parser, "return when the tie is cut; shows how far it is", default=False)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask for it; an interruption ends only the waiting."""
    return run_interruptible(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        await client.ask(FlattenVolume(arguments.name), Done)
        if arguments.wait:
            row = await _follow(client, arguments.name)
            say(f"volume {row.name} stands alone now, {format_size(row.data_blocks * BLOCK_SIZE)} of it data")
        else:
            say(f"volume {arguments.name} is being flattened; forebay volume info {arguments.name} tells how it is")
    return 0


async def _follow(client: WireClient, name: str) -> VolumeRow:
    row = await _row(client, name)
    total = 0
    if row.flattening:
        view = view_of_volume(row)
        async for extent, hole in mapped(client, view, view.whole):
            total += 0 if hole else extent.count * BLOCK_SIZE
    progress = Progress("flattening", total, sys.stderr)
    last, seen_s = row.data_blocks, time.monotonic()
    try:
        while row.flattening:
            progress.reach(min(row.data_blocks * BLOCK_SIZE, total))
            if row.data_blocks != last:
                last, seen_s = row.data_blocks, time.monotonic()
            if time.monotonic() - seen_s > STUCK_S:
                raise ForebayError(
                    f"flattening {name} makes no progress; the store's log says why, forebay store scrub finds damage"
                )
            status, _ = await client.ask(GetStoreStatus(), StoreStatus)
            if status.error:
                raise ForebayError(f"the store refuses changes: {status.error}; flattening goes on when it is mended")
            await asyncio.sleep(POLL_S)
            row = await _row(client, name)
    finally:
        progress.close()
    return row


async def _row(client: WireClient, name: str) -> VolumeRow:
    return (await client.ask(GetVolume(name), Volume))[0].row
