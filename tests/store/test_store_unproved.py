"""An index whose damage ends every process that reads it: the third start says so instead of dying of it again."""

import asyncio
import struct
from pathlib import Path

import pytest
from store_daemon import StoreDaemon, Writer, create, frame, run

from forebay_store.service.condemned import why_condemned
from forebay_store.service.fsck import fsck
from forebay_store.service.rebuild import rebuild_index
from forebay_store.service.unproved import STARTS_UNPROVED_MAX, UNPROVED_NAME, death_of, look_apart, note_start
from forebay_wire import messages

_PAGE = 4096
_BRANCH = 1
_ENTRIES = 300


async def fill(daemon: StoreDaemon) -> None:
    """Make a volume whose head takes many pages."""
    async with daemon.client() as client:
        await create(client, "vm", 2 * _ENTRIES)
        writer = await Writer.open(client, "vm")
        await writer.stage(0, [frame(2 * i, i) for i in range(_ENTRIES)])
        await writer.commit(1)


def break_branches(index: Path) -> None:
    """Let each branch page of LMDB's file name itself as its own second child."""
    file = index / "data.mdb"
    content = bytearray(file.read_bytes())
    broken = 0
    for at in range(2 * _PAGE, len(content), _PAGE):
        number, _, flags, _, _, _, second = struct.unpack_from("<QHHHHHH", content, at)
        if flags == _BRANCH and number == at // _PAGE:
            struct.pack_into("<HHH", content, at + second, number & 0xFFFF, number >> 16, 0)
            broken += 1
    assert broken
    file.write_bytes(content)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The folder of a store whose index is broken so."""
    data = tmp_path / "s"
    with StoreDaemon(data) as daemon:
        run(fill(daemon))
    break_branches(data / "index")
    return data


async def proved(data: Path) -> None:
    while (data / "index" / UNPROVED_NAME).exists():
        await asyncio.sleep(0.01)


def test_a_start_counts_until_the_index_was_found_whole(tmp_path: Path) -> None:
    data = tmp_path / "s"
    with StoreDaemon(data):
        run(proved(data))
    assert [note_start(data / "index") for _ in range(4)] == [0, 1, 2, 2]
    assert not look_apart(data / "index")
    with StoreDaemon(data):  # looked at apart, and served
        run(proved(data))


def test_the_third_start_says_that_the_index_kills_its_readers(broken: Path) -> None:
    said = []
    for _ in range(STARTS_UNPROVED_MAX + 1):
        daemon = StoreDaemon(broken)
        if daemon.address is not None:
            daemon.process.wait(30)  # the audit dies
        said.append(daemon.end())
    assert daemon.process.returncode > 0
    assert "dies of signal 6" in said[-1] and f"rebuild-index --data {broken}" in said[-1]
    assert said[-1].count("\n") == 1
    assert "dies of signal 6" in why_condemned(broken / "index")


def test_fsck_outlives_such_an_index_and_a_rebuilt_one_is_whole(broken: Path) -> None:
    found = [one for one in fsck(broken) if one.code == "index-bad"]
    assert found and "dies of signal 6" in found[0].text
    rebuild_index(broken)
    with StoreDaemon(broken) as daemon:

        async def test() -> None:
            async with daemon.client() as client:
                row = (await client.ask(messages.GetVolume("vm"), messages.Volume))[0].row
                assert row.data_blocks == _ENTRIES

        run(test())


@pytest.mark.parametrize(
    ("number", "is_damage"), [(9, False), (15, False), (2, False), (11, True), (7, True), (6, True)]
)
def test_only_a_crash_of_the_reader_is_damage(tmp_path: Path, number: int, is_damage: bool) -> None:
    """A reader that the kernel ends for its memory, or somebody with the service, has met nothing."""
    assert bool(death_of(tmp_path, -number)) is is_damage


def test_a_count_that_nobody_can_read_or_write_keeps_no_store_from_starting(tmp_path: Path) -> None:
    data = tmp_path / "s"
    with StoreDaemon(data):
        pass
    (data / "index" / UNPROVED_NAME).write_bytes(b"\xff many")
    assert note_start(data / "index") == 0
    (data / "index" / UNPROVED_NAME).unlink()
    (data / "index" / UNPROVED_NAME).mkdir()
    with StoreDaemon(data):
        pass
