"""The store goes away, comes back, is full, is another one: the VM sees none of it but waiting."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_nbd import READ, WRITE
from e2e_relay import TIMEOUT_S, Relay
from e2e_rig import Rig

from forebay_core.units import BLOCK_SIZE, MIB, format_store
from forebay_wire.messages import CacheStatus, CreateVolume, GetVolume, Volume


def prepared(rig: Rig) -> bytes:
    """Fill the first 4 MiB of a volume that is then attached with an empty cache; return its content."""
    content = os.urandom(4 * MIB)
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    with rig.nbd("disk") as client:
        for at in range(0, len(content), MIB):
            client.write(at, content[at : at + MIB])
    rig.detach("disk")
    assert rig.cache is not None and rig.cache.stop() == 0
    rig.device.unlink()
    rig.start_cache()
    rig.wait_status(lambda status: status.store_connected)
    rig.attach("disk")
    return content


def test_with_the_store_away_hits_and_whole_writes_go_on_and_a_miss_waits(rig: Rig) -> None:
    content = prepared(rig)
    with rig.nbd("disk") as client, rig.nbd("disk") as other:
        assert client.read(0, MIB) == content[:MIB]
        rig.kill_store()
        rig.wait_status(lambda status: not status.store_connected)
        assert client.read(0, MIB) == content[:MIB]
        client.write(2 * MIB, b"new!" * 1024)
        client.flush()
        assert client.read(2 * MIB, 4096) == b"new!" * 1024
        other.submit(READ, 3 * MIB, 8192)
        other.submit(WRITE, 3 * MIB + 16384, 512, b"p" * 512)  # needs the rest of its block
        client.write(MIB, bytes(4096))  # nobody else is held up
        rig.start_store()
        answers = {pending.offset: payload for _, pending, payload in (other.next_reply(), other.next_reply())}
        assert answers[3 * MIB] == content[3 * MIB : 3 * MIB + 8192]
        block = content[3 * MIB + 16384 :][:BLOCK_SIZE]
        assert client.read(3 * MIB + 16384, BLOCK_SIZE) == b"p" * 512 + block[512:]
    rig.drain("disk")
    assert rig.status().dirty_bytes == 0


def test_leaving_changes_behind_does_not_wait_for_a_store_that_is_away(rig: Rig) -> None:
    prepared(rig)
    with rig.nbd("disk") as client, rig.nbd("disk") as other:
        rig.kill_store()
        rig.wait_status(lambda status: not status.store_connected)
        client.write(2 * MIB, b"new!" * 1024)
        other.submit(READ, 3 * MIB, 8192)  # not cached: it waits for the store
        done = rig.ask("detach", "disk", "--leave-dirty", timeout_s=20)  # much less than requests may take else
    assert done.returncode == 0
    assert "4 KiB of changes of volume disk are not in the store yet" in done.stderr
    assert not rig.status().volumes


def test_a_cache_that_starts_without_the_store_serves_what_it_has(rig: Rig) -> None:
    content = prepared(rig)
    with rig.nbd("disk") as client:
        client.read(0, MIB)
        client.write(0, b"last" * 1024)
        rig.wait_status(lambda status: status.cached_bytes >= MIB)  # fetched blocks wait in memory for 10 s at most
    rig.kill_store()
    rig.kill_cache()
    rig.start_cache()
    with rig.nbd("disk") as client:
        assert client.read(0, MIB) == b"last" * 1024 + content[4096:MIB]
        status = rig.wait_status(lambda status: bool(status.error))  # of the first try to connect
        assert status.miss_blocks == 0 and not status.store_connected
        client.submit(READ, 2 * MIB, 4096)
        rig.start_store()
        assert client.next_reply()[2] == content[2 * MIB : 2 * MIB + 4096]
    rig.detach("disk")
    assert rig.exported("disk")[:MIB] == b"last" * 1024 + content[4096:MIB]


def test_another_store_under_the_address_is_never_written_to(rig: Rig) -> None:
    content = prepared(rig)
    with rig.nbd("disk") as client:
        client.write(0, b"mine" * 1024)
        rig.kill_store()
        ours, rig.store_data = rig.store_data, rig.folder / "other"
        rig.start_store()
        rig.ask_store(CreateVolume("disk", 16 * MIB), Volume)
        refused = rig.wait_status(lambda status: "lives in store" in status.volumes[0].error).volumes[0].error
        assert all(format_store(rig.store_id(folder)) in refused for folder in (ours, rig.store_data))
        assert refused in rig.run("attach", "disk", code=1)
        assert not rig.ask_store(GetVolume("disk"), Volume).row.writer, "the other volume was touched"
        client.submit(READ, 2 * MIB, 4096)
        rig.kill_store()
        rig.store_data = ours
        rig.start_store()
        assert client.next_reply()[2] == content[2 * MIB : 2 * MIB + 4096]
    rig.detach("disk")
    assert rig.exported("disk")[:4096] == b"mine" * 1024


def test_a_restarted_cache_waits_for_its_own_store_and_serves_what_lives_in_another(rig: Rig) -> None:
    content = prepared(rig)
    with rig.nbd("disk") as client:
        client.write(0, b"mine" * 1024)
        client.flush()
    rig.kill_store()
    rig.kill_cache()
    ours, rig.store_data = rig.store_data, rig.folder / "other"
    rig.start_store()
    rig.ask_store(CreateVolume("disk", 16 * MIB), Volume)
    rig.start_cache()
    with rig.nbd("disk") as client:
        client.submit(READ, 2 * MIB, 4096)
        rig.wait_status(lambda status: "lives in store" in status.volumes[0].error)
        other = rig.ask_store(GetVolume("disk"), Volume).row
        assert (other.writer, other.epoch, other.version) == (b"", 0, 0), "the other volume was touched"
        rig.create("guest")
        rig.attach("guest")
        with rig.nbd("guest") as guest:
            guest.write(0, b"else" * 1024)
        rig.drain("guest")
        rig.kill_store()
        rig.store_data = ours
        rig.start_store()
        assert client.next_reply()[2] == content[2 * MIB : 2 * MIB + 4096]
    rig.wait_status(lambda status: "lives in store" in {v.name: v.error for v in status.volumes}["guest"])
    rig.detach("disk")
    assert rig.exported("disk")[:4096] == b"mine" * 1024


def test_a_volume_of_the_same_name_in_another_store_is_not_joined_with_what_is_kept(rig: Rig) -> None:
    prepared(rig)
    rig.kill_store()
    with rig.nbd("disk") as client:
        client.write(0, b"mine" * 1024)
    rig.run("detach", "disk", "--leave-dirty")
    ours, rig.store_data = rig.store_data, rig.folder / "other"
    rig.start_store()
    missing = rig.run("attach", "disk", code=1)  # not even there
    rig.ask_store(CreateVolume("disk", 16 * MIB), Volume)
    said = rig.run("attach", "disk", code=1)
    for text in (missing, said):
        assert all(format_store(rig.store_id(folder)) in text for folder in (ours, rig.store_data))
        assert text.count("\n") == 1
    assert not rig.ask_store(GetVolume("disk"), Volume).row.writer
    rig.kill_store()
    rig.store_data = ours
    rig.start_store()
    rig.wait_status(lambda status: status.store_connected)
    rig.attach("disk")
    rig.detach("disk")
    assert rig.exported("disk")[:4096] == b"mine" * 1024


def test_a_store_put_back_from_an_old_backup_is_refused_until_the_newer_one_is_back(rig: Rig) -> None:
    rig.start()
    for name in ("disk", "idle"):
        rig.create(name)
        rig.attach(name)
    content = os.urandom(2 * MIB)
    with rig.nbd("disk") as client, rig.nbd("idle") as idle:
        client.write(0, content[:MIB])
        idle.write(0, content[:4096])
        rig.drain("disk")
        rig.drain("idle")
        rig.kill_store()
        backup = rig.folder / "backup"
        shutil.copytree(rig.store_data, backup)
        rig.start_store()
        client.write(MIB, content[MIB:])
        rig.create("late")
        rig.attach("late")
        rig.drain("disk")
        rig.kill_store()
        newer = rig.store_data.rename(rig.folder / "newer")
        shutil.copytree(backup, rig.store_data)
        rig.start_store()

        def refused(status: CacheStatus) -> bool:
            errors = {volume.name: volume.error for volume in status.volumes}
            return "lost commits" in errors["disk"] and "no volume" in errors["late"] and not errors["idle"]

        rig.wait_status(refused)
        before = rig.ask_store(GetVolume("disk"), Volume).row
        client.write(8 * MIB, b"more" * 1024)
        client.flush()
        idle.write(4096, content[:4096])
        rig.drain("idle")  # the store never knew better of this one
        assert client.read(0, 2 * MIB) == content, "what is cached is served"
        rig.kill_cache()
    rig.start_cache()
    rig.wait_status(refused)
    assert rig.ask_store(GetVolume("disk"), Volume).row == before
    assert rig.status().dirty_bytes > 0
    rig.run("detach", "disk", "--leave-dirty")
    said = rig.run("attach", "disk", code=1)
    assert "lost commits" in said and said.count("\n") == 1
    rig.kill_store()
    shutil.rmtree(rig.store_data)
    newer.rename(rig.store_data)
    rig.start_store()
    rig.wait_status(lambda status: status.store_connected)
    rig.attach("disk")
    rig.detach("disk")
    exported = rig.exported("disk")
    assert exported[: 2 * MIB] == content and exported[8 * MIB :][:4096] == b"more" * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 24 MiB; needs root."""
    path = tmp_path / "small"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)], check=False)
    if mounted.returncode != 0:
        pytest.skip("a tmpfs can't be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_with_a_full_disk_under_the_store_data_stays_dirty_and_goes_on_later(rig: Rig, small_disk: Path) -> None:
    rig.store_data = small_disk / "store"
    ballast = small_disk / "ballast"
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    free = os.statvfs(small_disk).f_bavail * 4096
    ballast.write_bytes(bytes(free - 2 * MIB))
    content = os.urandom(6 * MIB)
    with rig.nbd("disk") as client:
        for at in range(0, len(content), MIB):
            client.write(at, content[at : at + MIB])
        client.flush()
        rig.wait_status(lambda status: "has no space" in status.error)
        assert rig.status().dirty_bytes >= 4 * MIB
        client.write(8 * MIB, b"more" * 1024)
        drained = threading.Thread(target=rig.drain, args=["disk"])
        drained.start()
        ballast.unlink()
        drained.join(60)
        assert not drained.is_alive()
    assert rig.status().dirty_bytes == 0 and not rig.status().error
    rig.detach("disk")
    exported = rig.exported("disk")
    assert exported[: len(content)] == content and exported[8 * MIB :][:4096] == b"more" * 1024
    rig.stop()


def test_an_open_that_the_network_brings_late_takes_nothing_from_its_own_daemon(rig: Rig) -> None:
    rig.start_store()
    store = rig.store_address
    with Relay(store) as relay:
        rig.store_address = relay.address
        rig.start_cache()
        rig.store_address = store
        rig.create("disk")
        rig.attach("disk")
        relay.keep(b"disk")
        relay.cut()
        assert relay.keeping.wait(TIMEOUT_S)
        rig.wait_status(lambda status: status.store_connected)
        content = os.urandom(MIB)
        with rig.nbd("disk") as client:
            client.write(0, content)
            rig.drain("disk")  # over the next connection
            relay.bring()
            client.write(MIB, content)
            rig.drain("disk")
            assert client.read(0, 2 * MIB) == 2 * content
        assert rig.exported("disk")[: 2 * MIB] == 2 * content
        [volume] = rig.status().volumes
        assert not volume.error and volume.dirty_bytes == 0
