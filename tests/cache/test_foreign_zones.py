"""Zones of another device, or of an older life of the same zone, in the place of a newer one: nothing of them counts.

A disk that lost writes shows an older zone; one that was copied, or wired up wrongly, a foreign one. Both are whole:
their records are summed and chained among themselves, so only who they say they are gives them away.
"""

import pytest
from engine_rig import Rig
from test_check import BLOCKS, check, settle, work
from test_engine_damage import check_damaged

from forebay_cache.engine import recovery
from forebay_cache.engine.front import IoError
from forebay_core.units import BLOCK_SIZE

OURS, THEIRS = b"d" * 16, b"e" * 16
OLD, NEW = b"o" * BLOCK_SIZE, b"n" * BLOCK_SIZE


def zone_slice(rig: Rig, zone: int) -> slice:
    """Return the bytes of a zone."""
    zones = rig.engine.zones
    return slice(zones.offset_of(zones.place_at(zone, 0)), zones.offset_of(zones.place_at(zone + 1, 0)))


def written_through(device: bytes) -> Rig:
    """A new device whose log is in its first life: what was written is behind the first checkpoint."""
    rig = Rig(3, size=8 << 20, blocks=BLOCKS, device=device)
    assert rig.write(0, OLD) == IoError.OK
    assert rig.flush() == IoError.OK
    return rig


def test_a_zone_of_another_device_where_the_log_would_begin_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first record of any device chains to nothing and has log position 1: only the device's id tells."""
    blank = bytes(Rig(3, size=8 << 20, blocks=BLOCKS).device.durable)
    ours, theirs = Rig(3, size=8 << 20, blocks=BLOCKS), written_through(THEIRS)
    image = bytearray(blank)
    image[zone_slice(theirs, 0)] = theirs.device.bytes[zone_slice(theirs, 0)]
    superblock = ours.engine.superblock

    def read(at: int, size: int) -> bytes:
        return bytes(image[at : at + size])

    def replayed() -> int:
        return recovery.recover(read, superblock).records_replayed

    assert replayed() == 0
    tag = recovery.device_tag(theirs.engine.superblock)
    with monkeypatch.context() as patch:  # the guard is what holds it off
        patch.setattr(recovery, "device_tag", lambda _: tag)
        assert replayed() > 0


def reused() -> tuple[Rig, dict[int, list[tuple[int, bytes]]]]:
    """A device whose log went round; and of each zone the lives that it had, as (incarnation, bytes)."""
    rig = Rig(5, size=8 << 20, blocks=BLOCKS)
    rng = rig.rng
    lives: dict[int, list[tuple[int, bytes]]] = {}
    for _ in range(40):
        work(rig, 30, rng)
        assert rig.drain()
        zones = rig.engine.zones
        for zone in range(zones.zone_count):
            known = lives.setdefault(zone, [])
            if zones.incarnations[zone] and zone in zones.full and zones.incarnations[zone] not in dict(known):
                known.append((zones.incarnations[zone], bytes(rig.device.bytes[zone_slice(rig, zone)])))
    rig.store.away = True
    work(rig, 12, rng)
    assert rig.flush() == IoError.OK
    settle(rig)
    return rig, lives


def model_of(rig: Rig) -> bytes:
    return rig.content()[: BLOCKS * BLOCK_SIZE]


def test_an_older_life_of_a_zone_in_its_place_is_refused_or_its_blocks_are_never_served() -> None:
    rig, lives = reused()
    rig.store.away = False  # reading back wants what is not cached
    model, zones = model_of(rig), rig.engine.zones
    image = bytes(rig.device.bytes)
    now = {zone: zones.incarnations[zone] for zone in zones.full}
    assert check_damaged(rig, model, image) == "harmless"
    tried = []
    for zone, known in sorted(lives.items()):
        older = [content for incarnation, content in known if incarnation < now.get(zone, 0)]
        if older:
            stale = bytearray(image)
            stale[zone_slice(rig, zone)] = older[-1]
            tried.append(check_damaged(rig, model, bytes(stale)))
    assert len(tried) > 3, "the log went round too seldom"
    assert "repaired" in tried, tried  # from the store; none was wrong


@pytest.mark.parametrize("foreign", [False, True], ids=["older life", "another device"])
def test_fsck_names_a_zone_that_is_not_the_one_it_should_be(foreign: bool) -> None:
    rig, lives = reused()
    zones = rig.engine.zones
    image = bytes(rig.device.bytes)
    assert check(image) == []
    other = Rig(5, size=8 << 20, blocks=BLOCKS, device=THEIRS)
    work(other, 200, other.rng)
    seen = set()
    live = [zone for zone in zones.full if rig.engine.map.live_array[zone]]
    for zone in live:
        older = [content for incarnation, content in lives[zone] if incarnation < zones.incarnations[zone]]
        content = bytes(other.device.bytes[zone_slice(rig, zone)]) if foreign else older[-1] if older else b""
        if not any(content[:64]):
            continue
        changed = bytearray(image)
        changed[zone_slice(rig, zone)] = content
        found = check(changed)
        codes = {one.code for one in found}
        assert codes & {"zone-opening", "log-damaged"}, (zone, found)
        # Block 0, or where the replay of the log begins in it.
        assert any(f"zone {zone} block " in one.place for one in found), (zone, found)
        seen |= codes
    assert "zone-opening" in seen
