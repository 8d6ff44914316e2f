"""The model of a disk that loses its power: it keeps what a sync covers, and may lose anything else."""

import random
from collections.abc import Callable

from power_tree import SECTOR, File, Folder, Resize, Tree, Write, Zero

SEEDS = range(300)


def file_of(tree: Tree, name: str) -> File | None:
    node = tree.root.live.get(name)
    assert node is None or isinstance(node, File)
    return node


def named_file(tree: Tree, name: str, content: bytes) -> File:
    """Make a file that is synced, name and all."""
    file = tree.new_file(0o600)
    file.change(Write(0, content))
    tree.sync_file(file)
    tree.set_names((tree.root, name, file))
    tree.sync_folder(tree.root)
    return file


def outcomes(prepare: Callable[[Tree], None], name: str = "file") -> set[bytes | None]:
    """Return what a file may hold after a cut: all that many seeds show."""
    found = set()
    for seed in SEEDS:
        tree = Tree()
        prepare(tree)
        tree.power_off(random.Random(seed))
        file = file_of(tree, name)
        found.add(None if file is None else bytes(file.live))
    return found


def test_what_a_sync_covers_is_kept() -> None:
    def prepare(tree: Tree) -> None:
        named_file(tree, "file", b"kept" * 1000)

    assert outcomes(prepare) == {b"kept" * 1000}


def test_an_unsynced_write_may_be_kept_lost_or_torn_between_any_two_sectors() -> None:
    def prepare(tree: Tree) -> None:
        named_file(tree, "file", b"o" * 3 * SECTOR).change(Write(0, b"n" * 3 * SECTOR))

    shapes = {bytes(one[at] for at in range(0, len(one), SECTOR)) for one in outcomes(prepare) if one is not None}
    assert shapes == {b"ooo", b"noo", b"ono", b"oon", b"nno", b"non", b"onn", b"nnn"}


def test_no_sector_is_torn() -> None:
    def prepare(tree: Tree) -> None:
        named_file(tree, "file", b"o" * 2 * SECTOR).change(Write(100, b"n" * (SECTOR + 100)))

    for one in outcomes(prepare):
        assert one is not None
        assert one[:100] == b"o" * 100
        assert one[100:SECTOR] in (b"n" * (SECTOR - 100), b"o" * (SECTOR - 100))
        assert one[SECTOR : SECTOR + 200] in (b"n" * 200, b"o" * 200)
        assert one[SECTOR + 200 :] == b"o" * (SECTOR - 200)


def test_a_later_write_may_be_kept_while_an_earlier_one_is_lost() -> None:
    def prepare(tree: Tree) -> None:
        file = named_file(tree, "file", b"")
        file.change(Write(0, b"first"))
        file.change(Write(SECTOR, b"second"))

    assert {b"", b"first", bytes(SECTOR) + b"second", b"first" + bytes(SECTOR - 5) + b"second"} == outcomes(prepare)


def test_of_two_writes_to_one_sector_either_may_be_the_last() -> None:
    def prepare(tree: Tree) -> None:
        file = named_file(tree, "file", b"0")
        file.change(Write(0, b"1"))
        file.change(Write(0, b"2"))

    assert outcomes(prepare) == {b"0", b"1", b"2"}


def test_sizes_may_be_lost_like_writes() -> None:
    def prepare(tree: Tree) -> None:
        file = named_file(tree, "file", b"12345678")
        file.change(Resize(4))
        file.change(Zero(0, 2))

    assert outcomes(prepare) == {b"12345678", b"1234", b"\0\0" + b"345678", b"\0\0" + b"34"}


def test_a_new_name_is_kept_only_by_its_folders_sync() -> None:
    def prepare(tree: Tree) -> None:
        file = tree.new_file(0o600)
        tree.set_names((tree.root, "file", file))
        file.change(Write(0, b"content"))
        tree.sync_file(file)

    assert outcomes(prepare) == {None, b"content"}


def test_a_rename_happens_whole_or_not_at_all() -> None:
    def prepare(tree: Tree) -> None:
        old = named_file(tree, "old", b"new content")
        named_file(tree, "file", b"old content")
        tree.set_names((tree.root, "old", None), (tree.root, "file", old))

    assert outcomes(prepare) == {b"old content", b"new content"}
    assert outcomes(prepare, "old") == {b"new content", None}


def test_unsynced_link_and_unlink_may_lose_the_file() -> None:
    def prepare(tree: Tree) -> None:
        file = named_file(tree, "temporary", b"segment")
        tree.set_names((tree.root, "file", file))
        tree.set_names((tree.root, "temporary", None))

    assert outcomes(prepare) == {None, b"segment"}
    assert outcomes(prepare, "temporary") == {None, b"segment"}


def test_a_folder_that_is_lost_takes_all_with_it() -> None:
    found = set()
    for seed in SEEDS:
        tree = Tree()
        folder = tree.new_folder(0o700)
        tree.set_names((tree.root, "folder", folder))
        tree.set_names((folder, "file", tree.new_file(0o600)))
        tree.sync_folder(folder)
        tree.power_off(random.Random(seed))
        left = tree.root.live.get("folder")
        found.add(left is None)
        assert left is None or (isinstance(left, Folder) and "file" in left.live)
    assert found == {True, False}


def test_a_rename_over_two_folders_is_covered_when_both_are_synced() -> None:
    tree = Tree()
    folder = tree.new_folder(0o700)
    tree.set_names((tree.root, "folder", folder))
    file = named_file(tree, "file", b"moved")
    tree.set_names((tree.root, "file", None), (folder, "file", file))
    tree.sync_folder(tree.root)
    assert tree.unsynced_names == 1
    tree.sync_folder(folder)
    assert tree.unsynced_names == 0
    tree.power_off(random.Random(0))
    assert (folder.live, tree.root.live) == ({"file": file}, {"folder": folder})


def test_one_seed_is_one_outcome() -> None:
    def content(seed: int) -> bytes:
        tree = Tree()
        file = named_file(tree, "file", bytes(64 * SECTOR))
        for at in range(64):
            file.change(Write(at * 300, bytes([at]) * 1000))
        tree.power_off(random.Random(seed))
        return bytes(file.live)

    assert content(5) == content(5)
    assert len({content(seed) for seed in range(20)}) > 10
