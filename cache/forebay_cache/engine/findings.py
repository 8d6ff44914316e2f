"""What a check of a cache device may find: stable codes, and a bounded list of findings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from forebay_core.errors import CorruptionError, UnreadableError

FINDINGS_MAX: Final = 1000

CODES: Final = {
    "superblock-bad": "a copy of the superblock is damaged or foreign",
    "superblock-differs": "the two copies name different devices or geometries",
    "device-short": "the device is smaller than its superblock says",
    "checkpoint-header": "the header of a checkpoint is damaged",
    "checkpoint-table": "the chunk table of a checkpoint is damaged",
    "checkpoint-chunk": "a chunk of a checkpoint is damaged",
    "checkpoint-content": "a checkpoint is whole but contradicts itself",
    "log-damaged": "a record since the newest checkpoint that was durable is damaged: recovery refuses the device",
    "record-header": "the header of an older record is damaged, or it does not continue the one before",
    "record-chain": "the first record of a zone does not continue the zone that the log came from",
    "record-durable": "a record claims that later ones than itself were durable",
    "zone-opening": "a zone in use does not begin with the record that its row names",
    "zone-state": "a zone that holds blocks was free when the checkpoint was made and never opened since",
    "place-entry": "a mapped block is not the one that its record describes",
    "place-range": "a mapped block lies behind the end of its volume",
    "place-orphan": "a mapped block belongs to no volume that the device knows",
    "block-checksum": "a mapped block's bytes do not match their checksum",
    "version-ahead": "a block, a hole or the store is newer than its volume's newest change or epoch",
    "hole-range": "a hole lies behind the end of its volume",
    "hole-mapped": "a mapped block lies in a hole of its volume",
    "dirty-lost": "the log holds a change that is not in the store, and nothing recovered shows it",
    "dirty-released": "a volume that was released holds changes that are not in the store",
    "pinned-lost": "the log holds a version that a pending snapshot or resize needs, and nothing recovered shows it",
    "snapshot-twice": "two snapshots of a volume that wait for the store have one name or id",
    "volume-twice": "two volumes have one id, or two attached ones have one name",
    "read-error": "the device can't be read there",
    "state-unchecked": "the device is too damaged to say what recovery would make of it",
    "more": "there is more than is listed",
}
"""Every code and its meaning; ARCHITECTURE.md lists them."""


class Finding(NamedTuple):
    """Something that is not as it should be."""

    code: str
    place: str
    text: str


class Findings:
    """What was found so far, up to a bound."""

    def __init__(self) -> None:
        self.rows: list[Finding] = []

    def add(self, code: str, place: str, text: str) -> None:
        """Note a finding."""
        assert code in CODES, code
        if len(self.rows) < FINDINGS_MAX:
            self.rows.append(Finding(code, place, text))
        elif len(self.rows) == FINDINGS_MAX:
            self.rows.append(Finding("more", place, f"more than {FINDINGS_MAX} findings; the rest is not listed"))

    def differ(self, code: str, place: str, what: str, *, expected: object, found: object) -> None:
        """Note that two values differ."""
        self.add(code, place, f"{what}: expected {expected}, found {found}")

    @contextmanager
    def noting(self, code: str, place: str) -> Iterator[None]:
        """Note what the checks inside raise, and go on behind them."""
        try:
            yield
        except UnreadableError as error:
            self.add("read-error", place, str(error))
        except CorruptionError as error:
            self.add(code, error.place, str(error))
