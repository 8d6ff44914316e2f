"""Follows work that a running store was asked to do, by its status, and tells what damage it knows of."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE
from forebay_tools.printing import Json, say_table
from forebay_wire.client import WireClient
from forebay_wire.messages import Damage, DamagedExtent, GetDamage, GetStoreStatus, StoreStatus

POLL_S: Final = 0.2
DAMAGE_HEAD: Final = ("VOLUME", "BLOCKS", "BYTES FROM", "SEGMENT", "OFFSET", "WHAT")


async def store_status(client: WireClient) -> StoreStatus:
    """Return the status of a store."""
    return (await client.ask(GetStoreStatus(), StoreStatus))[0]


async def follow(client: WireClient, over: Callable[[StoreStatus], bool]) -> StoreStatus:
    """Return the first status of which `over` says that the work is done; it sees each on the way.

    Raises:
        ForebayError: the store refuses changes meanwhile, or is gone.
    """
    while not over(status := await store_status(client)):
        if status.error:
            raise ForebayError(f"the store refuses changes: {status.error}")
        await asyncio.sleep(POLL_S)
    return status


async def known_damage(client: WireClient) -> list[DamagedExtent]:
    """Return all damaged extents that the store knows of."""
    rows: list[DamagedExtent] = []
    more = True
    while more:
        page, _ = await client.ask(GetDamage(len(rows)), Damage)
        rows.extend(page.rows)
        more = page.more and bool(page.rows)
    return rows


def say_damage(rows: Sequence[DamagedExtent]) -> None:
    """Print a table of damaged extents, if there are any."""
    if rows:
        say_table(DAMAGE_HEAD, [_cells(row) for row in rows])


def damage_json(row: DamagedExtent) -> dict[str, Json]:
    """Return what --json prints of a damaged extent, in blocks."""
    return {
        "volume": row.volume or None,
        "start": row.start,
        "count": row.count,
        "segment": row.segment,
        "offset": row.offset,
        "text": row.text,
    }


def _cells(row: DamagedExtent) -> tuple[str, ...]:
    last = row.start + row.count - 1
    blocks = str(row.start) if row.count == 1 else f"{row.start}-{last}"
    return (row.volume or "-", blocks, str(row.start * BLOCK_SIZE), row.segment, str(row.offset), row.text)
