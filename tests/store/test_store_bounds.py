"""The daemon's bounds as clients meet them: what one of them uses up, the others still have."""

import asyncio
from pathlib import Path

from store_daemon import StoreDaemon, Writer, create, run
from wire_ends import RawPeer

from forebay_core.errors import StoreUnreachableError
from forebay_store.service.daemon import OWN_FILES_MAX
from forebay_wire import messages


def test_idle_connections_never_take_the_files_that_a_write_needs(tmp_path: Path) -> None:
    for_connections = 40

    async def look(daemon: StoreDaemon) -> None:
        assert daemon.address is not None
        async with daemon.client() as client:
            await create(client, "vm", 256)
            writer = await Writer.open(client, "vm")
            silent = [await RawPeer.connect(daemon.address, key=None) for _ in range(for_connections)]
            idle = []
            for _ in range(for_connections):
                try:
                    idle.append(await daemon.connect())
                except StoreUnreachableError:
                    break
            assert len(idle) < for_connections
            await writer.write(1, "with everything in use")
            for other in idle:
                await other.ask(messages.Ping(), messages.Done)
                await other.close()
            for peer in silent:
                peer.close()
            await asyncio.sleep(0)
            await writer.write(2, "afterwards")

    with StoreDaemon(tmp_path / "s", files_max=OWN_FILES_MAX + for_connections) as daemon:
        run(look(daemon))


def test_a_store_that_may_open_too_few_files_says_so_and_does_not_start(tmp_path: Path) -> None:
    daemon = StoreDaemon(tmp_path / "s", files_max=OWN_FILES_MAX + 10)
    assert daemon.address is None
    assert "ulimit -n" in daemon.end()
