"""Asks whoever may change a volume: the cache daemon that has it attached, wherever that is, else the store.

In this order: the daemon of the run directory, if the volume is attached there; the store, which does it itself if
nobody holds the volume; the daemon that holds it, over TCP, if the store knows where it takes commands. What only a
daemon can do is asked in the same order, but of the store only where that daemon is.
"""

import argparse
from typing import TypeVar

from forebay_core.errors import ForebayError, RefusedError, StoreUnreachableError, WrongUsageError
from forebay_tools.arguments import RUN_DIR_VARIABLE, STORE_VARIABLE, names_run_dir, names_store, run_dir
from forebay_tools.connect import cache_client, remote_client, store_client
from forebay_wire.client import WireClient
from forebay_wire.messages import (
    NOT_ATTACHED,
    VOLUME_IN_USE,
    AnyMessage,
    CacheStatus,
    GetCacheStatus,
    GetVolume,
    Volume,
    VolumeRow,
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
            row = (await client.ask(GetVolume(name), Volume))[0].row
            if not row.writer:  # released meanwhile
                raise
            control = _control(row)
    return await _ask_there(arguments, control, name, message, expect), control


async def ask_daemon(arguments: argparse.Namespace, name: str, message: AnyMessage, expect: type[T]) -> T:
    """Return the answer of the cache daemon that has the volume attached.

    Raises:
        ForebayError: it is refused, or there is no such daemon; of the daemon of the run directory if one is named.
    """
    here = names_run_dir(arguments)
    if (here and not names_store(arguments)) or await attached_here(arguments, name) is not None:
        return await _ask_local(arguments, message, expect)
    if not here and not names_store(arguments):
        raise WrongUsageError(
            f"whose daemon? use --run-dir DIR or --store HOST:PORT, or set {RUN_DIR_VARIABLE} or {STORE_VARIABLE}"
        )
    try:
        async with store_client(arguments) as client:
            row = (await client.ask(GetVolume(name), Volume))[0].row
    except ForebayError:
        if here:
            return await _ask_local(arguments, message, expect)
        raise
    if not row.control and here:
        return await _ask_local(arguments, message, expect)
    return await _ask_there(arguments, _control(row), name, message, expect)


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
    return await _ask_local(arguments, message, expect)


async def _ask_local(arguments: argparse.Namespace, message: AnyMessage, expect: type[T]) -> T:
    async with cache_client(arguments) as client:
        return (await client.ask(message, expect))[0]


async def _status_of(client: WireClient, name: str) -> VolumeStatus | None:
    status, _ = await client.ask(GetCacheStatus(), CacheStatus)
    return next((volume for volume in status.volumes if volume.name == name), None)


def _control(row: VolumeRow) -> str:
    """Return where the holder of a volume takes commands.

    Raises:
        RefusedError: there is none, or it did not tell the store.
    """
    if row.control:
        return row.control
    if not row.writer:
        raise RefusedError(NOT_ATTACHED, f"volume {row.name} is not attached anywhere")
    raise RefusedError(
        VOLUME_IN_USE,
        f"volume {row.name} is attached on device {row.writer.hex()}, whose daemon takes no commands over the network "
        "(it has no --control); run this on its host with --run-dir DIR, or detach it",
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
