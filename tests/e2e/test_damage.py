"""Damaged and failing cache devices: the right bytes or an error, never wrong bytes."""

import os
import resource

import pytest
from e2e_nbd import NbdError
from e2e_rig import Rig

from forebay_core.units import BLOCK_SIZE, MIB

EIO = 5


def flip(rig: Rig, block: bytes) -> int:
    """Flip one bit in the one copy of a block on the cache device; return its offset."""
    content = rig.device.read_bytes()
    offset = content.index(block)
    assert content.find(block, offset + 1) < 0
    with rig.device.open("r+b") as file:
        file.seek(offset + 1000)
        file.write(bytes([block[1000] ^ 4]))
    return offset


def test_a_flipped_bit_in_a_clean_block_is_fetched_again(rig: Rig) -> None:
    content = os.urandom(MIB)
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    with rig.nbd("disk") as client:
        client.write(0, content)
    rig.drain("disk")
    rig.kill_cache()
    offset = flip(rig, content[8192:12288])
    rig.start_cache()
    assert rig.cache is not None
    with rig.nbd("disk") as client:
        assert client.read(0, MIB) == content
        rig.cache.wait_for(rf"corrupt block 2 of volume disk at offset {offset}\b.*fetched again")
        assert client.read(8192, BLOCK_SIZE) == content[8192:12288]


def test_a_flipped_bit_in_a_dirty_block_is_an_error_and_nothing_else_is(rig: Rig) -> None:
    rig.cache_flags = ["--zone-size", "1MiB", "--cut-age-s-max", "3600"]
    content = os.urandom(MIB)
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    with rig.nbd("disk") as client:
        client.write(0, content)
        client.flush()
        assert rig.cache is not None
        offset = flip(rig, content[8192:12288])
        with pytest.raises(NbdError) as error:
            client.read(8192, BLOCK_SIZE)
        assert error.value.error == EIO
        rig.cache.wait_for(rf"corrupt block 2 of volume disk at offset {offset}\b.*expected checksum 0x.*found 0x")
        assert client.read(0, 8192) == content[:8192]
        assert client.read(12288, MIB - 12288) == content[12288:]
        client.write(8192, content[:BLOCK_SIZE])
        assert client.read(8192, BLOCK_SIZE) == content[:BLOCK_SIZE]


def test_a_corrupt_dirty_block_never_reaches_the_store(rig: Rig) -> None:
    rig.cache_flags = ["--zone-size", "1MiB", "--cut-age-s-max", "3600"]
    content = os.urandom(MIB)
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    with rig.nbd("disk") as client:
        client.write(0, content)
        client.flush()
    flip(rig, content[8192:12288])
    assert "corrupt block 2" in rig.run("drain", "disk", code=1)
    assert "corrupt block 2" in rig.status().volumes[0].error
    assert rig.exported("disk") == bytes(16 * MIB)


def test_a_failing_device_is_an_error_to_clients_and_loses_nothing_acknowledged(rig: Rig) -> None:
    content = os.urandom(MIB)
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    assert rig.cache is not None
    with rig.nbd("disk") as client:
        client.write(0, content)
        # From now on the kernel refuses every write of the daemon behind the first blocks of a file.
        resource.prlimit(rig.cache.pid, resource.RLIMIT_FSIZE, (8192, 8192))
        with pytest.raises(NbdError) as error:
            client.write(0, bytes(4096))
        assert error.value.error == EIO
        with pytest.raises(NbdError):
            client.flush()
        with pytest.raises(NbdError):
            client.read(0, 4096)
        assert "write failed: File too large" in rig.status().error
    assert rig.cache.stop() == 1
    rig.start_cache()
    with rig.nbd("disk") as client:
        assert client.read(BLOCK_SIZE, MIB - BLOCK_SIZE) == content[BLOCK_SIZE:]
        assert client.read(0, BLOCK_SIZE) in (content[:BLOCK_SIZE], bytes(BLOCK_SIZE))
