"""Snapshots as devices and clones, with real daemons: kill -9 of either, another host, the store away."""

import json
import random
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from e2e_nbd import NbdError
from e2e_rig import Rig

from forebay_core.errors import RefusedError
from forebay_core.units import BLOCK_SIZE, MIB
from forebay_wire.messages import (
    CloneVolume,
    CreateSnapshot,
    DeleteSnapshot,
    Done,
    FlattenVolume,
    GetStoreStatus,
    GetVolume,
    SnapshotTaken,
    StoreStatus,
    Volume,
)

SIZE = 8 * MIB
NBD_EPERM = 1


def fill(rig: Rig, name: str, seed: int) -> bytes:
    """Write a volume full of noise with holes, drain and detach it; return its bytes."""
    rng = random.Random(seed)
    content = bytearray(SIZE)
    rig.attach(name)
    with rig.nbd(name) as client:
        for at in range(0, SIZE, 64 * 1024):
            if rng.random() < 0.7:
                content[at : at + 65536] = rng.randbytes(65536)
                client.write(at, bytes(content[at : at + 65536]))
        client.flush()
    rig.drain(name)
    rig.detach(name)
    return bytes(content)


def read_all(rig: Rig, name: str) -> bytes:
    with rig.nbd(name) as client:
        return b"".join(client.read(at, MIB) for at in range(0, SIZE, MIB))


@pytest.fixture
def base(rig: Rig) -> bytes:
    """A volume `base` with a snapshot `s`, nobody's."""
    rig.start()
    rig.wait_status(lambda status: status.store_connected)
    rig.create("base", SIZE)
    content = fill(rig, "base", 1)
    rig.ask_store(CreateSnapshot(("base",), "s"), SnapshotTaken)
    return content


@pytest.fixture
def second(rig: Rig, base: bytes) -> Iterator[Rig]:
    """Another cache of the same store."""
    folder = rig.folder / "second"
    folder.mkdir()
    other = Rig(folder, rig.template)
    other.store_address = rig.store_address
    other.start_cache()
    try:
        other.wait_status(lambda status: status.store_connected)
        yield other
    finally:
        other.stop()


def test_a_snapshot_is_read_elsewhere_while_its_volume_is_written(rig: Rig, base: bytes, second: Rig) -> None:
    rig.attach("base")
    second.attach("base@s")
    with rig.nbd("base") as writer, second.nbd("base@s") as reader:
        for at in range(0, SIZE, MIB):
            writer.write(at, b"new!" * 65536)
            assert reader.read(at, MIB) == base[at : at + MIB]
        rig.drain("base")
        assert reader.read(0, MIB) == base[:MIB]
        for change in (lambda: reader.write(0, b"x" * 4096), lambda: reader.trim(0, 4096)):
            with pytest.raises(NbdError) as refused:
                change()
            assert refused.value.error == NBD_EPERM
    assert second.status().volumes[0].read_only
    second.kill_cache()
    rig.kill_cache()
    second.start_cache()
    assert read_all(second, "base@s") == base
    rig.start_cache()
    rig.attach("base@s")
    assert read_all(rig, "base@s") == base
    assert read_all(rig, "base") != base
    second.detach("base@s")
    assert second.status().cached_bytes == 0
    assert second.status().volumes == ()


def test_ten_clones_fetch_the_blocks_of_their_origin_once(rig: Rig, base: bytes) -> None:
    names = [f"clone{number}" for number in range(10)]
    for name in names:
        rig.ask_store(CloneVolume("base", "s", name), Volume)
        rig.attach(name)
    assert read_all(rig, names[0]) == base
    reads = rig.ask_store(GetStoreStatus(), StoreStatus).reads
    for name in names[1:]:
        assert read_all(rig, name) == base
    assert rig.ask_store(GetStoreStatus(), StoreStatus).reads - reads <= 40
    status = rig.status()
    assert status.cached_bytes <= 2 * SIZE
    assert {volume.origin for volume in status.volumes} == {"base@s"}
    assert status.volumes[3].cached_bytes == 0 < status.volumes[3].origin_cached_bytes <= SIZE


def test_clones_keep_their_own_blocks_through_kills_and_with_the_store_away(rig: Rig, base: bytes) -> None:
    models = {name: bytearray(base) for name in ("one", "two", "three")}
    rig.ask_store(CloneVolume("base", "s", "one"), Volume)
    rig.ask_store(CloneVolume("base", "s", "two"), Volume)
    rng = random.Random(5)

    def change(name: str) -> None:
        with rig.nbd(name) as client:
            for _ in range(40):
                at = rng.randrange(SIZE - 20000)
                length = rng.randrange(1, 20000)
                if rng.random() < 0.6:
                    payload = rng.randbytes(length)
                    client.write(at, payload)
                    models[name][at : at + length] = payload
                else:
                    client.write_zeroes(at, length)
                    models[name][at : at + length] = bytes(length)
            client.flush()

    for name in ("one", "two"):
        rig.attach(name)
        change(name)
    rig.kill_cache()
    rig.start_cache()
    for name in ("one", "two"):
        assert read_all(rig, name) == models[name]
    rig.detach("one")
    rig.ask_store(CreateSnapshot(("one",), "s"), SnapshotTaken)
    rig.ask_store(CloneVolume("one", "s", "three"), Volume)
    models["three"][:] = models["one"]
    rig.attach("three")
    rig.attach("one")
    change("three")
    for name in models:
        assert read_all(rig, name) == models[name]
    rig.kill_store()
    assert rig.cache is not None
    assert rig.cache.stop() == 0  # after a kill the store would be asked again for holes that only it knows
    rig.start_cache()
    for name in models:
        assert read_all(rig, name) == models[name]
    rig.start_store()
    rig.wait_status(lambda status: status.store_connected)
    for name in models:
        with rig.nbd(name) as client:
            client.write(0, b"last" * 1024)
        models[name][:4096] = b"last" * 1024
        rig.drain(name)
        rig.detach(name)
        assert rig.exported(name) == models[name]


def test_a_flattened_clone_outlives_its_origin(rig: Rig, base: bytes) -> None:
    rig.ask_store(CloneVolume("base", "s", "copy"), Volume)
    rig.attach("copy")
    with rig.nbd("copy") as client:
        client.write(0, b"own!" * 1024)
    expected = b"own!" * 1024 + base[4096:]
    rig.drain("copy")
    rig.ask_store(FlattenVolume("copy"), Done)
    rig.wait_status(lambda _: not rig.ask_store(GetVolume("copy"), Volume).row.origin)
    rig.ask_store(DeleteSnapshot("base", "s"), Done)
    assert read_all(rig, "copy") == expected
    rig.detach("copy")
    rig.attach("copy")
    assert read_all(rig, "copy") == expected
    assert rig.status().volumes[0].origin == ""


def test_a_snapshot_that_is_deleted_while_it_is_attached_fails_its_reads_and_says_so(rig: Rig, base: bytes) -> None:
    rig.attach("base@s")
    rig.ask_store(DeleteSnapshot("base", "s"), Done)
    with rig.nbd("base@s") as client, pytest.raises(NbdError):
        client.read(0, BLOCK_SIZE)
    assert "deleted in the store" in rig.status().volumes[0].error
    rig.detach("base@s")
    assert rig.status().volumes == ()


@pytest.mark.parametrize("name", ["base@none", "none@s", "base@", "@s", "base@s@t"])
def test_attaching_what_is_no_snapshot_is_one_line(rig: Rig, base: bytes, name: str) -> None:
    with pytest.raises(RefusedError) as refused:
        rig.attach(name)
    assert "\n" not in str(refused.value)


def changed_extents(uri: str, snapshot: str) -> list[tuple[int, int]]:
    """Return what qemu-img finds changed since a snapshot, as offset and length: a dirty extent is no data to it."""
    where = uri.replace("nbd+unix:///", "").replace("%40", "@")
    export, _, socket = where.partition("?socket=")
    bitmap = f"x-dirty-bitmap=qemu:dirty-bitmap:{snapshot}"
    image = f"driver=nbd,export={export},server.type=unix,server.path={socket},{bitmap}"
    done = subprocess.run(
        ["qemu-img", "map", "--output=json", "--image-opts", image],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [(one["start"], one["length"]) for one in json.loads(done.stdout) if not one["data"]]


def test_a_snapshot_that_is_not_in_the_store_yet_is_attached_when_it_is(rig: Rig, base: bytes, second: Rig) -> None:
    rig.attach("base")
    rig.kill_store()
    with rig.nbd("base") as client:
        client.write(0, b"held" * 1024)
        rig.ask_cache(CreateSnapshot(("base",), "late"), SnapshotTaken)
        client.write(0, b"next" * 1024)
    rig.start_store()
    second.wait_status(lambda status: status.store_connected)
    rig.drain("base")
    second.attach("base@late")
    assert read_all(second, "base@late") == b"held" * 1024 + base[4096:]
    assert changed_extents(rig.attach("base"), "late") == [(0, 4096)]
    with pytest.raises(RefusedError, match="when it is drained"):
        second.attach("base@later")


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io (qemu-utils) is not installed")
def test_an_incremental_backup_with_qemus_tools_restores_the_volume(rig: Rig, base: bytes) -> None:
    uri = rig.attach("base")
    assert changed_extents(uri, "s") == []
    now = bytearray(base)
    with rig.nbd("base") as client:
        for at, payload in ((0, b"a" * 4096), (MIB + 100, b"b" * 70000)):
            client.write(at, payload)
            now[at : at + len(payload)] = payload
        rig.drain("base")
        client.trim(3 * MIB, MIB)
        now[3 * MIB : 4 * MIB] = bytes(MIB)
        client.write(6 * MIB, b"c" * 4096)  # not in the store yet
        now[6 * MIB : 6 * MIB + 4096] = b"c" * 4096
    extents = changed_extents(uri, "s")
    marked = bytearray(SIZE)
    for start, length in extents:
        marked[start : start + length] = b"\1" * length
    assert all(marked[at] for at in range(0, SIZE, 4096) if now[at : at + 4096] != base[at : at + 4096])
    assert sum(marked) <= MIB + 40 * 4096
    full, increment = rig.folder / "full.raw", rig.folder / "increment.qcow2"
    full.write_bytes(base)

    def tool(*words: str) -> None:
        subprocess.run(words, capture_output=True, timeout=60, check=True)

    # What is read through the overlay is copied into it; then it is put on the full backup.
    tool("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", uri, str(increment), str(SIZE))
    reads = [word for start, length in extents for word in ("-c", f"read {start} {length}")]
    tool("qemu-io", "-C", *reads, "-f", "qcow2", str(increment))
    tool("qemu-img", "rebase", "-u", "-F", "raw", "-b", str(full), str(increment))
    restored = rig.folder / "restored.raw"
    tool("qemu-img", "convert", "-O", "raw", str(increment), str(restored))
    assert restored.read_bytes() == now


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (qemu-utils) is not installed")
def test_a_snapshot_tells_what_changed_since_an_older_one(rig: Rig, base: bytes) -> None:
    rig.attach("base")
    with rig.nbd("base") as client:
        client.write(2 * MIB, b"second" * 2000)
    rig.detach("base")
    rig.ask_store(CreateSnapshot(("base",), "s2"), SnapshotTaken)
    rig.attach("base")
    with rig.nbd("base") as client:
        client.write(5 * MIB, b"third" * 2000)
    assert changed_extents(rig.attach("base@s2"), "s") == [(2 * MIB, 12288)]
    assert changed_extents(rig.attach("base"), "s2") == [(5 * MIB, 12288)]
