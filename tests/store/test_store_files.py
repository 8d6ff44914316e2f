"""Segments as files, the index in LMDB and the data folder: what the ports promise, on a real disk."""

import errno
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_twins import DictIndex, MemoryBackend

from forebay_core.errors import (
    CorruptionError,
    ForebayError,
    InUseError,
    NoSpaceError,
    UnreadableError,
    WrongUsageError,
)
from forebay_store.engine.ports import (
    BackendError,
    Index,
    NothingKeptError,
    SegmentBackend,
    SegmentExistsError,
    SegmentMissingError,
)
from forebay_store.format.rows import STORE_KEY, STORE_MARK, Table
from forebay_store.format.segment import SegmentName
from forebay_store.service.dir_backend import DirBackend
from forebay_store.service.folder import make_folder
from forebay_store.service.lmdb_index import LmdbIndex
from forebay_store.service.open_files import OpenFiles
from forebay_store.service.opening import open_store
from forebay_store.service.rebuild import rebuild_index

NAME = SegmentName(1, 5).text
OTHER = SegmentName(1, 6).text


@pytest.fixture(params=["dir", "memory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SegmentBackend]:
    if request.param == "memory":
        yield MemoryBackend()
        return
    made = DirBackend(tmp_path)
    yield made
    made.close()


@pytest.fixture(params=["lmdb", "dict"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Index]:
    if request.param == "dict":
        yield DictIndex()
        return
    made = LmdbIndex(tmp_path)
    yield made
    made.close()


def test_a_segment_reads_back_and_never_changes(backend: SegmentBackend) -> None:
    backend.create(OTHER, [b"x"])
    backend.create(NAME, [b"one", memoryview(b"two"), b"", bytearray(b"three")])
    assert backend.list() == [NAME, OTHER]
    assert bytes(backend.read(NAME)) == b"onetwothree"
    assert bytes(backend.read_range(NAME, 3, 3)) == b"two"
    assert backend.stat(NAME) == 11
    with pytest.raises(SegmentExistsError):
        backend.create(NAME, [b"other"])
    assert bytes(backend.read(NAME)) == b"onetwothree"


def test_what_is_not_there_is_named(backend: SegmentBackend) -> None:
    backend.create(NAME, [b"12345"])
    with pytest.raises(SegmentMissingError):
        backend.read_range(OTHER, 0, 1)
    with pytest.raises(SegmentMissingError):
        backend.stat(OTHER)
    with pytest.raises(CorruptionError, match=NAME):
        backend.read_range(NAME, 3, 3)
    backend.delete([NAME, OTHER])
    assert backend.list() == []
    with pytest.raises(SegmentMissingError):
        backend.read(NAME)


def test_what_the_disk_can_not_read_is_damage_and_want_of_files_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = DirBackend(tmp_path)
    backend.create(NAME, [b"12345"])
    for number, expected in ((errno.EIO, UnreadableError), (errno.EMFILE, BackendError)):

        def fail(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(expected, match=NAME):
            backend.read(NAME)
    backend.close()


def test_what_bears_the_name_of_a_segment_and_is_none_hangs_nobody(tmp_path: Path) -> None:
    backend = DirBackend(tmp_path)
    backend.create(NAME, [b"12345"])
    os.mkfifo(tmp_path / OTHER)
    assert backend.list() == [NAME]
    backend.close()


def test_many_small_buffers_are_gathered(tmp_path: Path) -> None:
    backend = DirBackend(tmp_path)
    backend.create(NAME, [bytes([at % 256]) * (at % 7) for at in range(3000)])
    assert bytes(backend.read(NAME)) == b"".join(bytes([at % 256]) * (at % 7) for at in range(3000))
    assert bytes(backend.read_now(NAME, 0, 10) or b"") in (b"", bytes(backend.read_range(NAME, 0, 10)))
    assert backend.read_now(OTHER, 0, 10) is None
    backend.close()


GATHERED = 4 << 20


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, GATHERED - 1, GATHERED, GATHERED + 1, 2 * GATHERED + 4097])
def test_a_segment_of_any_size_comes_back_exactly(
    direct: bool, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(os, "open", open_without_direct)
    content = random.Random(size).randbytes(size)
    backend = DirBackend(tmp_path)
    backend.create(NAME, [content[: size // 3], content[size // 3 :]])
    assert bytes(backend.read(NAME)) == content
    assert backend.stat(NAME) == size
    backend.close()


real_open = os.open


def open_without_direct(path: str | Path, flags: int, mode: int = 0o777) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real_open(path, flags, mode)


def test_leftovers_of_a_crash_are_removed_at_start_and_are_no_segments(tmp_path: Path) -> None:
    (tmp_path / (NAME + ".tmp")).write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    backend = DirBackend(tmp_path)
    assert backend.list() == []
    backend.recover()
    assert sorted(os.listdir(tmp_path)) == ["notes.txt"]
    backend.close()


def fail_at(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "link"])
def test_a_full_disk_leaves_nothing_and_creating_goes_on(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = DirBackend(tmp_path)
    with monkeypatch.context() as patched:
        fail_at(patched, call, errno.ENOSPC)
        with pytest.raises(NoSpaceError):
            backend.create(NAME, [b"12345"])
    assert os.listdir(tmp_path) == []
    backend.create(NAME, [b"12345"])
    backend.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_segment_that_could_not_be_opened_is_repeated(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = DirBackend(tmp_path)
    with monkeypatch.context() as patched:
        fail_at(patched, "open", number)
        with pytest.raises(NothingKeptError, match="repeat"):
            backend.create(NAME, [b"12345"])
    assert os.listdir(tmp_path) == []
    backend.create(NAME, [b"12345"])
    backend.close()


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
def test_want_of_memory_behind_the_opening_is_as_bad_as_a_broken_disk(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = DirBackend(tmp_path)
    with monkeypatch.context() as patched:
        fail_at(patched, "fdatasync", number)
        with pytest.raises(BackendError):
            backend.create(NAME, [b"12345"])
    with pytest.raises(BackendError):
        backend.create(NAME, [b"12345"])
    backend.close()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "link", "fsync"])
def test_after_a_failed_sync_nothing_is_created_until_it_is_opened_anew(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = DirBackend(tmp_path)
    with monkeypatch.context() as patched:
        fail_at(patched, call, errno.EIO)
        with pytest.raises(BackendError, match="Input/output error"):
            backend.create(NAME, [b"12345"])
    with pytest.raises(BackendError, match="Input/output error"):
        backend.create(OTHER, [b"12345"])
    assert bytes(backend.read(NAME)) == b"12345" if call == "fsync" else backend.list() == []
    backend.close()
    again = DirBackend(tmp_path)
    again.create(OTHER, [b"12345"])
    again.close()


def test_open_files_are_bounded_and_never_closed_under_a_reader(tmp_path: Path) -> None:
    for at in range(20):
        (tmp_path / str(at)).write_bytes(bytes([at]))
    files = OpenFiles(tmp_path, files_max=3)
    before = len(os.listdir("/proc/self/fd"))
    with files.use("0") as held:
        for at in range(20):
            with files.use(str(at)) as fd:
                assert os.pread(fd, 1, 0) == bytes([at])
        files.forget("0")
        assert os.pread(held, 1, 0) == b"\0"
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_open_files_serve_many_threads(tmp_path: Path) -> None:
    for at in range(8):
        (tmp_path / str(at)).write_bytes(bytes([at]))
    files = OpenFiles(tmp_path, files_max=2)
    wrong: list[int] = []

    def read() -> None:
        for turn in range(300):
            with files.use(str(turn % 8)) as fd:
                if os.pread(fd, 1, 0) != bytes([turn % 8]):
                    wrong.append(turn)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    files.close()
    assert not wrong


def test_rows_are_found_in_the_order_of_their_keys(index: Index) -> None:
    keys = [b"b", b"a", b"a\0", b"\xff", b"\x01"]
    index.update(lambda writer: [writer.put(Table.NAMES, key, key * 2) for key in keys])
    with index.view() as reader:
        assert [key for key, _ in reader.scan(Table.NAMES, b"")] == sorted(keys)
        assert next(reader.scan(Table.NAMES, b"aa")) == (b"b", b"bb")
        assert list(reader.scan(Table.NAMES, b"\xff\xff")) == []
        assert reader.before(Table.NAMES, b"b") == (b"a\0", b"a\0a\0")
        assert reader.before(Table.NAMES, b"\xff\xff") == (b"\xff", b"\xff\xff")
        assert reader.before(Table.NAMES, b"\x01") is None
        assert reader.get(Table.NAMES, b"c") is None
        assert reader.before(Table.HEAD, b"x") is None


def test_a_transaction_that_fails_changes_nothing(index: Index) -> None:
    def change(writer: object) -> None:
        writer.put(Table.NAMES, b"a", b"1")  # type: ignore[attr-defined]
        raise ForebayError("no")

    with pytest.raises(ForebayError, match="no"):
        index.update(change)
    with index.view() as reader:
        assert reader.get(Table.NAMES, b"a") is None


def test_a_view_does_not_see_later_changes(tmp_path: Path) -> None:
    index = LmdbIndex(tmp_path)
    with index.view() as reader:
        thread = threading.Thread(target=index.update, args=(lambda writer: writer.put(Table.NAMES, b"a", b"1"),))
        thread.start()
        thread.join(60)
        assert reader.get(Table.NAMES, b"a") is None
    with index.view() as reader:
        assert reader.get(Table.NAMES, b"a") == b"1"
    index.close()


def test_the_index_grows_beyond_its_first_size(tmp_path: Path) -> None:
    index = LmdbIndex(tmp_path, size_start=1 << 18)
    for at in range(40):
        index.update(lambda writer, at=at: writer.put(Table.STAGED, at.to_bytes(4, "big"), bytes(50_000)))  # type: ignore[misc]
    index.close()
    index = LmdbIndex(tmp_path, size_start=1 << 18)
    for at in range(40, 60):
        index.update(lambda writer, at=at: writer.put(Table.STAGED, at.to_bytes(4, "big"), bytes(50_000)))  # type: ignore[misc]
    with index.view() as reader:
        assert sum(1 for _ in reader.scan(Table.STAGED, b"")) == 60
    index.close()


def test_an_index_that_became_small_gives_its_room_back_and_goes_on(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "index", tmp_path / "index.new"
    folder.mkdir()
    index = LmdbIndex(folder)
    keys = [at.to_bytes(4, "big") for at in range(2000)]
    index.update(lambda writer: writer.put_many(Table.STAGED, [(key, bytes(1000)) for key in keys]))
    assert not index.shrink(scratch)
    index.update(lambda writer: [writer.delete(Table.STAGED, key) for key in keys[1:]])
    large = (folder / "data.mdb").stat().st_size
    assert index.shrink(scratch)
    assert (folder / "data.mdb").stat().st_size < large // 10
    assert not scratch.exists()
    assert not index.shrink(scratch)
    index.update(lambda writer: writer.put(Table.NAMES, b"a", b"1"))
    index.close()
    index = LmdbIndex(folder)
    with index.view() as reader:
        assert [key for key, _ in reader.scan(Table.STAGED, b"")] == keys[:1]
        assert reader.get(Table.NAMES, b"a") == b"1"
    index.close()


def test_an_index_with_a_view_open_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay_store.service.lmdb_index.SHRINK_WAIT_S", 0.01)
    folder, scratch = tmp_path / "index", tmp_path / "index.new"
    folder.mkdir()
    index = LmdbIndex(folder)
    index.update(lambda writer: writer.put(Table.STAGED, b"a", bytes(1 << 20)))
    index.update(lambda writer: writer.delete(Table.STAGED, b"a"))
    with index.view() as reader, ThreadPoolExecutor(1) as beside:
        assert not beside.submit(index.shrink, scratch).result(60)
        assert reader.get(Table.STAGED, b"a") is None
    assert index.shrink(scratch)
    index.close()


def test_something_else_in_place_of_the_index_is_said(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"no index at all" * 1000)
    with pytest.raises(CorruptionError, match="rebuild-index"):
        LmdbIndex(tmp_path)


def test_a_folder_is_made_once_and_keeps_its_identity(tmp_path: Path) -> None:
    path = tmp_path / "a" / "store"
    folder = make_folder(path)
    store = folder.store
    with pytest.raises(InUseError, match="in use by another process"):
        make_folder(path)
    folder.close()
    again = make_folder(path)
    assert again.store == store
    again.close()


def test_a_half_made_folder_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    (tmp_path / "lock").touch()
    (tmp_path / "store.toml.new").write_text("format")
    open_store(tmp_path, now_ns=1).close()
    open_store(tmp_path, now_ns=2).close()


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(WrongUsageError, match=r"holiday\.jpg"):
        make_folder(tmp_path)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


@pytest.mark.parametrize(
    "text", ["", "format = 2\nstore = 'x'", "format = 1", "format = 1\nstore = 7", "\0", "a" * 9000]
)
def test_a_damaged_identity_is_named(text: str, tmp_path: Path) -> None:
    open_store(tmp_path, now_ns=1).close()
    (tmp_path / "store.toml").write_text(text)
    with pytest.raises(CorruptionError, match=r"store\.toml"):
        open_store(tmp_path, now_ns=1)


def test_a_missing_index_is_not_made_silently(tmp_path: Path) -> None:
    open_store(tmp_path, now_ns=1).close()
    for remove in (lambda: shutil.rmtree(tmp_path / "index"), lambda: (tmp_path / "index").mkdir()):
        remove()
        with pytest.raises(ForebayError, match="forebay store rebuild-index --data"):
            open_store(tmp_path, now_ns=1)


def test_an_index_of_the_format_before_is_refused_and_can_be_made_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", now_ns=1)
    mark = STORE_MARK.pack(1, store.folder.store)
    store.index.update(lambda writer: writer.put(Table.META, STORE_KEY, mark))
    store.close()
    with pytest.raises(ForebayError, match="index is of format 1, this store needs 2; run store rebuild-index"):
        open_store(tmp_path / "s", now_ns=2)
    rebuild_index(tmp_path / "s")
    open_store(tmp_path / "s", now_ns=3).close()


def test_an_index_of_another_store_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        open_store(tmp_path / name, now_ns=1).close()
    shutil.rmtree(tmp_path / "a" / "index")
    shutil.copytree(tmp_path / "b" / "index", tmp_path / "a" / "index")
    with pytest.raises(ForebayError, match="not of this store; run: forebay store rebuild-index"):
        open_store(tmp_path / "a", now_ns=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", path], check=True)


def test_the_index_on_a_full_disk_says_no_space_and_stays_whole(
    small_disk: Path, request: pytest.FixtureRequest
) -> None:
    (small_disk / "index").mkdir()
    index = LmdbIndex(small_disk / "index")
    request.addfinalizer(index.close)
    index.update(lambda writer: writer.put(Table.NAMES, b"kept", b"1"))
    with pytest.raises(NoSpaceError):
        index.update(lambda writer: writer.put(Table.STAGED, b"big", bytes(8 << 20)))
    with index.view() as reader:
        assert reader.get(Table.NAMES, b"kept") == b"1"
        assert reader.get(Table.STAGED, b"big") is None
    index.update(lambda writer: writer.put(Table.NAMES, b"later", b"1"))


def test_a_segment_on_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    backend = DirBackend(small_disk)
    backend.create(NAME, [bytes(1 << 20)])
    with pytest.raises(NoSpaceError):
        backend.create(OTHER, [bytes(1 << 20)] * 8)
    assert os.listdir(small_disk) == [NAME]
    backend.create(OTHER, [bytes(1 << 20)])
    backend.close()


def test_an_index_is_not_made_of_no_segments(tmp_path: Path) -> None:
    open_store(tmp_path / "s", now_ns=1).close()
    for segment in (tmp_path / "s" / "segments").iterdir():
        segment.unlink()
    before = (tmp_path / "s" / "index" / "data.mdb").read_bytes()
    with pytest.raises(ForebayError, match="holds no segment"):
        rebuild_index(tmp_path / "s")
    assert (tmp_path / "s" / "index" / "data.mdb").read_bytes() == before
