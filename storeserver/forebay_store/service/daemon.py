"""The store daemon: opens the data folder, listens, and ends cleanly on SIGTERM and SIGINT."""

import asyncio
import logging
import signal
import sys
import time
from typing import Final

from forebay_core.config import StoreSettings
from forebay_core.memory import keep_freed_memory
from forebay_core.notify import Watchdog, notify
from forebay_core.starting import raise_file_limit, tell_parent
from forebay_core.units import format_store
from forebay_store.limits import FILES_RESERVED, OPEN_FILES_MAX
from forebay_store.service.opening import OpenStore, open_store
from forebay_store.service.shell import StoreShell
from forebay_wire.address import Address, parse_address
from forebay_wire.limits import CONNECTIONS_MAX, HANDSHAKES_MAX
from forebay_wire.reach import check_reach, read_key
from forebay_wire.server import ServerLimits, WireServer, limits_within

SWITCH_INTERVAL_S: Final = 0.0005
"""How long a busy thread (index, reads) keeps the event loop waiting."""

OWN_FILES_MAX: Final = OPEN_FILES_MAX + FILES_RESERVED
FILES_MAX: Final = CONNECTIONS_MAX + HANDSHAKES_MAX + OWN_FILES_MAX

_LOG: Final = logging.getLogger("forebay.store")


def run(settings: StoreSettings) -> int:
    """Serve the volumes of `settings.data` until told to end; return the exit code.

    Raises:
        ForebayError: it can't start; the text is one line that says why and what to do.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    address = parse_address(settings.listen)
    key = read_key(settings.key_file)
    check_reach(settings, key)  # before the folder is touched
    limits = limits_within(raise_file_limit(FILES_MAX) - OWN_FILES_MAX)
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    store = open_store(settings.data, now_ns=time.time_ns())
    try:
        asyncio.run(_serve(store, settings, address, key, limits))
    finally:
        store.close()
    return 0


async def _serve(
    store: OpenStore, settings: StoreSettings, address: Address, key: bytes | None, limits: ServerLimits
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watchdog = Watchdog(loop)
    shell = StoreShell(store, settings=settings)
    try:
        server = WireServer(
            shell.answer,
            key=key,
            node=store.folder.store,
            on_connect=shell.new_connection,
            on_disconnect=shell.lost_connection,
            limits=limits,
        )
        try:
            ready = f"store listening on {await server.listen_tcp(address)}"
            _LOG.info("%s, UUID %s", ready, format_store(store.folder.store))
            tell_parent(ready)
            notify("READY=1")
            watchdog.start()
            await stop.wait()
            _LOG.info("store stopping")
            notify("STOPPING=1")
        finally:
            await server.close()
    finally:
        await shell.stop()
        watchdog.stop()
        store.index.sync()
