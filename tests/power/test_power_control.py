"""Tests of the power-cut rig itself: a disk or a judge that is broken on purpose is noticed."""

import time

import pytest
from e2e_nbd import FLUSH, FUA, TRIM, WRITE, NbdError, Pending
from power_fio import Fio
from power_load import Stamps
from power_rig import Power, PowerRig
from undo import Undo

from forebay_core.units import BLOCK_SIZE, MIB

BLOCKS = 256
SIZE = BLOCKS * BLOCK_SIZE


def load(rig: PowerRig, stamps: Stamps, flushes: int) -> None:
    """Write until some more flushes are acknowledged, with unflushed writes behind them."""
    wanted = stamps.flushes + flushes
    deadline = time.monotonic() + 60
    with rig.nbd("disk") as client:
        stamps.run(
            client,
            depth=8,
            flush_share=0.05,
            until=lambda: stamps.flushes >= wanted or time.monotonic() > deadline,
        )
    assert stamps.flushes >= wanted


def read(rig: PowerRig) -> bytes:
    with rig.nbd("disk") as client:
        return client.read(0, SIZE)


def start(rig: PowerRig) -> Stamps:
    """Serve a volume with flushed writes, none of which the store has."""
    rig.cache_flags = ["--zone-size", "1MiB", "--cut-age-s-max", "600"]
    rig.start()
    rig.create("disk", SIZE)
    rig.attach("disk")
    stamps = Stamps(BLOCKS, seed=1)
    load(rig, stamps, 5)
    return stamps


def test_a_disk_that_ignores_flushes_is_caught(rig: PowerRig) -> None:
    stamps = start(rig)
    rig.cut(Power.HYPERVISOR, 1, everything=True)
    rig.power_on(Power.HYPERVISOR)
    stamps.check(read(rig))  # an honest disk
    rig.hypervisor.ignore_sync(True)
    load(rig, stamps, 5)
    rig.cut(Power.HYPERVISOR, 2, everything=True)
    rig.power_on(Power.HYPERVISOR)
    with pytest.raises(AssertionError, match="flushed is"):
        stamps.check(read(rig))


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_a_disk_that_ignores_flushes_and_loses_a_part_is_caught(rig: PowerRig, seed: int) -> None:
    stamps = start(rig)
    rig.hypervisor.ignore_sync(True)
    load(rig, stamps, 5)
    rig.cut(Power.HYPERVISOR, seed)
    # Either the daemon finds that a part of its log or a dirty block is missing, or the judge finds what is lost.
    with pytest.raises((AssertionError, NbdError), match=r"flushed is|cache ended with 1|NBD error 5"):
        rig.power_on(Power.HYPERVISOR)
        stamps.check(read(rig))


def test_fio_notices_a_lost_and_a_torn_block(rig: PowerRig, undo: Undo) -> None:
    rig.start()
    rig.create("disk", MIB)
    fio = Fio(rig.attach("disk"), MIB, undo)
    fio.fill()
    assert fio.whole() == ""
    with rig.nbd("disk") as client:
        block = client.read(8 * BLOCK_SIZE, BLOCK_SIZE)
        client.write(8 * BLOCK_SIZE, block[:2048] + bytes(2048))
        assert "crc32c" in fio.whole()
        client.write(8 * BLOCK_SIZE, bytes(BLOCK_SIZE))
        assert "bad magic" in fio.whole()


# --- the judge ------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for the NBD client: answers what the test lets it answer, and keeps the volume's content."""

    def __init__(self, fail_after: int) -> None:
        self.pending: dict[int, Pending] = {}
        self.content = bytearray(SIZE)
        self.before = bytearray(SIZE)  # as it was at the last acknowledged flush
        self.writes: list[tuple[int, bytes]] = []  # since then
        self._left = fail_after
        self._cookie = 0

    def submit(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> int:
        self._cookie += 1
        self.pending[self._cookie] = Pending(command, offset, length, flags)
        if command in (WRITE, TRIM):
            self.writes.append((offset, payload or bytes(length)))
            self.content[offset : offset + length] = self.writes[-1][1]
        return self._cookie

    def next_reply(self) -> tuple[int, Pending, bytes]:
        self._left -= 1
        if self._left < 0:
            raise ConnectionResetError
        cookie = next(iter(self.pending))
        pending = self.pending.pop(cookie)
        if pending.command == FLUSH or pending.flags & FUA:
            self.before[:] = self.content
            self.writes.clear()
        return cookie, pending, b""


def judged(spoil: str, *, flush_share: float = 0.02) -> Stamps:
    """Let a run be followed by a cut that `spoil` describes, and judge it."""
    stamps = Stamps(BLOCKS, seed=11)
    client = Recorder(fail_after=600)
    stamps.run(client, depth=1, flush_share=flush_share, until=lambda: False)  # type: ignore[arg-type]
    stamps.check(SPOILS[spoil](client))
    return stamps


def replayed(client: Recorder, keep: range | list[int]) -> bytes:
    content = bytearray(client.before)
    for index in keep:
        offset, payload = client.writes[index]
        content[offset : offset + len(payload)] = payload
    return bytes(content)


def with_block(client: Recorder, lba: int, block: bytes) -> bytes:
    content = bytearray(client.content)
    content[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE] = block
    return bytes(content)


def newest(client: Recorder) -> tuple[int, bytes]:
    """Return the block that was written last, and what it holds."""
    lba = max(range(BLOCKS), key=lambda lba: client.content[lba * BLOCK_SIZE + 8 : lba * BLOCK_SIZE + 16][::-1])
    return lba, bytes(client.content[lba * BLOCK_SIZE : (lba + 1) * BLOCK_SIZE])


def torn(client: Recorder) -> bytes:
    lba, block = newest(client)
    return with_block(client, lba, block[:512] + bytes(512) + block[1024:])


SPOILS = {
    "nothing": lambda client: bytes(client.content),
    "all that is unflushed": lambda client: bytes(client.before),
    "the newer half": lambda client: replayed(client, range(len(client.writes) // 2)),
    "a write in the middle": lambda client: replayed(client, [0, *range(len(client.writes) // 2, len(client.writes))]),
    "all": lambda client: bytes(SIZE),
    "half a block": torn,
    "its place": lambda client: with_block(client, (newest(client)[0] + 1) % BLOCKS, newest(client)[1]),
}


@pytest.mark.parametrize("spoil", ["nothing", "all that is unflushed", "the newer half"])
def test_the_judge_accepts_every_prefix_behind_the_last_flush(spoil: str) -> None:
    judged(spoil)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        ("a write in the middle", "is lost"),
        ("all", "flushed is"),
        ("half a block", "torn"),
        ("its place", "shows block"),
    ],
)
def test_the_judge_notices_what_is_wrong(spoil: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        judged(spoil)
