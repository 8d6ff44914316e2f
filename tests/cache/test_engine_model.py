"""The engine against a byte array: whatever the order of completions, restarts and power cuts."""

import random

import pytest
from engine_rig import Rig, check_books, store_content

from forebay_cache.engine.front import IoError
from forebay_core.checksums import checksum
from forebay_core.units import BLOCK_SIZE


def test_written_bytes_are_read_back() -> None:
    rig = Rig(1)
    assert rig.write(0, b"a" * 8192) == IoError.OK
    assert rig.write(4096 + 100, b"b" * 50) == IoError.OK
    assert rig.read(0, 8192) == b"a" * 4196 + b"b" * 50 + b"a" * 3946
    assert rig.read(8000, 1000) == b"a" * 192 + bytes(808)
    assert rig.drain()
    assert rig.store.plain()[1] == b"a" * 100 + b"b" * 50 + b"a" * 3946
    check_books(rig.engine)


def assert_same(found: bytes, expected: bytes | bytearray) -> None:
    """Compare without pytest's own difference, which takes minutes for megabytes."""
    if found != expected:
        blocks = [
            at // BLOCK_SIZE
            for at in range(0, len(expected), BLOCK_SIZE)
            if found[at : at + BLOCK_SIZE] != expected[at : at + BLOCK_SIZE]
        ]
        raise AssertionError(f"{len(blocks)} blocks differ, first {blocks[:8]}")


class Guest:
    """Issues random requests, many at a time, never two that overlap, and knows what may be read."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.rng = random.Random(seed)
        self.model = bytearray(rig.size)
        self.durable = bytes(rig.size)
        self.busy: list[tuple[int, int]] = []
        self.in_flight = 0
        self.states: list[bytes] = [bytes(rig.size)]

    def pick(self) -> tuple[int, int] | None:
        blocks = self.rig.size // BLOCK_SIZE
        if self.rng.random() < 0.1:
            offset = self.rng.randrange(64) * 512  # neighbours in a few blocks
            length = 512
        elif self.rng.random() < 0.3:
            offset = self.rng.randrange(self.rig.size - 512) & ~511
            length = min(self.rng.choice((512, 1024, 5000, 70000)), self.rig.size - offset)
        else:
            start = int(blocks * self.rng.random() ** 3)
            offset = start * BLOCK_SIZE
            length = min(self.rng.choice((1, 1, 1, 2, 8, 40, 300)), blocks - start) * BLOCK_SIZE
        first, end = offset // 512, (offset + length + 511) // 512
        if any(first < e and s < end for s, e in self.busy):
            return None
        self.busy.append((first, end))
        return offset, length

    def issue(self) -> None:
        picked = self.pick()
        if picked is None:
            return
        offset, length = picked
        claim = self.busy[-1]
        volume = self.rig.volume
        self.in_flight += 1

        def over() -> None:
            self.busy.remove(claim)
            self.in_flight -= 1

        kind = self.rng.random()
        if kind < 0.45:
            payload = self.rng.randbytes(length)

            def written(error: IoError) -> None:
                assert error == IoError.OK, self.rig.reports
                self.model[offset : offset + length] = payload
                over()

            volume.write(offset, payload, self.rng.random() < 0.1, written)
        elif kind < 0.6:
            trim = self.rng.random() < 0.5

            def zeroed(error: IoError) -> None:
                assert error == IoError.OK, self.rig.reports
                first, end = (-(-offset // 4096) * 4096, (offset + length) // 4096 * 4096)
                if not trim:
                    first, end = offset, offset + length
                if first < end:
                    self.model[first:end] = bytes(end - first)
                over()

            if trim:
                volume.trim(offset, length, False, zeroed)
            else:
                volume.write_zeroes(offset, length, False, zeroed)
        else:

            def got(error: IoError, chunks) -> None:
                assert error == IoError.OK, self.rig.reports
                found = b"".join(bytes(c.length) if c.buffer is None else bytes(c.buffer) for c in chunks)
                same = found == self.model[offset : offset + length]
                assert same, f"read of {length} bytes at {offset} differs"
                over()

            volume.read(offset, length, got)
        if self.rng.random() < 0.5:
            volume.kick()

    def settle(self) -> None:
        self.rig.store.away = False
        self.rig.volume.kick()
        self.rig.run_until(lambda: self.in_flight == 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_equal_a_byte_array(seed: int) -> None:
    run_requests(seed)


def test_dirty_blocks_survive_the_log_going_round_while_the_store_is_away() -> None:
    run_backlog(1)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_acknowledged_is_lost_when_the_daemon_dies(seed: int) -> None:
    run_kills(seed)


@pytest.mark.parametrize("seed", range(16))
def test_flushed_survives_a_power_cut_and_the_rest_is_a_prefix(seed: int) -> None:
    run_power_cuts(seed)


def run_requests(seed: int) -> None:
    """Many requests at a time against a store that loses acknowledgements, on a device that is always full."""
    rig = Rig(seed, size=12 << 20, blocks=2500)
    rig.store.lose_acknowledgements = 0.2
    guest = Guest(rig, seed)
    for turn in range(900):
        if guest.rng.random() < 0.02:
            rig.store.away = not rig.store.away
        while guest.in_flight < 12 and guest.rng.random() < 0.8:
            guest.issue()
        for _ in range(guest.rng.randrange(12)):
            rig.step()
        if turn % 10 == 0:
            check_books(rig.engine)
    guest.settle()
    check_books(rig.engine)
    assert_same(rig.content(), guest.model)
    assert rig.drain()
    assert_same(store_content(rig.store.plain(), rig.size), guest.model)
    check_books(rig.engine)
    assert rig.engine.reclaim.dropped_blocks > 0, "the device was never full: the test is too small"


def run_backlog(seed: int) -> None:
    """The store is away while a few blocks are overwritten until the log has gone round: the others must be moved."""
    rig = Rig(seed, size=12 << 20, blocks=2500)
    rng = random.Random(seed)
    model = bytearray(rig.size)
    rig.store.away = True
    for turn in range(60):
        start, count = (turn * 60, 60) if turn < 10 else (600 + rng.randrange(200), 60)
        payload = rng.randbytes(count * BLOCK_SIZE)
        assert rig.write(start * BLOCK_SIZE, payload) == IoError.OK
        model[start * BLOCK_SIZE : (start + count) * BLOCK_SIZE] = payload
    check_books(rig.engine)
    assert rig.engine.reclaim.moving.moved_blocks > 0
    assert_same(rig.read(0, 600 * BLOCK_SIZE), model[: 600 * BLOCK_SIZE])
    rig.store.away = False
    assert rig.drain()
    assert_same(store_content(rig.store.plain(), rig.size), model)


def run_kills(seed: int) -> None:
    """kill -9 six times under load."""
    rig = Rig(seed, size=12 << 20, blocks=2500)
    guest = Guest(rig, seed)
    for _ in range(6):
        for _ in range(120):
            while guest.in_flight < 8 and guest.rng.random() < 0.8:
                guest.issue()
            for _ in range(guest.rng.randrange(12)):
                rig.step()
        guest.settle()
        rig.tick()
        for _ in range(guest.rng.randrange(40)):
            rig.step()
        rig.restart(power=False)
        check_books(rig.engine)
        assert_same(rig.content(), guest.model)
    assert rig.drain()
    assert_same(store_content(rig.store.plain(), rig.size), guest.model)


def run_power_cuts(seed: int) -> None:
    """Cut the power five times; what is found must be a state since the last flush."""
    rig = Rig(seed, size=12 << 20, blocks=600)
    rng = random.Random(seed)
    model = bytearray(rig.size)
    for _ in range(5):
        states = {checksum(model)}
        for _ in range(rng.randrange(5, 90)):
            lba = rng.randrange(600)
            count = min(rng.choice((1, 1, 1, 4, 20)), 600 - lba)
            if rng.random() < 0.2:
                got: list[IoError] = []
                rig.volume.trim(lba * 4096, count * 4096, False, got.append)
                rig.volume.kick()
                rig.run_until(lambda got=got: bool(got))
                model[lba * 4096 : (lba + count) * 4096] = bytes(count * 4096)
            else:
                payload = rng.randbytes(count * 4096)
                assert rig.write(lba * 4096, payload) == IoError.OK
                for i in range(count):  # a request that does not fit one record is several changes
                    model[(lba + i) * 4096 : (lba + i + 1) * 4096] = payload[i * 4096 : (i + 1) * 4096]
                    states.add(checksum(model))
            states.add(checksum(model))
            if rng.random() < 0.08:
                assert rig.flush() == IoError.OK
                states = {checksum(model)}
        rig.restart(power=True)
        check_books(rig.engine)
        found = rig.content()
        assert checksum(found) in states, f"seed {seed}: not a state since the last flush"
        model = bytearray(found)
        assert rig.store.version <= rig.volume.version, "the store ran ahead of the device"


def test_a_failed_device_answers_everybody_and_writes_no_more() -> None:
    rig = Rig(3)
    assert rig.write(0, b"a" * BLOCK_SIZE) == IoError.OK
    rig.device.failing = True
    got: list[IoError] = []
    for lba in range(6):
        rig.volume.write(lba * BLOCK_SIZE, b"b" * BLOCK_SIZE, False, got.append)
    rig.volume.kick()
    rig.run_until(lambda: len(got) == 6)
    assert set(got) == {IoError.IO}
    assert rig.engine.failed
    assert rig.write(0, b"c" * BLOCK_SIZE) == IoError.IO
    assert rig.flush() == IoError.IO
    assert any("failed" in text for text in rig.reports)
