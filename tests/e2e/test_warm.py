"""What was cached stays cached, and is never stale: restarts, detach and attach, writers elsewhere."""

import os

import pytest
from e2e_rig import Rig

from forebay_core.errors import RefusedError
from forebay_core.units import BLOCK_SIZE, MIB
from forebay_wire import messages


def second(rig: Rig) -> Rig:
    """Return a rig of another host: the same store, another cache."""
    folder = rig.folder / "second"
    folder.mkdir()
    other = Rig(folder, rig.template)
    other.store_address = rig.store_address
    return other


def written(rig: Rig, size: int = 4 * MIB) -> bytes:
    content = os.urandom(size)
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    with rig.nbd("disk") as client:
        client.write(0, content)
    return content


def test_the_cache_is_warm_after_kill_and_restart(rig: Rig) -> None:
    content = written(rig)
    rig.drain("disk")
    rig.kill_cache()
    rig.kill_store()
    rig.start_cache()
    with rig.nbd("disk") as client:
        assert client.read(0, len(content)) == content
    status = rig.status()
    assert (status.hit_blocks, status.miss_blocks) == (len(content) // BLOCK_SIZE, 0)
    policy = status.policy
    assert policy.worthy_blocks >= len(content) // BLOCK_SIZE == policy.accesses
    assert 0 < policy.window_blocks <= policy.window_blocks_max < policy.worthy_blocks_max


def test_the_cache_is_warm_after_a_clean_restart(rig: Rig) -> None:
    content = written(rig)
    assert rig.cache is not None and rig.cache.stop() == 0
    rig.kill_store()
    rig.start_cache()
    with rig.nbd("disk") as client:
        assert client.read(0, len(content)) == content
    assert rig.status().miss_blocks == 0


def test_detach_and_attach_keep_warm_blocks(rig: Rig) -> None:
    content = written(rig)
    rig.detach("disk")
    assert rig.status().volumes == ()
    rig.attach("disk")
    with rig.nbd("disk") as client:
        assert client.read(0, len(content)) == content
    assert rig.status().miss_blocks == 0


def test_a_volume_in_use_elsewhere_is_refused_until_released_or_taken_over(rig: Rig) -> None:
    content = written(rig)
    other = second(rig)
    try:
        other.start_cache()
        other.wait_status(lambda status: status.store_connected)
        with pytest.raises(RefusedError) as refused:
            other.attach("disk")
        assert refused.value.code == messages.VOLUME_IN_USE
        rig.drain("disk")
        with rig.nbd("disk") as client:
            client.write(0, b"late" * 1024)  # may or may not reach the store: its epoch ends now
        other.attach("disk", take_over=True)
        with other.nbd("disk") as client:
            assert client.read(MIB, MIB) == content[MIB : 2 * MIB]
            client.write(0, b"over" * 1024)
        rig.wait_status(lambda status: status.volumes[0].error != "")
        other.detach("disk")
        assert other.exported("disk")[:4096] == b"over" * 1024
    finally:
        other.stop()


@pytest.mark.parametrize("restart", [False, True])
def test_a_volume_written_elsewhere_meanwhile_shows_no_stale_block(rig: Rig, restart: bool) -> None:
    content = written(rig)
    rig.detach("disk")
    other = second(rig)
    try:
        other.start_cache()
        other.wait_status(lambda status: status.store_connected)
        other.attach("disk")
        with other.nbd("disk") as client:
            client.write(8192, b"else" * 1024)
            client.trim(MIB, 4096)
        other.detach("disk")
    finally:
        other.stop()
    rig.attach("disk")
    if restart:
        rig.kill_cache()
        rig.start_cache()
    expected = bytearray(content)
    expected[8192:12288] = b"else" * 1024
    expected[MIB : MIB + 4096] = bytes(4096)
    with rig.nbd("disk") as client:
        assert client.read(0, len(content)) == expected
    assert rig.status().miss_blocks <= 8  # the rest stayed warm


def test_leave_dirty_keeps_what_was_not_destaged_for_the_next_attach(rig: Rig) -> None:
    rig.cache_flags = ["--zone-size", "1MiB", "--cut-age-s-max", "3600"]
    content = written(rig)
    rig.detach("disk", leave_dirty=True)
    rig.kill_cache()
    rig.start_cache()
    assert rig.status().volumes == ()
    rig.wait_status(lambda status: status.store_connected)
    rig.attach("disk")
    with rig.nbd("disk") as client:
        assert client.read(0, len(content)) == content
    rig.detach("disk")
    assert rig.exported("disk")[: len(content)] == content


def test_what_was_left_dirty_goes_upstream_after_a_restart_without_an_attach(rig: Rig) -> None:
    rig.cache_flags = ["--zone-size", "1MiB", "--cut-age-s-max", "1"]
    content = written(rig)
    rig.detach("disk", leave_dirty=True)
    assert rig.status().dirty_bytes > 0
    rig.kill_cache()
    rig.start_cache()
    rig.wait_status(lambda status: status.dirty_bytes == 0)
    assert rig.status().volumes == ()
    assert rig.exported("disk")[: len(content)] == content
    rig.attach("disk")
    with rig.nbd("disk") as client:
        assert client.read(0, len(content)) == content


def test_a_deleted_volume_of_the_same_name_leaves_nothing_behind(rig: Rig) -> None:
    written(rig)
    rig.detach("disk")
    rig.ask_store(messages.DeleteVolume("disk"), messages.Done)
    rig.create("disk")
    rig.attach("disk")
    with rig.nbd("disk") as client:
        assert client.read(0, 4 * MIB) == bytes(4 * MIB)


def test_a_read_only_volume_refuses_writes(rig: Rig) -> None:
    content = written(rig)
    rig.detach("disk")
    rig.attach("disk", read_only=True)
    with rig.nbd("disk") as client:
        assert client.read(0, MIB) == content[:MIB]
        with pytest.raises(Exception, match="NBD error 1"):
            client.write(0, bytes(4096))
    rig.detach("disk")
