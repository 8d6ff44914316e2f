"""The small file that keeps what caches reported while the store is down.

Written anew beside its place, synced and renamed. The folder is not synced: it is enough that some whole file is there.
Crash: leaves the file of before or the new one, and perhaps a part under the temporary name, which goes at the start.
"""

import logging
import os
from pathlib import Path
from typing import Final

from forebay_core.errors import CorruptionError
from forebay_store.format.reports import REPORTS_SIZE_MAX, Reports, decode_reports, encode_reports
from forebay_store.service.folder import NEW_REPORTS_NAME, REPORTS_NAME

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
            self._new.unlink(missing_ok=True)
            with self._path.open("rb") as file:
                content = file.read(REPORTS_SIZE_MAX + 1)
            return decode_reports(content, store=self._store, place=str(self._path))
        except FileNotFoundError:
            _LOG.info("no file %s yet: how far caches are ahead is known once they report", self._path)
        except (OSError, CorruptionError) as error:
            _LOG.warning("how far caches are ahead is known once they report: %s", error)
        return Reports((), ())

    def write(self, kept: Reports) -> None:
        """Replace the file. That it can't be is one line in the log and no more: it is no part of the truth."""
        try:
            fd = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(encode_reports(self._store, kept))
                file.flush()
                os.fdatasync(file.fileno())
            self._new.rename(self._path)
            self._failing = False
        except OSError as error:
            if not self._failing:
                _LOG.warning("what caches reported is not kept: %s: %s", self._new, error.strerror)
            self._failing = True
