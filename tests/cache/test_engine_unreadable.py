"""Blocks that the device can't read: clean ones come from the store and their zone rests, dirty ones are an error."""

from collections.abc import Callable

from engine_rig import Rig, SimulatedDevice, check_books
from test_engine_review import attach_second

from forebay_cache.engine.front import IoError
from forebay_cache.engine.volume import CacheVolume
from forebay_core.units import BLOCK_SIZE, Buffer

CONTENT = b"".join(bytes([i + 1]) * BLOCK_SIZE for i in range(40))


class WornDevice(SimulatedDevice):
    """A device on which some offsets give a read error."""

    bad: frozenset[int] = frozenset()

    def read_now(self, offset: int, size: int) -> Buffer | None:
        return None if self._is_bad(offset, size) else super().read_now(offset, size)

    def read_into_now(self, offset: int, view: memoryview) -> bool:
        return not self._is_bad(offset, view.nbytes) and super().read_into_now(offset, view)

    def read(self, offset: int, size: int, done: Callable[[Buffer | None], None]) -> None:
        if self._is_bad(offset, size):
            self.queue.append(lambda: done(None))
        else:
            super().read(offset, size, done)

    def _is_bad(self, offset: int, size: int) -> bool:
        return any(offset <= at < offset + size for at in self.bad)


def worn(rig: Rig, *lbas: int) -> int:
    """Make some blocks unreadable; return the zone of the first."""
    rig.device.__class__ = WornDevice
    places = [rig.engine.map.find(rig.volume.key << 40 | lba) for lba in lbas]
    assert isinstance(rig.device, WornDevice)
    rig.device.bad = frozenset(rig.engine.zones.offset_of(place) for place in places)
    return places[0] // rig.engine.zones.zone_blocks


def read_error(rig: Rig, lba: int, count: int) -> IoError:
    got: list[IoError] = []
    rig.volume.read(lba * BLOCK_SIZE, count * BLOCK_SIZE, lambda error, chunks: got.append(error))
    rig.run_until(lambda: bool(got))
    return got[0]


def test_an_unreadable_clean_block_is_fetched_and_its_zone_is_not_filled_again() -> None:
    rig = Rig(1, size=8 << 20, blocks=300)
    assert rig.write(0, CONTENT) == IoError.OK
    assert rig.drain()
    zone = worn(rig, 7)
    incarnation = rig.engine.zones.incarnations[zone]
    assert rig.read(0, len(CONTENT)) == CONTENT
    assert any("can't be read; it is fetched again" in report for report in rig.reports)
    assert rig.store.fetched_blocks <= 4  # only the block itself, with its unit
    for turn in range(400):
        assert rig.write(turn % 70 * 4 * BLOCK_SIZE, bytes([turn % 251 + 1]) * 4 * BLOCK_SIZE) == IoError.OK
    assert rig.drain()
    assert rig.engine.zones.incarnations[zone] == incarnation
    assert max(rig.engine.zones.incarnations) > incarnation + 1  # others were filled again and again
    check_books(rig.engine)


def assert_goes_on(rig: Rig, other: CacheVolume) -> None:
    assert not other.error
    got: list[IoError] = []
    other.write(0, b"o" * BLOCK_SIZE, False, got.append)
    other.kick()
    rig.run_until(lambda: bool(got))
    assert got == [IoError.OK]


def test_an_unreadable_dirty_block_costs_only_itself_and_stops_only_its_volume() -> None:
    rig = Rig(2, size=8 << 20, blocks=300)
    other = attach_second(rig)
    rig.store.away = True
    assert rig.write(0, CONTENT) == IoError.OK
    worn(rig, 7)
    assert read_error(rig, 0, 40) == IoError.IO
    assert rig.read(0, 7 * BLOCK_SIZE) == CONTENT[: 7 * BLOCK_SIZE]
    assert rig.read(8 * BLOCK_SIZE, 32 * BLOCK_SIZE) == CONTENT[8 * BLOCK_SIZE :]
    assert_goes_on(rig, other)


def test_retired_zones_are_bounded() -> None:
    rig = Rig(3, size=8 << 20, blocks=300)
    for zone in range(rig.engine.zones.zone_count):
        rig.engine.retire_zone(zone)
    assert len(rig.engine.retired_zones) == rig.engine.zones.zone_count // 8
