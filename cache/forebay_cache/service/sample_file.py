"""Keeps the sample of accesses in a file of the run directory.

Invariants:
    The file is replaced whole: a reader sees an older one or a newer one.
    A file that is damaged, or of another device, is not used: the sample begins anew.
Crash: what was sampled since the file was written is gone; nothing but `forebay analyze` looks at it.
"""

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Final

import numpy as np

from forebay_cache.engine.cache import CacheEngine
from forebay_cache.format.sample_file import FILE_SIZE_MAX, SavedSample, decode_sample, encode_sample, volumes_of
from forebay_core.errors import CorruptionError

NAME: Final = "sample"
SAVE_S: Final = 30.0
"""How often it is looked whether the file shall be written anew."""

SAVED_SHARE: Final = 16
"""It is, once so many parts of it are new: an idle host writes nothing, a busy one 2 MiB now and then."""

_LOG = logging.getLogger(__name__)


class SampleFile:
    """The file of one daemon. What it can't read or write costs a line in the log and no more."""

    def __init__(self, engine: CacheEngine, folder: Path, device: bytes) -> None:
        self._engine = engine
        self._path = folder / NAME
        self._device = device
        self._saved = 0  # what was noted when it was written
        self._timer: asyncio.TimerHandle | None = None
        self._saving: asyncio.Future[None] | None = None

    def load(self) -> None:
        """Take over what the last daemon left; before anything is sampled."""
        try:
            with self._path.open("rb") as file:
                found = decode_sample(file.read(FILE_SIZE_MAX + 1), place=str(self._path))
        except FileNotFoundError:
            return
        except OSError as error:
            _LOG.warning("%s: the sample of accesses can't be read (%s); it begins anew", self._path, error.strerror)
            return
        except CorruptionError as error:
            _LOG.warning("the sample of accesses begins anew: %s", error)
            return
        if found.device != self._device:
            _LOG.warning("%s is of another cache device; the sample of accesses begins anew", self._path)
            return
        volumes = self._engine.volumes
        same = [key for key, one in found.volumes.items() if key in volumes and volumes[key].id == one]
        keys = np.concatenate(found.parts)
        keys = keys[np.isin(volumes_of(keys), np.array(same, np.uint64))]
        self._engine.sample.restore(keys, limit=found.limit, accesses=found.accesses, span_ns=found.span_ns)

    def start(self) -> None:
        """Write it now and then from here on."""
        self._timer = asyncio.get_running_loop().call_later(SAVE_S, self._look)

    async def close(self, *, save: bool) -> None:
        """Write it for the last time, if asked to. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self._saving is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._saving
        if save:
            self._engine.observe()
            self._write(self._snapshot())

    def _look(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SAVE_S, self._look)
        sample = self._engine.sample
        fresh = sample.noted - self._saved
        if fresh * SAVED_SHARE > sample.count and (self._saving is None or self._saving.done()):
            self._saved = sample.noted
            self._saving = asyncio.get_running_loop().run_in_executor(None, self._write, self._snapshot())

    def _snapshot(self) -> SavedSample:
        sample = self._engine.sample
        volumes = {key: volume.id for key, volume in self._engine.volumes.items()}
        return SavedSample(self._device, sample.limit, sample.accesses, sample.span_ns, volumes, sample.parts())

    def _write(self, sample: SavedSample) -> None:
        fresh = self._path.with_suffix(".new")
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                for part in encode_sample(sample):
                    file.write(part)
            os.replace(fresh, self._path)
        except OSError as error:
            _LOG.warning("%s: the sample of accesses can't be kept (%s)", self._path, error.strerror)
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
