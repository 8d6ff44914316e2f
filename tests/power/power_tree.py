"""A file system that knows what a power cut leaves of it: pure, in memory, one seed is one outcome.

Every file and folder has what programs see (`live`) and what a finished sync covers (`stable`); between the two lie
the changes that no sync covers yet. `power_off` keeps any part of those, and what it keeps is all there is then. The
rules are POSIX at its harshest, so harsher than ext4, xfs or btrfs are:

    data        fsync and fdatasync of a file cover its bytes and its size, and nothing else: not its name. A write
                through a descriptor with O_DSYNC or O_SYNC covers the file as fdatasync does.
    unsynced    each change of a file (write, truncate, punch, fallocate) is kept, lost, or torn at 512 bytes: any
                subset of the sectors, in whatever order they were written. What was written twice since the last sync
                may show either version.
    names       create, mkdir, link, unlink, rmdir and rename are covered by an fsync of the folder that holds the
                name, and by nothing else. Without it each is kept or lost by itself, also when a later one of the
                same folder is kept: the new name may be lost although the old one is gone.
    rename      happens as a whole or not at all; over two folders it is covered when both were synced.
    folders     a folder whose own name is lost is lost with all that it holds, synced or not.
    modes       modes, owners and times are kept at once: nothing of ours depends on them.

Invariants:
    live == stable + unsynced, applied in order.
    A name's stable entry never goes back to an older change (each change has a number).
"""

import random
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

SECTOR: Final = 512
_KEPT_SHARES: Final = (0.0, 0.0, 0.3, 0.7, 0.95)
_TORN_SHARES: Final = (0.0, 0.2, 0.6)


class Write(NamedTuple):
    offset: int
    content: bytes


class Resize(NamedTuple):
    size: int


class Zero(NamedTuple):
    """Zeros within the file's size."""

    offset: int
    size: int


Change = Write | Resize | Zero


class Outcome(NamedTuple):
    """What a power cut did to what no sync covered."""

    kept: int
    lost: int
    torn: int
    names_kept: int
    names_lost: int


class File:
    """Bytes with a number and a mode; `links` counts the live names."""

    def __init__(self, number: int, mode: int) -> None:
        self.number = number
        self.mode = mode
        self.links = 0
        self.live = bytearray()
        self.stable = bytearray()
        self.unsynced: list[Change] = []

    def change(self, change: Change) -> None:
        apply(self.live, change)
        self.unsynced.append(change)

    def settle(self, changes: Sequence[Change]) -> None:
        """Make changes part of what is stable and forget the others."""
        for change in changes:
            apply(self.stable, change)
        self.unsynced.clear()


class Folder:
    """Names and what they stand for; `stable` has the number of the change that set a name."""

    def __init__(self, number: int, mode: int) -> None:
        self.number = number
        self.mode = mode
        self.live: dict[str, Node] = {}
        self.stable: dict[str, tuple[int, Node | None]] = {}


Node = File | Folder


class Naming(NamedTuple):
    """One change of names; `open` holds the folders that were not synced since."""

    number: int
    entries: list[tuple[Folder, str, Node | None]]
    open: set[Folder]


class Tree:
    """All files and folders of one disk. Errors are OSErrors of the caller's making: paths are looked up by nodes."""

    def __init__(self) -> None:
        self._number = 1
        self.root = Folder(1, 0o755)
        self._namings: list[Naming] = []

    @property
    def unsynced_names(self) -> int:
        return len(self._namings)

    def new_file(self, mode: int) -> File:
        return File(self._next(), mode)

    def new_folder(self, mode: int) -> Folder:
        return Folder(self._next(), mode)

    def set_names(self, *entries: tuple[Folder, str, Node | None]) -> None:
        """Change names as one step; None removes one."""
        for folder, name, node in entries:
            _drop_link(folder.live.pop(name, None))
            if node is not None:
                folder.live[name] = node
                if isinstance(node, File):
                    node.links += 1
        self._namings.append(Naming(self._next(), list(entries), {folder for folder, _, _ in entries}))

    def sync_file(self, file: File) -> None:
        file.settle(file.unsynced[:])

    def sync_folder(self, folder: Folder) -> None:
        for naming in self._namings:
            naming.open.discard(folder)
            if not naming.open:
                _settle(naming)
        self._namings = [naming for naming in self._namings if naming.open]

    def power_off(self, dice: random.Random, *, everything: bool = False) -> Outcome:
        """Lose a part of what no sync covers, or `everything`; what is left is live and stable."""
        kept_share = 0.0 if everything else dice.choice(_KEPT_SHARES)
        kept = [naming for naming in self._namings if dice.random() < kept_share]
        names_lost = len(self._namings) - len(kept)
        for naming in kept:
            _settle(naming)
        self._namings.clear()
        counts = [0, 0, 0]
        for node in self._revive(self.root, set(), []):
            torn_share = 0.0 if everything else dice.choice(_TORN_SHARES)
            for index, count in enumerate(_lose(node, dice, kept_share, torn_share)):
                counts[index] += count
        return Outcome(*counts, names_kept=len(kept), names_lost=names_lost)

    def _revive(self, folder: Folder, seen: set[Folder], files: list[File]) -> list[File]:
        """Make the stable names the live ones; return the files, each once."""
        seen.add(folder)
        folder.live = {name: node for name, (_, node) in folder.stable.items() if node is not None}
        for name in sorted(folder.live):
            node = folder.live[name]
            if isinstance(node, File):
                if node not in files:
                    node.links = 0
                    files.append(node)
                node.links += 1
            elif node in seen:
                del folder.live[name]  # of two names that a half-covered rename left to a folder, one stays
            else:
                self._revive(node, seen, files)
        return files

    def _next(self) -> int:
        self._number += 1
        return self._number


def apply(content: bytearray, change: Change) -> None:
    """Do a change to a file's bytes."""
    match change:
        case Write(offset, written):
            if len(content) < offset:
                content.extend(bytes(offset - len(content)))
            content[offset : offset + len(written)] = written
        case Resize(size):
            del content[size:]
            content.extend(bytes(size - len(content)))
        case Zero(offset, size):
            end = min(offset + size, len(content))
            if offset < end:
                content[offset:end] = bytes(end - offset)


def sectors(change: Write) -> Iterator[Write]:
    """Split a write where a disk may tear it."""
    at = 0
    while at < len(change.content):
        size = SECTOR - (change.offset + at) % SECTOR
        yield Write(change.offset + at, change.content[at : at + size])
        at += size


def _settle(naming: Naming) -> None:
    for folder, name, node in naming.entries:
        if folder.stable.get(name, (0, None))[0] < naming.number:
            folder.stable[name] = (naming.number, node)


def _drop_link(node: Node | None) -> None:
    if isinstance(node, File):
        node.links -= 1


def _lose(file: File, dice: random.Random, kept_share: float, torn_share: float) -> tuple[int, int, int]:
    """Keep a part of a file's unsynced changes; return how many were kept, lost and torn."""
    survivors: list[Change] = []
    kept = lost = torn = 0
    for change in file.unsynced:
        if isinstance(change, Write) and dice.random() < torn_share and len(parts := list(sectors(change))) > 1:
            share = dice.random()
            survivors += [part for part in parts if dice.random() < share]
            torn += 1
        elif dice.random() < kept_share:
            survivors.append(change)
            kept += 1
        else:
            lost += 1
    file.settle(survivors)
    file.live = bytearray(file.stable)
    return kept, lost, torn
