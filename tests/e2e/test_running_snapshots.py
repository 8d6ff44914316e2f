"""Snapshots and resizes of attached volumes with real daemons: taken while the store is away, killed, brought up."""

import os

import pytest
from e2e_rig import Rig

from forebay_core.errors import RefusedError
from forebay_core.units import BLOCK_SIZE, MIB
from forebay_wire import messages
from forebay_wire.messages import CreateSnapshot, ListSnapshots, ResizeVolume, Snapshots, SnapshotTaken, Volume


def snapshot(rig: Rig, name: str, *, stored: bool = False) -> messages.SnapshotRow:
    return rig.ask_cache(CreateSnapshot(("disk",), name, stored), SnapshotTaken).row


def stored_names(rig: Rig) -> list[str]:
    return [row.name for row in rig.ask_store(ListSnapshots("disk"), Snapshots).rows]


def test_snapshots_of_a_running_volume_are_what_it_was(rig: Rig) -> None:
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    images = {}
    image = bytearray(16 * MIB)
    with rig.nbd("disk") as client:
        for turn in range(3):
            for block in range(0, 64, turn + 1):
                image[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = payload = os.urandom(BLOCK_SIZE)
                client.write(block * BLOCK_SIZE, payload)
            row = snapshot(rig, f"s{turn}", stored=turn == 1)
            assert (row.volume_name, row.size, row.pending and turn == 1) == ("disk", 16 * MIB, False)
            images[f"s{turn}"] = bytes(image)
    with pytest.raises(RefusedError, match="has a snapshot s0 already"):
        snapshot(rig, "s0")
    rig.drain("disk")
    assert stored_names(rig) == ["s0", "s1", "s2"]
    for name, expected in images.items():
        assert rig.exported(f"disk@{name}") == expected, name


def test_a_snapshot_taken_while_the_store_is_away_survives_a_kill(rig: Rig) -> None:
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    with rig.nbd("disk") as client:
        client.write(0, b"a" * BLOCK_SIZE)
        rig.kill_store()
        assert snapshot(rig, "away").pending
        client.write(0, b"b" * BLOCK_SIZE)
        client.flush()
    [status] = rig.status().volumes
    assert status.pending_snapshots == ("away",)
    rig.kill_cache()
    rig.start_cache()
    [status] = rig.status().volumes
    assert status.pending_snapshots == ("away",)
    with pytest.raises(RefusedError, match="has a snapshot away already"):
        snapshot(rig, "away")
    rig.start_store()
    rig.drain("disk")
    assert stored_names(rig) == ["away"]
    assert rig.exported("disk@away")[:BLOCK_SIZE] == b"a" * BLOCK_SIZE
    assert rig.exported("disk")[:BLOCK_SIZE] == b"b" * BLOCK_SIZE


def test_a_name_is_free_again_when_its_snapshot_was_deleted(rig: Rig) -> None:
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    snapshot(rig, "again", stored=True)
    rig.ask_store(messages.DeleteSnapshot("disk", "again"), messages.Done)
    assert snapshot(rig, "again", stored=True).name == "again"
    assert stored_names(rig) == ["again"]


def test_an_attached_volume_grows_and_clients_see_it_when_they_connect_anew(rig: Rig) -> None:
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    assert rig.ask_cache(ResizeVolume("disk", 32 * MIB), Volume).row.size == 32 * MIB
    with rig.nbd("disk") as client:
        client.write(32 * MIB - BLOCK_SIZE, b"end".ljust(BLOCK_SIZE))
        client.flush()
    rig.kill_cache()
    rig.start_cache()
    with rig.nbd("disk") as client:
        assert client.read(32 * MIB - BLOCK_SIZE, 3) == b"end"
    with pytest.raises(RefusedError, match="detach it before it is made smaller"):
        rig.ask_cache(ResizeVolume("disk", 16 * MIB, True), Volume)
    rig.detach("disk")
    assert rig.ask_store(messages.GetVolume("disk"), Volume).row.size == 32 * MIB
    assert rig.exported("disk")[-BLOCK_SIZE:] == b"end".ljust(BLOCK_SIZE)
