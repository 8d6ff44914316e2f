"""The small file that keeps what caches reported while the store is down.

Read and replaced as `side_file` says; that says what a crash leaves.
"""

import logging
from pathlib import Path
from typing import Final

from forebay_core.errors import CorruptionError
from forebay_store.format.reports import REPORTS_SIZE_MAX, Reports, decode_reports, encode_reports
from forebay_store.service.folder import NEW_REPORTS_NAME, REPORTS_NAME
from forebay_store.service.side_file import read_side_file, replace_side_file

_LOG: Final = logging.getLogger("forebay.store")


class ReportFile:
    """The file of one store's folder."""

    def __init__(self, folder: Path, store: bytes) -> None:
        self._path = folder / REPORTS_NAME
        self._new = folder / NEW_REPORTS_NAME
        self._store = store
        self._failing = False

    def read(self) -> Reports:
        """Return what was kept; nothing, and a line in the log, if it is missing or damaged."""
        try:
            content = read_side_file(self._path, self._new, REPORTS_SIZE_MAX)
            return decode_reports(content, store=self._store, place=str(self._path))
        except FileNotFoundError:
            _LOG.info("no file %s yet: how far caches are ahead is known once they report", self._path)
        except (OSError, CorruptionError) as error:
            _LOG.warning("how far caches are ahead is known once they report: %s", error)
        return Reports((), ())

    def write(self, kept: Reports) -> None:
        """Replace the file. That it can't be is one line in the log and no more: it is no part of the truth."""
        try:
            replace_side_file(self._path, self._new, encode_reports(self._store, kept))
            self._failing = False
        except OSError as error:
            if not self._failing:
                _LOG.warning("what caches reported is not kept: %s: %s", self._new, error.strerror)
            self._failing = True
