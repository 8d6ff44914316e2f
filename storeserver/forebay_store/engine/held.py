"""What caches say of how far they are ahead of the store, and what was lost with a cache that is gone.

Invariants:
    _reports has the last report of a volume's present holder; one of an older epoch became a loss, or is forgotten.
    both are bounded, and in the order in which they were heard of.
    `stale` says that something of it is not in the newest `kept`.
Crash: what was kept last comes back by `restore`; a cache that lives reports again within seconds.
"""

from collections.abc import Sequence
from typing import Final

from forebay_core.errors import RefusedError
from forebay_core.units import ID_SIZE
from forebay_store.engine.ports import IndexReader
from forebay_store.engine.volumes import find_volume
from forebay_store.format.reports import Loss, Report, Reports
from forebay_store.format.rows import VolumeState
from forebay_store.limits import REPORTS_MAX, REPORTS_PER_MESSAGE_MAX
from forebay_wire import messages

_U64_END: Final = 1 << 64


class HeldReports:
    """The last reports of all volumes."""

    def __init__(self, *, reports_max: int = REPORTS_MAX) -> None:
        self._reports_max = reports_max
        self._reports: dict[bytes, Report] = {}
        self._losses: dict[bytes, Loss] = {}
        self.changed = False  # how far somebody is ahead differs from what was kept
        self.heard = False  # or only when it was said

    def receive(self, reader: IndexReader, node: bytes, reports: Sequence[messages.HeldReport]) -> list[bytes]:
        """Keep what a cache says of the volumes that it holds; return the ids of the others.

        Raises:
            RefusedError: a number is none that a cache can mean.
        """
        lost: list[bytes] = []
        for said in reports[:REPORTS_PER_MESSAGE_MAX]:
            row = find_volume(reader, said.volume) if len(said.volume) == ID_SIZE else None
            if row is None or (row.writer, row.epoch) != (node, said.epoch):
                lost.append(said.volume)
            else:
                self._keep(_checked(said))
        return lost

    def told(self, row: VolumeState) -> messages.Held:
        """Answer GetHeld."""
        none = Report(row.id, 0, 0, 0, 0)
        loss = self._losses.get(row.id, Loss(none, 0))
        report = self._reports.get(row.id, none)
        return messages.Held(messages.HeldReport(*report), messages.HeldReport(*loss.report), loss.lost_from)

    def note_epoch(self, volume: bytes, epoch: int, version: int) -> None:
        """An epoch begins: what the holder of the one before said is the last that is known of it."""
        report = self._reports.get(volume)
        if report is None or report.epoch >= epoch:
            return
        del self._reports[volume]
        self._losses.pop(volume, None)
        if report.version > version:
            self._losses[volume] = Loss(report, version)
            self._bound(self._losses)
        self.changed = True

    def kept(self) -> Reports:
        """Return what is to be kept over a restart; from now on only news counts as change."""
        self.changed = self.heard = False
        return Reports(tuple(self._reports.values()), tuple(self._losses.values()))

    def restore(self, reader: IndexReader, kept: Reports) -> None:
        """Take back what was kept. Volumes may have been deleted or taken over since, for it lags behind."""
        losses = {loss.report.volume: loss for loss in kept.losses}
        self._losses = {volume: loss for volume, loss in losses.items() if find_volume(reader, volume) is not None}
        for report in kept.reports:
            row = find_volume(reader, report.volume)
            if row is not None:
                self._reports[row.id] = report
                self.note_epoch(row.id, row.epoch, row.version)

    def _keep(self, report: Report) -> None:
        known = self._reports.pop(report.volume, None)
        self._reports[report.volume] = report
        self._bound(self._reports)
        self.heard = True
        if known is None or known[:-1] != report[:-1]:
            self.changed = True

    def _bound(self, kept: dict[bytes, Report] | dict[bytes, Loss]) -> None:
        while len(kept) > self._reports_max:
            kept.pop(next(iter(kept)))


def _checked(said: messages.HeldReport) -> Report:
    report = Report(said.volume, said.epoch, said.version, said.oldest_ns, said.reported_ns)
    if not all(0 <= number < _U64_END for number in report[1:]):
        raise RefusedError(messages.BAD_REQUEST, "a report's numbers must be between 0 and 2**64 - 1")
    return report
