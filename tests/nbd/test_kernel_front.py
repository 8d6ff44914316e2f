"""The kernel front against a kernel of ours: devices that outlive the daemon's sockets, and all that is refused."""

import asyncio
import errno
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from ram_volume import RamExports, RamVolume

from forebay_cache.engine.kernel_device import Connect, Found, Mend, Resize
from forebay_cache.format import nbd
from forebay_cache.format.volume_note import Front, FrontKind
from forebay_cache.service import kernel_front
from forebay_cache.service.device_fronts import DeviceFronts
from forebay_cache.service.device_links import make_link
from forebay_cache.service.kernel_front import KernelFront
from forebay_cache.service.nbd_server import NbdServer
from forebay_core.errors import ForebayError, RefusedError
from forebay_core.units import MIB, DeviceId

CACHE = DeviceId(bytes(range(16)))


class KernelVolume(RamVolume):
    """A volume with what its row says of the front."""

    def __init__(self, name: str = "vm1", size: int = 4 * MIB) -> None:
        super().__init__(name, size)
        self.front = Front(FrontKind.KERNEL, 512)
        self.warning = ""


class FakeKernel:
    """A KernelPort with devices in memory; `client` is the kernel's end of a device's socket."""

    def __init__(self) -> None:
        self.rows = {number: Found(number, False, "", 0) for number in range(3)}
        self.clients: dict[int, socket.socket] = {}
        self.refusals: list[int] = []
        self.held_by: list[str] = []
        self.appears = True
        self.asked: list[object] = []
        self.guarded = False

    def check(self) -> None:
        pass

    def devices(self) -> Sequence[Found]:
        return list(self.rows.values())

    def connect(self, command: Connect, socket_fd: int) -> int:
        self._refuse(command)
        free = [row.number for row in self.rows.values() if not row.connected]
        number = command.number if command.number is not None else free[0]
        self.rows[number] = Found(number, True, command.identifier, command.size)
        self.clients[number] = socket.socket(fileno=os.dup(socket_fd))
        return number

    def resize(self, command: Resize) -> None:
        self._refuse(command)
        self.rows[command.number] = self.rows[command.number]._replace(size=command.size)

    def mend(self, command: Mend, socket_fd: int) -> None:
        self._refuse(command)
        if command.number not in self.clients:
            self.clients[command.number] = socket.socket(fileno=os.dup(socket_fd))

    def disconnect(self, number: int) -> None:
        self._refuse(number)
        self.rows[number] = Found(number, False, "", 0)
        self.cut(number)

    def tune(self, number: int) -> None:
        pass

    def has_appeared(self, number: int, size: int) -> bool:
        return self.appears and self.rows[number].size == size

    def users(self, number: int) -> Sequence[str]:
        return self.held_by

    def guard(self) -> None:
        self.guarded = True

    def cut(self, number: int) -> None:
        """Close the kernel's end, as it does when it is told to or gives a socket up."""
        if (client := self.clients.pop(number, None)) is not None:
            client.close()

    async def ask(self, number: int, command: int, offset: int, length: int, payload: bytes = b"") -> bytes:
        """Send one request as the kernel does, and return error and data of the answer."""
        client = self.clients[number]
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        header = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, command, 7, offset, length)
        await loop.sock_sendall(client, header + payload)
        wanted = nbd.SIMPLE_REPLY.size + (length if command == nbd.CMD_READ else 0)
        answer = b""
        while len(answer) < wanted:
            got = await loop.sock_recv(client, wanted - len(answer))
            if not got:
                raise ConnectionResetError
            answer += got
        return answer[4:8] + answer[nbd.SIMPLE_REPLY.size :]

    def _refuse(self, command: object) -> None:
        self.asked.append(command)
        if self.refusals:
            code = self.refusals.pop(0)
            raise OSError(code, os.strerror(code))


class Rig:
    """A front, its server and its kernel. `restart` is what a kill leaves: the kernel, and the volume's row."""

    def __init__(self, links: Path) -> None:
        self.kernel = FakeKernel()
        self.volume = KernelVolume()
        self._links = links
        self.start()

    def start(self) -> None:
        self.server = NbdServer(RamExports(self.volume))
        self.front = KernelFront(self.kernel, self.server, cache=CACHE, note=self._note, links=self._links)
        self.fronts = DeviceFronts([self.front])

    async def kill(self) -> None:
        """Close all sockets, as the end of a process does; the kernel sees that."""
        self.front._closing = True
        await self.server.close(0)
        for number in list(self.kernel.clients):
            self.kernel.cut(number)

    async def _note(self, volume: KernelVolume, front: Front) -> None:
        volume.front = front


Scenario = Callable[[Rig], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[[Scenario], None]]:
    def run(scenario: Scenario) -> None:
        async def body() -> None:
            rig = Rig(tmp_path / "links")
            try:
                await scenario(rig)
            finally:
                await rig.kill()

        asyncio.run(body())

    yield run


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something holds; the test's time limit is the end of it."""
    while not condition():
        await asyncio.sleep(0)


def test_a_volume_becomes_a_device_with_a_name_and_its_number_is_noted(play, tmp_path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        place = rig.fronts.place(rig.volume)
        assert place == ("/dev/nbd0", str(tmp_path / "links" / "vm1"))
        assert os.readlink(place.link) == "/dev/nbd0"
        assert rig.volume.front == Front(FrontKind.KERNEL, 512, 1) and rig.kernel.guarded
        assert await rig.kernel.ask(0, nbd.CMD_WRITE, 4096, 4096, b"x" * 4096) == bytes(4)
        assert await rig.kernel.ask(0, nbd.CMD_READ, 4096, 4096) == bytes(4) + b"x" * 4096

    play(scenario)


def test_a_daemon_that_comes_back_gives_the_device_a_fresh_socket(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        await rig.kill()
        rig.start()
        await rig.fronts.resume([rig.volume])
        assert isinstance(rig.kernel.asked[-1], Mend) and rig.volume.warning == ""
        assert await rig.kernel.ask(0, nbd.CMD_READ, 0, 512) == bytes(4 + 512)

    play(scenario)


def test_a_daemon_that_was_killed_before_it_noted_the_number_finds_its_device_by_name(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        rig.volume.front = Front(FrontKind.KERNEL, 512)
        await rig.kill()
        rig.start()
        await rig.fronts.resume([rig.volume])
        assert isinstance(rig.kernel.asked[-1], Mend) and rig.volume.front.number == 1
        assert [row.number for row in rig.kernel.rows.values() if row.connected] == [0]

    play(scenario)


def test_a_volume_that_is_taken_over_anew_keeps_its_device_and_io_waits_meanwhile(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        rig.fronts.suspend(rig.volume)
        rig.kernel.cut(0)  # as it does when it sees the end of its socket
        assert rig.fronts.place(rig.volume).path == "" and rig.kernel.rows[0].connected
        await rig.fronts.attach(rig.volume)
        assert isinstance(rig.kernel.asked[-1], Mend)
        assert await rig.kernel.ask(0, nbd.CMD_FLUSH, 0, 0) == bytes(4)

    play(scenario)


def test_after_a_reboot_the_device_is_made_anew_under_its_old_number(play) -> None:
    async def scenario(rig: Rig) -> None:
        rig.volume.front = Front(FrontKind.KERNEL, 512, 3)
        await rig.fronts.resume([rig.volume])
        assert rig.fronts.place(rig.volume).path == "/dev/nbd2"

    play(scenario)


def test_a_socket_that_the_kernel_gives_up_is_replaced(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        for _ in range(3):
            rig.kernel.cut(0)
            await until(lambda: 0 in rig.kernel.clients)
            assert await rig.kernel.ask(0, nbd.CMD_FLUSH, 0, 0) == bytes(4)

    play(scenario)


def test_a_refused_socket_is_offered_again(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        rig.kernel.refusals = [errno.EINTR, errno.EINVAL]
        rig.kernel.cut(0)
        await until(lambda: 0 in rig.kernel.clients)
        assert await rig.kernel.ask(0, nbd.CMD_FLUSH, 0, 0) == bytes(4)

    play(scenario)


def test_a_device_that_somebody_disconnected_is_told_and_comes_back_when_it_is_attached_again(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        rig.kernel.disconnect(0)
        await until(lambda: rig.volume.warning != "")
        assert "/dev/nbd0" in rig.volume.warning and rig.fronts.place(rig.volume).path == ""
        await rig.fronts.bring_back(rig.volume)
        assert rig.volume.warning == "" and rig.fronts.place(rig.volume).path == "/dev/nbd0"

    play(scenario)


def test_growth_is_told_to_the_kernel_and_served(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        grown = KernelVolume(size=8 * MIB)
        rig.volume.view, rig.volume.written, rig.volume.size = grown.view, grown.written, grown.size
        rig.server.resized("vm1")
        rig.fronts.resized(rig.volume)
        await until(lambda: rig.kernel.rows[0].size == 8 * MIB)
        assert await rig.kernel.ask(0, nbd.CMD_WRITE, 6 * MIB, 512, b"y" * 512) == bytes(4)

    play(scenario)


def test_a_device_in_use_is_not_detached_and_the_users_are_named(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        rig.kernel.held_by = ["mounted at /srv", "part of dm-3"]
        with pytest.raises(RefusedError, match="/dev/nbd0 is mounted at /srv, part of dm-3"):
            await rig.fronts.detach(rig.volume, 0)
        assert await rig.kernel.ask(0, nbd.CMD_FLUSH, 0, 0) == bytes(4)
        asyncio.get_running_loop().call_later(0.1, rig.kernel.held_by.clear)
        await rig.fronts.detach(rig.volume, 20)
        assert not rig.kernel.rows[0].connected and rig.fronts.place(rig.volume).path == ""
        assert os.listdir(rig.front._links) == []

    play(scenario)


@pytest.mark.parametrize("stage", ["connect", "appear", "note"])
def test_an_attach_that_fails_leaves_nothing(play, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(volume: KernelVolume, front: Front) -> None:
        raise ForebayError("the cache device failed")

    async def scenario(rig: Rig) -> None:
        monkeypatch.setattr(kernel_front, "NODE_WAIT_S", 0.0)
        rig.kernel.refusals = [errno.EPERM] if stage == "connect" else []
        rig.kernel.appears = stage != "appear"
        if stage == "note":
            rig.front._note = refuse
        with pytest.raises(ForebayError):
            await rig.fronts.attach(rig.volume)
        assert not any(row.connected for row in rig.kernel.rows.values()) and not rig.front._attached
        await until(lambda: not rig.server._connections)

    play(scenario)


def test_a_daemon_that_stops_takes_unused_devices_along_and_leaves_used_ones_waiting(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        rig.kernel.held_by = ["open in qemu (process 7)"]
        await rig.fronts.close()
        assert rig.kernel.rows[0].connected
        with pytest.raises(ConnectionError):  # and not an answer, which would be an I/O error
            await rig.kernel.ask(0, nbd.CMD_READ, 0, 512)
        await rig.kill()
        rig.start()
        await rig.fronts.resume([rig.volume])
        rig.kernel.held_by = []
        await rig.fronts.close()
        assert not rig.kernel.rows[0].connected and rig.volume.front.number == 1

    play(scenario)


def test_a_device_that_does_not_come_back_is_told_and_keeps_no_other_from_it(play) -> None:
    async def scenario(rig: Rig) -> None:
        other = KernelVolume("vm2")
        rig.kernel.refusals = [errno.EPERM]
        await rig.fronts.resume([rig.volume, other])
        warnings = [rig.volume.warning, other.warning]
        assert sorted(map(bool, warnings)) == [False, True]
        assert len([row for row in rig.kernel.rows.values() if row.connected]) == 1

    play(scenario)


def test_a_link_that_was_left_by_a_device_with_another_number_is_replaced(play, tmp_path) -> None:
    async def scenario(rig: Rig) -> None:
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "vm1").symlink_to("/dev/nbd9999")
        await rig.fronts.attach(rig.volume)
        assert os.readlink(tmp_path / "links" / "vm1") == "/dev/nbd0"

    play(scenario)


def test_a_link_that_leads_to_another_device_is_left_alone(play, tmp_path) -> None:
    async def scenario(rig: Rig) -> None:
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "vm1").symlink_to("/dev/null")
        await rig.fronts.attach(rig.volume)
        assert rig.fronts.place(rig.volume) == ("/dev/nbd0", "")
        assert os.readlink(tmp_path / "links" / "vm1") == "/dev/null"

    play(scenario)


def test_a_volume_that_is_abandoned_ends_its_device_although_somebody_uses_it(play) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.fronts.attach(rig.volume)
        rig.kernel.held_by = ["mounted at /srv"]
        rig.fronts.suspend(rig.volume)
        await rig.fronts.abandon("vm1", rig.volume.front)
        assert not rig.kernel.rows[0].connected and os.listdir(rig.front._links) == []

    play(scenario)


def test_a_start_ends_devices_of_its_own_that_no_volume_claims_and_no_others(play, caplog) -> None:
    async def scenario(rig: Rig) -> None:
        own = f"forebay/{CACHE.hex()}"
        rig.kernel.rows = {
            number: Found(number, True, identifier, MIB)
            for number, identifier in enumerate((f"{own}/vm1", f"{own}/gone", f"forebay/{'ab' * 16}/vm1", "somebody's"))
        }
        await rig.front.end_strays(["vm1"])
        assert [row.number for row in rig.kernel.rows.values() if row.connected] == [0, 2, 3]
        assert "nbd-client -d /dev/nbd2" in caplog.text and "nbd0" not in caplog.text and "nbd3" not in caplog.text

    play(scenario)


def test_a_start_goes_on_when_the_kernel_does_not_end_a_stray(play, caplog) -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.rows[0] = Found(0, True, f"forebay/{CACHE.hex()}/gone", MIB)
        rig.kernel.refusals = [errno.EPERM]
        await rig.front.end_strays([])
        assert "/dev/nbd0 can't be disconnected" in caplog.text

    play(scenario)


def test_who_waits_for_a_start_finds_devices_by_the_names_that_udev_gives_them(play, monkeypatch) -> None:
    """A start must not wait for udev before it asks the store: udev may read what only that has."""
    monkeypatch.setattr(kernel_front, "links_by_udev", lambda: True)
    udev = threading.Event()

    def make(name: str, path: str, folder: Path) -> str:
        assert udev.wait(30)
        return make_link(name, path, folder)

    monkeypatch.setattr(kernel_front, "make_link", make)

    async def scenario(rig: Rig) -> None:
        await rig.fronts.resume([rig.volume])
        assert rig.fronts.place(rig.volume) == ("/dev/nbd0", "")
        udev.set()
        await rig.front.named()
        assert os.listdir(rig.front._links) == ["vm1"]

    play(scenario)
