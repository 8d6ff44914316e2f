"""fsck finds each kind of damage that is planted, by its code and place, and changes nothing."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from clean_load import EAGER
from store_daemon import DEVICE, frame, plain
from store_twins import StoreTwin

from forebay_core.errors import CorruptionError, ForebayError, InUseError, WrongUsageError
from forebay_core.extents import Extent, pack
from forebay_core.frame import CODEC_RAW, encode_frame
from forebay_core.units import BLOCK_SIZE
from forebay_store.engine.replay import replay
from forebay_store.engine.volumes import write_store
from forebay_store.format.rows import Table
from forebay_store.service.dir_backend import DirBackend
from forebay_store.service.folder import make_folder, open_folder
from forebay_store.service.fsck import FINDINGS_MAX, CheckError, fsck
from forebay_store.service.lmdb_file import META_PAGE
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_store.service.opening import open_store
from forebay_store.service.rebuild import rebuild_index
from forebay_wire import messages


def fill(path: Path, *, wrong_block: bool = False, clean: bool = False) -> None:
    """Make a data folder with a volume, a few cuts and a part that is not committed; no daemon is needed for it."""
    twin = StoreTwin()
    created = twin.ask(messages.CreateVolume("vm", 4096 * BLOCK_SIZE))
    opened = twin.ask(messages.OpenVolume("vm", DEVICE))
    assert isinstance(created, messages.Volume) and isinstance(opened, messages.Opened)
    key = (created.row.id, opened.epoch, opened.session)
    for cut in range(1, 6):
        payload = frame(cut * 7, cut, 12)
        if wrong_block:
            payload = encode_frame(CODEC_RAW, [Extent(0, 1)], [123], plain("not 123"))
        twin.ask(messages.StagePart(*key, cut, 0, pack([Extent(2000, cut)])), payload)
        assert isinstance(twin.ask(messages.CommitCut(*key, cut, 1, cut, cut, 1)), messages.Committed)
    twin.ask(messages.StagePart(*key, 99, 0), frame(0, "unfinished"))
    if clean:
        assert twin.clean(EAGER).counts.segments_freed
    folder = make_folder(path)
    (path / "store.toml").unlink()
    folder.write_identity(b"store-of-a-test!")
    (path / "index").mkdir()
    for name, whole in twin.backend.segments.items():
        (path / "segments" / name).write_bytes(whole)
    backend, index = DirBackend(folder.segments), LmdbIndex(folder.index)
    index.update(lambda writer: write_store(writer, folder.store))
    replay(backend, index, store=folder.store)
    index.close()
    backend.close()
    folder.close()


def segments(path: Path) -> list[Path]:
    return sorted((path / "segments").iterdir())


def large(path: Path) -> list[Path]:
    return [segment for segment in segments(path) if segment.stat().st_size > 40000]


def flip(path: Path, offset: int) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset] ^= 8
    path.write_bytes(whole)


def change_index(path: Path, table: Table, key: bytes, value: bytes) -> None:
    index = LmdbIndex(path / "index")
    index.update(lambda writer: writer.put(table, key, value))
    index.close()


def fingerprint(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def frame_offset(path: Path) -> int:
    return path.read_bytes().index(b"FBFR")


DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    ("identity-bad", lambda path: (path / "store.toml").unlink()),
    ("identity-bad", lambda path: (path / "store.toml").write_text("format = 1")),
    ("unknown-file", lambda path: (path / "notes").write_text("x")),
    ("unknown-file", lambda path: (path / "segments" / "notes").write_text("x")),
    ("unknown-file", lambda path: (path / "index" / "notes").write_text("x")),
    ("leftover-file", lambda path: (path / "segments" / "00000001-0000000000ff.tmp").write_text("x")),
    ("leftover-file", lambda path: (path / "index.new").mkdir()),
    ("segment-missing", lambda path: large(path)[1].unlink()),
    ("segment-missing", lambda path: segments(path)[0].unlink()),
    ("segment-missing", lambda path: segments(path)[-1].unlink()),
    ("segment-structure", lambda path: flip(segments(path)[2], 9)),
    ("segment-structure", lambda path: flip(segments(path)[2], 70)),
    ("segment-structure", lambda path: flip(segments(path)[2], 100)),
    ("segment-structure", lambda path: flip(segments(path)[2], -1)),
    ("segment-structure", lambda path: segments(path)[2].write_bytes(segments(path)[3].read_bytes())),
    ("frame-header", lambda path: flip(large(path)[1], frame_offset(large(path)[1]) + 30)),
    ("frame-header", lambda path: flip(large(path)[1], frame_offset(large(path)[1]) + 60)),
    ("frame-stored", lambda path: flip(large(path)[1], 30000)),
    ("index-missing", lambda path: shutil.rmtree(path / "index")),
    ("index-bad", lambda path: (path / "index" / "data.mdb").write_bytes(b"x" * 20000)),
    ("index-bad", lambda path: change_index(path, Table.META, b"store", b"\1\0\0\0another-store-id")),
    ("index-bad", lambda path: change_index(path, Table.META, b"store", b"")),
    ("index-differs", lambda path: change_index(path, Table.HEAD, b"v" * 24, b"")),
    ("index-differs", lambda path: change_index(path, Table.NAMES, b"vm", b"x" * 16)),
    ("index-differs", lambda path: change_index(path, Table.STAGED, b"x", b"")),
]


@pytest.mark.parametrize(("expected", "plant"), DAMAGE, ids=[f"{at}-{code}" for at, (code, _) in enumerate(DAMAGE)])
def test_each_damage_is_found(expected: str, plant: Callable[[Path], object], tmp_path: Path) -> None:
    fill(tmp_path / "s")
    assert fsck(tmp_path / "s") == []
    plant(tmp_path / "s")
    before = fingerprint(tmp_path / "s")
    found = fsck(tmp_path / "s")
    assert expected in {one.code for one in found}
    assert {one.code for one in found} <= {expected, "index-unchecked", "segment-missing"}
    assert all(one.place or one.code == "index-bad" for one in found) and all("\n" not in one.text for one in found)
    assert fingerprint(tmp_path / "s") == before


def test_blocks_that_are_not_what_was_put_in_are_found(tmp_path: Path) -> None:
    fill(tmp_path / "s", wrong_block=True)
    assert {one.code for one in fsck(tmp_path / "s")} == {"block-plain"}


def test_an_index_that_lags_is_right(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    shutil.copytree(tmp_path / "s" / "index", tmp_path / "older")
    open_store(tmp_path / "s", now_ns=1).close()
    shutil.rmtree(tmp_path / "s" / "index")
    shutil.copytree(tmp_path / "older", tmp_path / "s" / "index")
    assert fsck(tmp_path / "s") == []
    open_store(tmp_path / "s", now_ns=1).close()
    assert fsck(tmp_path / "s") == []


def test_a_cleaned_store_is_right_and_what_is_missing_is_found(tmp_path: Path) -> None:
    fill(tmp_path / "s", clean=True)
    assert fsck(tmp_path / "s") == []
    for segment in segments(tmp_path / "s"):
        whole = segment.read_bytes()
        segment.unlink()
        assert {one.code for one in fsck(tmp_path / "s")} & {"segment-missing", "index-unchecked"}, segment.name
        segment.write_bytes(whole)
    rebuild_index(tmp_path / "s")
    assert fsck(tmp_path / "s") == []


def test_a_damaged_checkpoint_is_found(tmp_path: Path) -> None:
    fill(tmp_path / "s", clean=True)
    [segment] = [segment for segment in segments(tmp_path / "s") if b"\x28\xb5\x2f\xfd" in segment.read_bytes()][-1:]
    flip(segment, segment.read_bytes().index(b"\x28\xb5\x2f\xfd") + 20)
    assert {one.code for one in fsck(tmp_path / "s")} == {"checkpoint-chunk", "index-unchecked"}
    with pytest.raises(CorruptionError, match=segment.name):
        rebuild_index(tmp_path / "s")


def test_what_leaked_is_found_and_freed(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    leaked = segments(tmp_path / "whole")[1]
    fill(tmp_path / "s", clean=True)
    copy = tmp_path / "s" / "segments" / leaked.name
    assert not copy.exists()
    copy.write_bytes(leaked.read_bytes())
    leftover = tmp_path / "s" / "segments" / "00000001-0000000000ff.tmp"
    leftover.touch()
    assert {one.code for one in fsck(tmp_path / "s")} == {"segment-leaked", "leftover-file"}
    assert copy.exists() and leftover.exists()
    found = fsck(tmp_path / "s", repair=True)
    assert len(found) == 2 and all(one.repaired for one in found)
    assert fsck(tmp_path / "s") == []
    assert not copy.exists() and not leftover.exists()


def test_nothing_is_freed_while_something_is_wrong(tmp_path: Path) -> None:
    fill(tmp_path / "s", clean=True)
    leftover = tmp_path / "s" / "segments" / "00000001-0000000000ff.tmp"
    leftover.touch()
    flip(segments(tmp_path / "s")[0], 9)
    assert not any(one.repaired for one in fsck(tmp_path / "s", repair=True))
    assert leftover.exists()


def test_findings_are_bounded(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    for at in range(FINDINGS_MAX + 50):
        (tmp_path / "s" / "segments" / f"x{at}").touch()
    found = fsck(tmp_path / "s")
    assert len(found) == FINDINGS_MAX + 1 and found[-1].code == "more"


def cut_index(path: Path, size: int) -> None:
    os.truncate(path / "index" / "data.mdb", size)


def test_an_index_that_was_cut_short_is_found_wherever_it_was(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    whole = (tmp_path / "s" / "index" / "data.mdb").stat().st_size
    for size in (whole // 2, whole // 4, 3 * 4096, 2 * 4096, 4096, 100):
        cut_index(tmp_path / "s", size)
        assert {one.code for one in fsck(tmp_path / "s")} == {"index-bad"}, size
        with pytest.raises(CorruptionError, match="rebuild-index"):
            open_store(tmp_path / "s", now_ns=1)
    rebuild_index(tmp_path / "s")
    assert fsck(tmp_path / "s") == []


def test_an_index_whose_last_pages_were_never_written_is_whole(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    file = tmp_path / "s" / "index" / "data.mdb"
    packed = bytearray(file.read_bytes())
    for at in (0, 4096):
        fields = list(META_PAGE.unpack_from(packed, at))
        fields[6] += 3
        META_PAGE.pack_into(packed, at, *fields)
    file.write_bytes(packed)
    assert fsck(tmp_path / "s") == []
    open_store(tmp_path / "s", now_ns=1).close()


def test_a_full_scratch_folder_fails_the_check_and_accuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "s")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        with pytest.raises(CheckError, match="TMPDIR"):
            fsck(tmp_path / "s")
    finally:
        subprocess.run(["umount", small], check=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(CheckError, match="TMPDIR"):
        fsck(tmp_path / "s")
    assert not os.listdir(small)


def test_a_folder_without_a_lock_file_is_locked_all_the_same(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    (tmp_path / "s" / "lock").unlink()
    folder = open_folder(tmp_path / "s")
    for other in (fsck, rebuild_index, lambda path: open_store(path, now_ns=1)):
        with pytest.raises(InUseError):
            other(tmp_path / "s")
    folder.close()
    assert fsck(tmp_path / "s") == []


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    for check in (fsck, rebuild_index):
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises(WrongUsageError, match="holds no store"):
                check(path)


def test_a_rebuild_brings_back_a_lost_identity(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    (tmp_path / "s" / "store.toml").unlink()
    with pytest.raises(ForebayError, match="rebuild-index"):
        open_store(tmp_path / "s", now_ns=1)
    assert rebuild_index(tmp_path / "s").volumes == 1
    assert fsck(tmp_path / "s") == []
    open_store(tmp_path / "s", now_ns=1).close()


def test_a_rebuild_over_damage_names_it_and_leaves_the_old_index(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    flip(segments(tmp_path / "s")[2], 100)
    before = fingerprint(tmp_path / "s" / "index")
    with pytest.raises(CorruptionError, match=segments(tmp_path / "s")[2].name):
        rebuild_index(tmp_path / "s")
    assert fingerprint(tmp_path / "s" / "index") == before


def test_a_rebuild_finds_damaged_data_bearable(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    flip(large(tmp_path / "s")[1], 30000)
    assert rebuild_index(tmp_path / "s").volumes == 1
    assert {one.code for one in fsck(tmp_path / "s")} == {"frame-stored"}
