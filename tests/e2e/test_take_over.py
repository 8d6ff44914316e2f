"""A cache that lost its volume serves nothing of it any more, whether it asks the store for something or not."""

from collections.abc import Iterator

import pytest
from e2e_nbd import NbdError
from e2e_rig import Rig

from forebay_core.units import BLOCK_SIZE, MIB

CACHED = (0, 8 * MIB)
ABSENT = 12 * MIB
OLD, NEW = b"old!" * (BLOCK_SIZE // 4), b"new!" * (BLOCK_SIZE // 4)


@pytest.fixture
def other(rig: Rig) -> Iterator[Rig]:
    """Another cache, which has taken `disk` over from that of `rig` and written it."""
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    with rig.nbd("disk") as client:
        for at in CACHED:
            client.write(at, OLD)
    rig.drain("disk")
    folder = rig.folder / "second"
    folder.mkdir()
    other = Rig(folder, rig.template)
    other.store_address = rig.store_address
    other.start_cache()
    try:
        other.wait_status(lambda status: status.store_connected)
        other.attach("disk", take_over=True)
        with other.nbd("disk") as client:
            for at in (*CACHED, ABSENT):
                client.write(at, NEW)
        other.drain("disk")
        yield other
    finally:
        other.stop()


def test_a_cache_that_only_reads_what_it_has_is_told_that_it_lost_its_volume(rig: Rig, other: Rig) -> None:
    with rig.nbd("disk") as client:
        status = rig.wait_status(lambda status: status.volumes[0].error != "")
        assert "to somebody else" in status.volumes[0].error
        for at in CACHED:
            with pytest.raises(NbdError):
                client.read(at, BLOCK_SIZE)
    with other.nbd("disk") as client:
        assert client.read(CACHED[0], BLOCK_SIZE) == NEW


def test_old_and_new_blocks_are_never_served_together(rig: Rig, other: Rig) -> None:
    with rig.nbd("disk") as client:
        with pytest.raises(NbdError):
            client.read(ABSENT, BLOCK_SIZE)
        assert "to somebody else" in rig.status().volumes[0].error
        for at in CACHED:
            with pytest.raises(NbdError):
                client.read(at, BLOCK_SIZE)
