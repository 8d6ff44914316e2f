"""Recordings of those who asked for them, each until its connection ends.

A listener takes what was recorded a few times a second. One that is slow loses rows, which it is told; it costs the
daemon a buffer of fixed size.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from forebay_cache.engine.recorder import Recorder, Recording
from forebay_core.errors import RefusedError
from forebay_core.units import Buffer
from forebay_wire import messages
from forebay_wire.messages import TracedVolume, TraceRows

TAKE_S: Final = 0.2


class TraceCommands:
    """Begins, hands out and ends recordings; `who` is the connection that asks."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recordings: dict[object, Recording] = {}

    def begin(self, who: object, volume_key: int | None) -> None:
        """Record one volume, or all.

        Raises:
            ForebayError: this connection records already, or too many do.
        """
        if who in self._recordings:
            raise RefusedError(messages.BAD_REQUEST, "this connection records already")
        self._recordings[who] = self._recorder.begin(volume_key)

    async def take(self, who: object, *, last: bool) -> tuple[TraceRows, Sequence[Buffer]]:
        """Return what was recorded, a moment later unless it is the last time.

        Raises:
            RefusedError: this connection does not record.
        """
        recording = self._recordings.get(who)
        if recording is None:
            raise RefusedError(messages.BAD_REQUEST, "this connection does not record")
        if not (last or recording.is_half_full):
            await asyncio.sleep(TAKE_S)
        taken = recording.take()
        if last:
            self.end(who)
        volumes = tuple(TracedVolume(key, name) for key, name in sorted(taken.names.items()))
        return TraceRows(taken.lost, volumes), [taken.rows] if taken.rows else []

    def end(self, who: object) -> None:
        """The connection is gone, or has enough."""
        recording = self._recordings.pop(who, None)
        if recording is not None:
            self._recorder.end(recording)
