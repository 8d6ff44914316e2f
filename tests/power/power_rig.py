"""Both daemons on disks that lose their power: the cache's device on one machine, the store's folder on another."""

import enum
import time
from pathlib import Path

from e2e_rig import READY_TIMEOUT_S, Daemon, Rig
from e2e_template import Template
from power_disk import PowerDisk
from power_tree import Outcome


class Power(enum.Enum):
    """Whose power goes."""

    BOTH = "hypervisor and storage server"
    HYPERVISOR = "hypervisor"
    SERVER = "storage server"

    @property
    def hits_cache(self) -> bool:
        return self is not Power.SERVER

    @property
    def hits_store(self) -> bool:
        return self is not Power.HYPERVISOR


class PowerRig(Rig):
    """Sockets lie elsewhere, as /run does: they are not to survive."""

    def __init__(self, folder: Path, template: Template) -> None:
        super().__init__(folder, template)
        self.hypervisor = self._disk("hypervisor")
        try:
            self.server = self._disk("server")
        except BaseException:
            self.hypervisor.close()
            raise
        self.device = self.hypervisor.folder / "cache.dev"
        self.store_data = self.server.folder / "store"
        self.outcomes: list[Outcome] = []

    def cut(self, power: Power, seed: int, *, everything: bool = False) -> None:
        """Kill the daemons that lose their power, and lose a part of what they had not synced, or `everything`.

        A killed daemon acknowledges nothing more, so the instant of the kill is the instant of the cut.
        """
        if power.hits_cache:
            self.kill_cache()
            self.outcomes.append(self.hypervisor.power_cycle(seed, everything=everything))
        if power.hits_store:
            self.kill_store()
            self.outcomes.append(self.server.power_cycle(seed + 1, everything=everything))

    def power_on(self, power: Power) -> None:
        """Start the daemons again; returns when they serve."""
        if power.hits_store:
            self.start_store()
        if power.hits_cache:
            self.start_cache()

    def start_store_until_off(self, count: int) -> bool:
        """Start the store on a disk that lasts for `count` changes and syncs; return whether that was enough."""
        self.server.off_after(count)
        flags = ["--data", str(self.store_data), "--listen", "127.0.0.1:0"]
        self.store = Daemon("store", ["store", "serve", *flags], self.folder / "store.log", self.template)
        return _served(self.store, "listening on")

    def start_cache_until_off(self, count: int) -> bool:
        """Start the cache on a disk that lasts for `count` changes and syncs; return whether that was enough."""
        self.hypervisor.off_after(count)
        self.start_cache(wait=False)
        assert self.cache is not None
        return _served(self.cache, "READY")

    def check_store(self) -> None:
        """Stop the store in good order, let fsck look at its folder, and start it again."""
        assert self.store is not None
        assert self.store.stop() == 0
        self.run("store", "fsck", "--data", str(self.store_data))
        self.start_store()

    def close(self) -> None:
        """End the daemons and unmount."""
        try:
            self.stop()
        finally:
            try:
                self.hypervisor.close()
            finally:
                self.server.close()

    def _disk(self, name: str) -> PowerDisk:
        folder = self.folder / name
        folder.mkdir()
        return PowerDisk(folder)


def _served(daemon: Daemon, ready: str) -> bool:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while daemon.running and ready not in daemon.output:
        assert time.monotonic() < deadline, f"{daemon.name} neither serves nor ends:\n{daemon.output}"
        time.sleep(0.005)
    return daemon.running
