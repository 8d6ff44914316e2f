"""Asks whoever may change a volume: the cache daemon that has it attached, wherever that is, else the store.

In this order: the daemon of the run directory, if the volume is attached there; the store, which does it itself if
nobody holds the volume; the daemon that holds it, over TCP, if the store knows where it takes commands.
"""

import argparse
from typing import TypeVar

from forebay_core.errors import ForebayError, RefusedError, StoreUnreachableError
from forebay_tools.arguments import names_run_dir, names_store, run_dir
from forebay_tools.connect import cache_client, remote_client, store_client
from forebay_wire.client import WireClient
from forebay_wire.messages import (
    VOLUME_IN_USE,
    AnyMessage,
    CacheStatus,
    GetCacheStatus,
    GetVolume,
    Volume,
    VolumeStatus,
)

T = TypeVar("T")


async def ask_holder(
    arguments: argparse.Namespace, name: str, message: AnyMessage, expect: type[T]
) -> tuple[T, str | None]:
    """Return the answer, and of which cache daemon it is; None: the store's.

    Raises:
        ForebayError: it is refused, or nobody can be asked; the text says where the volume is attached.
    """
    if names_run_dir(arguments):
        answer = await _ask_here(arguments, name, message, expect)
        if answer is not None:
            return answer, str(run_dir(arguments))
        if not names_store(arguments):
            raise ForebayError(
                f"volume {name} is not attached in {run_dir(arguments)}; name its store as well: --store HOST:PORT"
            )
    async with store_client(arguments) as client:
        try:
            return (await client.ask(message, expect))[0], None
        except RefusedError as error:
            if error.code != VOLUME_IN_USE:
                raise
            control = await _control_of(client, name, error)
    return await _ask_there(arguments, control, name, message, expect), control


async def attached_here(arguments: argparse.Namespace, name: str) -> VolumeStatus | None:
    """Return how a volume is in the daemon of the run directory; None if it is not attached there, or none is named.

    A daemon that does not answer is an error only where no store is named that could be asked instead.
    """
    if not names_run_dir(arguments):
        return None
    try:
        async with cache_client(arguments) as client:
            return await _status_of(client, name)
    except StoreUnreachableError:
        if not names_store(arguments):
            raise
        return None


async def _ask_here(arguments: argparse.Namespace, name: str, message: AnyMessage, expect: type[T]) -> T | None:
    if await attached_here(arguments, name) is None:
        return None
    async with cache_client(arguments) as client:
        return (await client.ask(message, expect))[0]


async def _status_of(client: WireClient, name: str) -> VolumeStatus | None:
    status, _ = await client.ask(GetCacheStatus(), CacheStatus)
    return next((volume for volume in status.volumes if volume.name == name), None)


async def _control_of(client: WireClient, name: str, refusal: RefusedError) -> str:
    """Return where the holder of a volume takes commands.

    Raises:
        RefusedError: it did not tell the store.
    """
    answer, _ = await client.ask(GetVolume(name), Volume)
    row = answer.row
    if row.control:
        return row.control
    if not row.writer:
        raise refusal
    raise RefusedError(
        VOLUME_IN_USE,
        f"volume {name} is attached on device {row.writer.hex()}, whose daemon takes no commands over the network (it "
        "has no --control); run this on its host with --run-dir DIR, or detach it",
    )


async def _ask_there(arguments: argparse.Namespace, control: str, name: str, message: AnyMessage, expect: type[T]) -> T:
    try:
        async with remote_client(arguments, control) as client:
            return (await client.ask(message, expect))[0]
    except StoreUnreachableError as error:
        raise StoreUnreachableError(
            f"volume {name} is attached by the cache daemon at {control}, which does not answer ({error}); run this on "
            "its host with --run-dir DIR"
        ) from error
