"""The small file that keeps what is damaged and how far the scrub is.

Read and replaced as `side_file` says; that says what a crash leaves.
"""

import logging
from pathlib import Path
from typing import Final

from forebay_core.errors import CorruptionError
from forebay_store.format.damage_file import DAMAGE_SIZE_MAX, ScrubState, decode_damage, encode_damage
from forebay_store.service.folder import DAMAGE_NAME, NEW_DAMAGE_NAME
from forebay_store.service.side_file import read_side_file, replace_side_file

_LOG: Final = logging.getLogger("forebay.store")


class DamageFile:
    """The file of one store's folder."""

    def __init__(self, folder: Path, store: bytes) -> None:
        self._path = folder / DAMAGE_NAME
        self._new = folder / NEW_DAMAGE_NAME
        self._store = store
        self._failing = False

    def read(self) -> ScrubState:
        """Return what was kept; nothing, and a line in the log, if it is missing or damaged."""
        try:
            content = read_side_file(self._path, self._new, DAMAGE_SIZE_MAX)
            return decode_damage(content, store=self._store, place=str(self._path))
        except FileNotFoundError:
            _LOG.info("no file %s yet: nothing was scrubbed here", self._path)
        except (OSError, CorruptionError) as error:
            _LOG.warning("what is damaged is known after the next scrub: %s", error)
        return ScrubState()

    def write(self, state: ScrubState) -> None:
        """Replace the file. That it can't be is one line in the log and no more: it is no part of the truth."""
        try:
            replace_side_file(self._path, self._new, encode_damage(self._store, state))
            self._failing = False
        except OSError as error:
            if not self._failing:
                _LOG.warning("what is damaged is not kept: %s: %s", self._new, error.strerror)
            self._failing = True
