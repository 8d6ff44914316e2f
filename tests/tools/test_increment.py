"""What changed becomes an image: nothing of it is missing, and nothing is called a hole that is not one."""

import asyncio
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_peer import fake_peer
from store_rig import Forebay

from forebay_core.extents import Extent, unpack
from forebay_core.frame import FrameBuilder
from forebay_core.units import BLOCK_SIZE, Buffer
from forebay_tools.increment import Change, by_clusters
from forebay_tools.qcow2_map import held_runs
from forebay_wire.messages import (
    HOLE_FRAME,
    ORIGIN_FRAME,
    PIECE_DTYPE,
    AnyMessage,
    Blocks,
    Changed,
    Changes,
    GetSnapshot,
    GetVolume,
    MapExtents,
    Mapped,
    Read,
    Snapshot,
    SnapshotRow,
    Volume,
    VolumeRow,
)

VOLUME, BASE = b"V" * 16, b"B" * 16
PAGE_PIECES = 3


def clusters(changes: Sequence[Change], cluster: int, end: int) -> list[Change]:
    async def run() -> list[Change]:
        async def given() -> AsyncIterator[Change]:
            for change in changes:
                yield change

        return [change async for change in by_clusters(given(), cluster, end)]

    return asyncio.run(run())


def expected(changes: Sequence[Change], cluster: int, end: int) -> list[Change]:
    """Say the same block by block."""
    holes = {lba: hole for extent, hole in changes for lba in range(extent.start, extent.end)}
    found: list[Change] = []
    for start in range(0, end, cluster):
        count = min(cluster, end - start)
        kinds = [holes.get(lba) for lba in range(start, start + count)]
        if all(kind is None for kind in kinds):
            continue
        hole = all(kinds)
        if found and found[-1].hole == hole and found[-1].extent.end == start:
            count += found.pop().extent.count
            start = start + min(cluster, end - start) - count
        found.append(Change(Extent(start, count), hole))
    return found


@pytest.mark.parametrize("cluster", [1, 2, 16])
def test_changes_are_widened_to_clusters(cluster: int) -> None:
    chance = random.Random(cluster)
    for _ in range(500):
        end = chance.randrange(1, 120)
        changes, at = [], chance.randrange(4)
        while at < end:
            count = min(chance.choice([1, 1, 3, 16, 40]), end - at)
            changes.append(Change(Extent(at, count), chance.random() < 0.6))
            at += count + chance.choice([0, 0, 1, 5, 30])
        assert clusters(changes, cluster, end) == expected(changes, cluster, end)


def test_a_cluster_that_is_a_hole_only_in_part_is_data() -> None:
    changes = [Change(Extent(0, 8), True), Change(Extent(9, 7), True), Change(Extent(16, 20), True)]
    assert clusters(changes, 16, 36) == [Change(Extent(0, 16), False), Change(Extent(16, 20), True)]


def test_no_changes_are_no_clusters() -> None:
    assert clusters([], 16, 100) == []


class CloneStore:
    """A store with a clone: some blocks are its own or holes, others read as the origin's, which has the even ones."""

    def __init__(self, blocks: int, changes: Sequence[tuple[Extent, int]]) -> None:
        self._blocks = blocks
        self._changes = changes
        self.version = 20
        self.page_version = 20
        self.base_version = 10

    def plain(self, lba: int) -> bytes | None:
        """Return the bytes of a block, None for a hole."""
        kind = next((kind for extent, kind in self._changes if extent.start <= lba < extent.end), ORIGIN_FRAME)
        if kind == HOLE_FRAME or (kind == ORIGIN_FRAME and lba % 2):
            return None
        return (b"origin %d" if kind == ORIGIN_FRAME else b"own %d").replace(b"%d", b"%d" % lba).ljust(BLOCK_SIZE, b".")

    def __call__(self, message: AnyMessage) -> AnyMessage | tuple[AnyMessage, Sequence[Buffer]] | None:
        match message:
            case GetVolume():
                return Volume(VolumeRow(VOLUME, "v", self._blocks * BLOCK_SIZE, 1, self.version, 0, 0, b"", 0, 0))
            case GetSnapshot():
                return Snapshot(SnapshotRow(BASE, VOLUME, "v", "s", self.base_version, BLOCK_SIZE, 1))
            case Changed():
                return self._changed(message)
            case MapExtents():
                assert message.through
                rows = [
                    (lba, 1, 0 if self.plain(lba) else HOLE_FRAME, 0, 1)
                    for lba in range(message.start, message.start + message.count)
                ]
                return Mapped(np.array(rows, PIECE_DTYPE).tobytes())
            case Read():
                assert message.through
                return self._read(
                    [lba for one in unpack(message.extents, count_max=240) for lba in range(*_bounds(one))]
                )
        return None

    def _changed(self, message: Changed) -> Changes:
        assert (message.volume, message.since_snapshot) == (VOLUME, BASE)
        page = [(extent, kind) for extent, kind in self._changes if extent.start >= message.start][:PAGE_PIECES]
        more = len(page) == PAGE_PIECES
        rows = [(extent.start, extent.count, kind, 0, 15) for extent, kind in page]
        return Changes(np.array(rows, PIECE_DTYPE).tobytes(), page[-1][0].end if more else -1, self.page_version)

    def _read(self, lbas: Sequence[int]) -> tuple[Blocks, Sequence[Buffer]]:
        rows, frames = [], []
        for lba in lbas:
            plain = self.plain(lba)
            rows.append((lba, 1, HOLE_FRAME if plain is None else len(frames), 0, 15))
            if plain is not None:
                frames.append(FrameBuilder().build([Extent(lba, 1)], plain))
        return Blocks(np.array(rows, PIECE_DTYPE).tobytes()), frames


def _bounds(extent: Extent) -> tuple[int, int]:
    return extent.start, extent.end


def random_changes(chance: random.Random, blocks: int) -> list[tuple[Extent, int]]:
    changes, at = [], 0
    while at < blocks + 50:  # some lie behind the end: the volume has become smaller since
        count = chance.choice([1, 1, 2, 9, 300])
        changes.append((Extent(at, count), chance.choice([0, HOLE_FRAME, ORIGIN_FRAME])))
        at += count + chance.choice([0, 0, 3, 100])
    return changes


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
@pytest.mark.parametrize("seed", range(5))
def test_an_increment_holds_each_changed_block_and_no_other(tmp_path: Path, forebay: Forebay, seed: int) -> None:
    chance = random.Random(seed)
    blocks = chance.randrange(800, 1500)
    changes = random_changes(chance, blocks)
    fake = CloneStore(blocks, changes)
    with fake_peer(fake) as peer:
        done = forebay("volume", "export", "v", "--since", "s", tmp_path / "inc", "--store", peer.address)
    assert (done.code, done.err) == (0, "")
    with (tmp_path / "inc").open("rb") as file:
        runs = list(held_runs(file.fileno(), "inc"))
    zeros = {lba: zero for extent, zero in runs for lba in range(extent.start, extent.end)}
    changed = {lba for extent, _ in changes for lba in range(extent.start, extent.end) if lba < blocks}
    assert zeros == {lba: fake.plain(lba) is None for lba in changed}
    words = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", tmp_path / "inc", tmp_path / "raw"]
    subprocess.run(words, check=True)
    expected = [(fake.plain(lba) if lba in changed else None) or bytes(BLOCK_SIZE) for lba in range(blocks)]
    assert (tmp_path / "raw").read_bytes() == b"".join(expected)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [("page_version", 21, "was changed while it was exported"), ("base_version", 21, "v@s is newer than v")],
)
def test_an_increment_of_two_states_or_backwards_makes_no_file(
    tmp_path: Path, forebay: Forebay, field: str, value: int, part: str
) -> None:
    fake = CloneStore(100, [(Extent(3, 4), 0)])
    setattr(fake, field, value)
    with fake_peer(fake) as peer:
        failed = forebay("volume", "export", "v", "--since", "s", tmp_path / "inc", "--store", peer.address)
    assert (failed.code, failed.err.count("\n"), list(tmp_path.iterdir())) == (1, 1, [])
    assert part in failed.err


def test_an_export_reads_a_clone_through_to_its_origin(tmp_path: Path, forebay: Forebay) -> None:
    fake = CloneStore(500, [(Extent(3, 4), 0), (Extent(100, 30), HOLE_FRAME)])
    with fake_peer(fake) as peer:
        assert forebay("volume", "export", "v", tmp_path / "out", "--store", peer.address).code == 0
    whole = b"".join(fake.plain(lba) or bytes(BLOCK_SIZE) for lba in range(500))
    assert (tmp_path / "out").read_bytes() == whole
