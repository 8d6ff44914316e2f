"""Who is asked to change an attached volume: the daemon here, the store, or the daemon that the store names."""

from pathlib import Path

import pytest
from fake_peer import Answer, FakePeer, Serve
from store_rig import Forebay

from forebay_core.units import GIB
from forebay_wire.messages import (
    VOLUME_IN_USE,
    AnyMessage,
    CacheStatus,
    CreateSnapshot,
    Detach,
    Done,
    Drain,
    Failed,
    GetCacheStatus,
    GetVolume,
    ResizeVolume,
    SnapshotRow,
    SnapshotTaken,
    Volume,
    VolumeRow,
    VolumeStatus,
)

DEVICE = bytes(range(16))
IN_USE = Failed(VOLUME_IN_USE, f"volume v is in use on device {DEVICE.hex()}")


def row(*, writer: bytes = b"", control: str = "", size: int = GIB) -> VolumeRow:
    return VolumeRow(b"V" * 16, "v", size, 3, 7, 0, 0, writer, 0, 0, control=control)


def snapshot(*, pending: bool) -> SnapshotTaken:
    return SnapshotTaken(SnapshotRow(b"S" * 16, b"V" * 16, "v", "s", 9, GIB, 1, pending=pending))


def status(*volumes: VolumeStatus) -> CacheStatus:
    return CacheStatus("d", 1, 2, 3, 4, 5, 6, 2, 8, 9, 3, 11, "s:1", True, volumes)


def attached(name: str, *pending: str) -> VolumeStatus:
    return VolumeStatus(name, GIB, "nbd://", False, 1, 2, 3, 4, 5, 6, 7, 8, pending_snapshots=pending)


def daemon(*names: str) -> Answer:
    def answer(message: AnyMessage) -> AnyMessage | None:
        match message:
            case GetCacheStatus():
                return status(*map(attached, names))
            case CreateSnapshot():
                return snapshot(pending=not message.stored)
            case ResizeVolume():
                return Volume(row(size=message.size))
            case Drain() | Detach():
                return Done() if message.name in names else Failed("not-attached", f"{message.name} is not attached")
        return None

    return answer


def store(*, held: bool, control: str = "") -> Answer:
    def answer(message: AnyMessage) -> AnyMessage | None:
        match message:
            case GetVolume():
                return Volume(row(writer=DEVICE if held else b"", control=control))
            case CreateSnapshot():
                return IN_USE if held else snapshot(pending=False)
            case ResizeVolume():
                return IN_USE if held else Volume(row(size=message.size))
        return None

    return answer


def kinds(peer: FakePeer) -> list[type[AnyMessage]]:
    return [type(message) for message in peer.asked]


def test_the_daemon_here_is_asked_if_the_volume_is_attached_there(
    tmp_path: Path, serve: Serve, forebay: Forebay
) -> None:
    here, far = serve(daemon("u", "v"), run_dir=tmp_path), serve(store(held=True))
    where = ("--run-dir", tmp_path, "--store", far.address)
    taken = forebay("snapshot", "create", "v@s", *where)
    assert (taken.code, taken.out, taken.err) == (0, "snapshot v@s taken; it is on its way to the store\n", "")
    assert here.asked[-1] == CreateSnapshot(("v",), "s", False)
    assert forebay("snapshot", "create", "v@s", "--wait", *where).out == "snapshot v@s taken\n"
    assert here.asked[-1] == CreateSnapshot(("v",), "s", True)
    resized = forebay("volume", "resize", "v", "2GiB", *where)
    assert resized.out == "volume v has 2 GiB now; NBD clients that are connected see it after they reconnect\n"
    assert far.asked == []


def test_the_store_is_asked_if_the_volume_is_not_attached_here(tmp_path: Path, serve: Serve, forebay: Forebay) -> None:
    here, far = serve(daemon("u"), run_dir=tmp_path), serve(store(held=False))
    where = ("--run-dir", tmp_path, "--store", far.address)
    assert forebay("snapshot", "create", "v@s", *where).out == "snapshot v@s taken\n"
    assert forebay("volume", "resize", "v", "1MiB", "--force", *where).out == "volume v has 1 MiB now\n"
    assert far.asked == [CreateSnapshot(("v",), "s", False), ResizeVolume("v", 1 << 20, True)]
    assert set(kinds(here)) == {GetCacheStatus}
    assert forebay("snapshot", "create", "v@s", "--store", far.address).code == 0


def test_a_daemon_that_is_gone_does_not_keep_the_store_from_being_asked(
    tmp_path: Path, serve: Serve, forebay: Forebay
) -> None:
    far = serve(store(held=False))
    assert forebay("snapshot", "create", "v@s", "--run-dir", tmp_path, "--store", far.address).code == 0


def test_the_daemon_that_the_store_names_is_asked_where_the_volume_is_attached(serve: Serve, forebay: Forebay) -> None:
    there = serve(daemon("v"))
    far = serve(store(held=True, control=there.address))
    taken = forebay("snapshot", "create", "v@s", "--store", far.address)
    assert (taken.code, taken.out) == (0, "snapshot v@s taken; it is on its way to the store\n")
    assert kinds(there) == [CreateSnapshot]
    assert "after they reconnect" in forebay("volume", "resize", "v", "2GiB", "--store", far.address).out


@pytest.mark.parametrize(
    ("control", "part"),
    [
        ("", f"volume v is attached on device {DEVICE.hex()}, whose daemon takes no commands over the network"),
        ("127.0.0.1:1", "attached by the cache daemon at 127.0.0.1:1, which does not answer"),
    ],
)
def test_a_holder_that_can_not_be_asked_is_named(control: str, part: str, serve: Serve, forebay: Forebay) -> None:
    far = serve(store(held=True, control=control))
    for words in (["snapshot", "create", "v@s"], ["volume", "resize", "v", "2GiB"]):
        refused = forebay(*words, "--store", far.address)
        assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
        assert part in refused.err and "run this on its host with --run-dir DIR" in refused.err


def test_without_a_store_the_volume_must_be_attached_here(tmp_path: Path, serve: Serve, forebay: Forebay) -> None:
    refused = forebay("snapshot", "create", "v@s", "--run-dir", tmp_path)
    assert (refused.code, "no cache daemon serves" in refused.err) == (1, True)
    serve(daemon("u"), run_dir=tmp_path)
    refused = forebay("snapshot", "create", "v@s", "--run-dir", tmp_path)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert f"volume v is not attached in {tmp_path}; name its store as well" in refused.err
    assert forebay("snapshot", "create", "v@s").code == 2


def test_other_refusals_of_the_store_are_passed_on(serve: Serve, forebay: Forebay) -> None:
    far = serve(lambda _message: Failed("snapshot-exists", "v has a snapshot s"))
    refused = forebay("snapshot", "create", "v@s", "--store", far.address)
    assert (refused.code, refused.err) == (1, "forebay: snapshot create: v has a snapshot s\n")
    assert kinds(far) == [CreateSnapshot]


def test_a_drain_goes_where_the_volume_is_attached(tmp_path: Path, serve: Serve, forebay: Forebay) -> None:
    here, there = serve(daemon("u"), run_dir=tmp_path), serve(daemon("v"))
    far = serve(store(held=True, control=there.address))
    assert forebay("drain", "u", "--run-dir", tmp_path).code == 0
    assert forebay("drain", "u", "--run-dir", tmp_path, "--store", far.address).code == 0
    assert (kinds(here).count(Drain), far.asked) == (2, [])
    assert forebay("drain", "v", "--run-dir", tmp_path, "--store", far.address).code == 0
    assert forebay("detach", "v", "--store", far.address).code == 0
    assert there.asked == [Drain("v"), Detach("v", False)]


def test_a_drain_that_nobody_can_do_says_why(tmp_path: Path, serve: Serve, forebay: Forebay) -> None:
    serve(daemon("u"), run_dir=tmp_path)
    free, silent = serve(store(held=False)), serve(store(held=True))
    for words, part in (
        (["--run-dir", tmp_path], "v is not attached"),
        (["--run-dir", tmp_path, "--store", silent.address], "v is not attached"),
        (["--run-dir", tmp_path, "--store", "127.0.0.1:1"], "v is not attached"),
        (["--store", free.address], "volume v is not attached anywhere"),
        (["--store", silent.address], "takes no commands over the network"),
        (["--store", "127.0.0.1:1"], "no store answers"),
    ):
        refused = forebay("drain", "v", *words)
        assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
        assert part in refused.err
    assert forebay("drain", "v").code == 2
