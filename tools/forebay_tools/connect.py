"""Connections of commands: to the store over TCP, to the cache daemon through its run directory."""

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from forebay_core.errors import StoreUnreachableError
from forebay_core.units import ID_SIZE
from forebay_tools.arguments import key_file, run_dir, store_address
from forebay_wire.address import UnixPath, parse_address
from forebay_wire.auth import read_key_file
from forebay_wire.client import WireClient

CONTROL_SOCKET: Final = "control.sock"
CONNECT_TIMEOUT_S: Final = 10.0


@asynccontextmanager
async def store_client(arguments: argparse.Namespace) -> AsyncIterator[WireClient]:
    """Connect to the store that the flags or the environment name; closes at the end.

    Raises:
        ForebayError: nothing is named, the store does not answer, or the key is not its key.
    """
    address = parse_address(store_address(arguments))
    path = key_file(arguments)
    key = read_key_file(path) if path is not None else None
    node = os.urandom(ID_SIZE)
    try:
        client = await WireClient.connect(address, key=key, node=node, timeout_s=CONNECT_TIMEOUT_S)
    except StoreUnreachableError as error:
        raise StoreUnreachableError(f"no store answers ({error}); is it running there?") from error
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
