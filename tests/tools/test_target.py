"""Where an export goes: whole and durable under its name, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from forebay_core.errors import ForebayError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, MIB
from forebay_tools.target import open_target


def test_a_new_file_is_sparse_and_has_its_bytes(tmp_path: Path) -> None:
    with open_target(tmp_path / "out", 64 * MIB, force=False) as target:
        assert not (tmp_path / "out").exists()
        target.write(Extent(3, 2), memoryview(b"ab" * BLOCK_SIZE))
        target.leave_hole(Extent(5, 2))
    content = (tmp_path / "out").read_bytes()
    assert content[3 * BLOCK_SIZE : 5 * BLOCK_SIZE] == b"ab" * BLOCK_SIZE
    assert len(content) == 64 * MIB
    assert not any(content[: 3 * BLOCK_SIZE])
    assert (tmp_path / "out").stat().st_blocks * 512 < MIB
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"precious")
    with pytest.raises(ForebayError, match="--force"), open_target(tmp_path / "out", MIB, force=False):
        pass
    assert (tmp_path / "out").read_bytes() == b"precious"
    with open_target(tmp_path / "out", MIB, force=True):
        assert (tmp_path / "out").read_bytes() == b"precious"
    assert (tmp_path / "out").stat().st_size == MIB


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(ForebayError, match="somebody else"),
        open_target(tmp_path / "out", MIB, force=False),
    ):
        (tmp_path / "out").write_bytes(b"precious")
    assert (tmp_path / "out").read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_at_the_last_moment_is_kept(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, sync = os.link, os.fsync

    def no_link(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def sync_and_meddle(descriptor: int) -> None:
        sync(descriptor)
        monkeypatch.setattr(os, "link", lambda part, path: (Path(path).write_bytes(b"precious"), taken(part, path)))

    taken = link if links else no_link
    monkeypatch.setattr(os, "fsync", sync_and_meddle)
    with pytest.raises(ForebayError, match="somebody else"), open_target(tmp_path / "out", MIB, force=False):
        pass
    assert (tmp_path / "out").read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_system_without_links_gets_its_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_link)
    with open_target(tmp_path / "out", MIB, force=False):
        pass
    assert (tmp_path / "out").stat().st_size == MIB
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["\u00fc" * 120 + "x", "\u732b" * 80, "a" * 255, "\udcff" * 200])
def test_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path, name: str) -> None:
    with open_target(tmp_path / name, BLOCK_SIZE, force=False):
        pass
    assert os.listdir(tmp_path) == [name]


def test_a_failure_leaves_nothing_and_the_old_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"precious")
    with pytest.raises(RuntimeError), open_target(tmp_path / "out", MIB, force=True) as target:
        target.write(Extent(0, 1), memoryview(bytes(BLOCK_SIZE)))
        raise RuntimeError("in the middle")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with open_target(tmp_path / "link", BLOCK_SIZE, force=True):
        pass
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_size == BLOCK_SIZE


def test_folders_and_devices_that_hold_no_blocks_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(ForebayError, match="neither a file nor a block device"), open_target(path, MIB, force=True):
            pass
    with pytest.raises(FileNotFoundError), open_target(tmp_path / "no" / "out", MIB, force=False):
        pass
