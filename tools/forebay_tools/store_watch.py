"""Follows work that a running store was asked to do, by its status."""

import asyncio
from collections.abc import Callable
from typing import Final

from forebay_core.errors import ForebayError
from forebay_wire.client import WireClient
from forebay_wire.messages import Damage, DamagedExtent, GetDamage, GetStoreStatus, StoreStatus

POLL_S: Final = 0.2


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
