"""Connections of commands: to the store over TCP, to a cache daemon through its run directory or over TCP."""

import argparse
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NoReturn, TypeVar

from forebay_core.errors import ForebayError, StoreUnreachableError
from forebay_core.units import ID_SIZE
from forebay_tools.arguments import key_file, run_dir, store_address
from forebay_wire.address import UnixPath, parse_address
from forebay_wire.auth import read_key_file
from forebay_wire.client import WireClient
from forebay_wire.messages import AnyMessage

CONTROL_SOCKET: Final = "control.sock"
CONNECT_TIMEOUT_S: Final = 10.0
T = TypeVar("T")


@asynccontextmanager
async def store_client(arguments: argparse.Namespace) -> AsyncIterator[WireClient]:
    """Connect to the store that the flags or the environment name; closes at the end.

    Raises:
        ForebayError: nothing is named, the store does not answer, or the key is not its key.
    """
    try:
        client = await _connect(arguments, store_address(arguments))
    except StoreUnreachableError as error:
        raise StoreUnreachableError(f"no store answers ({error}); is it running there?") from error
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def remote_client(arguments: argparse.Namespace, control: str) -> AsyncIterator[WireClient]:
    """Connect to the cache daemon that takes commands at HOST:PORT, with the store's key; closes at the end.

    Raises:
        ForebayError: nobody answers there, or the key is not its key.
    """
    client = await _connect(arguments, control)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def cache_client(arguments: argparse.Namespace) -> AsyncIterator[WireClient]:
    """Connect to the cache daemon of the run directory; closes at the end. The socket's mode guards it, not a key.

    Raises:
        ForebayError: no directory is named or no daemon answers there.
    """
    path = run_dir(arguments) / CONTROL_SOCKET
    if not path.exists():
        raise StoreUnreachableError(
            f"no cache daemon serves {path.parent} (no {path.name} there); start one with "
            f"forebay cache serve --run-dir {path.parent}"
        )
    node = os.urandom(ID_SIZE)
    try:
        client = await WireClient.connect(UnixPath(str(path)), key=None, node=node, timeout_s=CONNECT_TIMEOUT_S)
    except StoreUnreachableError as error:
        raise StoreUnreachableError(
            f"no cache daemon answers in {path.parent} ({error}); if it has ended, start one with "
            f"forebay cache serve --run-dir {path.parent}"
        ) from error
    try:
        yield client
    finally:
        await client.close()


async def ask_cache(arguments: argparse.Namespace, message: AnyMessage, expect: type[T]) -> tuple[T, memoryview]:
    """Ask the cache daemon of the run directory something that older ones do not know.

    Raises:
        ForebayError: as `cache_client`, what the daemon answers, or that it is too old.
    """
    with contextlib.suppress(StoreUnreachableError):
        async with cache_client(arguments) as client:
            return await client.ask(message, expect)
    return await refuse_older(arguments)


async def refuse_older(arguments: argparse.Namespace) -> NoReturn:
    """Tell why a connection was lost at a message that older daemons do not know.

    Raises:
        ForebayError: always: there is no daemon any more, or it is too old.
    """
    async with cache_client(arguments):  # if it is there it closed the connection, as it does when it can't read one
        raise ForebayError(
            f"the cache daemon of {run_dir(arguments)} is older than this command and can't answer; restart it"
        )


async def _connect(arguments: argparse.Namespace, address: str) -> WireClient:
    path = key_file(arguments)
    key = read_key_file(path) if path is not None else None
    node = os.urandom(ID_SIZE)
    return await WireClient.connect(parse_address(address), key=key, node=node, timeout_s=CONNECT_TIMEOUT_S)
