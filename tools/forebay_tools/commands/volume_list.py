"""`forebay volume list`: all volumes of a store."""

import argparse
import asyncio

from forebay_core.errors import ProtocolError
from forebay_core.units import BLOCK_SIZE, format_size
from forebay_tools.arguments import Commands, add_command, add_json, add_store
from forebay_tools.connect import store_client
from forebay_tools.printing import say_json, say_table
from forebay_tools.rows import row_json
from forebay_wire.client import WireClient
from forebay_wire.messages import ListVolumes, VolumeRow, Volumes

HEAD = ("NAME", "SIZE", "DATA", "STORED", "SNAPSHOTS", "CLONE OF", "EPOCH", "WRITER")


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "list", run, "list the volumes of a store")
    add_json(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask page by page and print."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    async with store_client(arguments) as client:
        rows = await _all_rows(client)
    if arguments.json:
        say_json([row_json(row) for row in rows])
    else:
        say_table(HEAD, [_cells(row) for row in rows])
    return 0


async def _all_rows(client: WireClient) -> list[VolumeRow]:
    rows: list[VolumeRow] = []
    more = True
    while more:
        after = rows[-1].name if rows else ""
        page, _ = await client.ask(ListVolumes(after), Volumes)
        if page.more and not (page.rows and page.rows[-1].name > after):
            raise ProtocolError(f"the list of volumes does not go on behind {after!r}")
        rows.extend(page.rows)
        more = page.more
    return rows


def _cells(row: VolumeRow) -> tuple[str, ...]:
    return (
        row.name,
        format_size(row.size),
        format_size(row.data_blocks * BLOCK_SIZE),
        format_size(row.stored_size),
        str(row.snapshots),
        row.origin_name or "-",
        str(row.epoch),
        row.writer.hex() or "-",
    )
