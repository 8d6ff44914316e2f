"""Import onto a volume that exists: an image, or an increment, is laid over it as cuts.

Up to ONTO_CUT_SIZE of data it is one cut: after an error, an interruption or a crash the volume is as it was. Beyond,
each cut takes the volume from one state to the next, and the error says that it is in between. The volume is held as by
any writer meanwhile.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from forebay_core.errors import ForebayError
from forebay_core.memory import keep_freed_memory
from forebay_core.units import BLOCK_SIZE, GIB, ID_SIZE, format_size
from forebay_tools.cuts import CutSender, Sent, release, send_all
from forebay_tools.importer import CLEAN_UP_TIMEOUT_S
from forebay_tools.overlay import Overlay, raw_runs
from forebay_tools.progress import Progress
from forebay_tools.qcow2 import Qcow2Image, converted, open_qcow2
from forebay_tools.qcow2_map import held_runs
from forebay_tools.source import RawSource, check_unchanged, detect_format
from forebay_wire.client import WireClient
from forebay_wire.messages import GetVolume, Opened, OpenVolume, ResizeVolume, Volume

ONTO_CUT_SIZE: Final = 16 * GIB
"""Bytes of data in one cut: the index takes a cut in one step, in which other volumes' cuts wait."""


async def import_onto(
    client: WireClient, name: str, path: Path, image_format: str | None, *, force: bool, take_over: bool
) -> str:
    """Lay an image over the volume `name` and return a line about it.

    A larger image makes the volume larger; a smaller one makes it smaller only with `force`.

    Raises:
        ForebayError: the image can't be used, there is no such volume, or somebody holds it.
    """
    keep_freed_memory()
    row = (await client.ask(GetVolume(name), Volume))[0].row
    async with _open_overlay(path, image_format) as overlay:
        if overlay.size < row.size and not force:
            raise ForebayError(
                f"{path}: has {format_size(overlay.size)}, volume {name} has {format_size(row.size)}; give --force to "
                "make the volume as small, what lies behind is gone"
            )
        progress = Progress("importing", overlay.data_size, sys.stderr)
        try:
            sent = await _lay_over(client, name, overlay, progress, volume_size=row.size, take_over=take_over)
        finally:
            progress.close()
    data, zeros = format_size(sent.blocks * BLOCK_SIZE), format_size(sent.hole_blocks * BLOCK_SIZE)
    return f"{data} of data and {zeros} of zeros laid over it in {max(progress.elapsed_s, 1e-3):.1f} s"


@contextlib.asynccontextmanager
async def _open_overlay(path: Path, image_format: str | None) -> AsyncIterator[Overlay]:
    if (image_format or detect_format(path)) == "raw":
        with contextlib.closing(RawSource(path)) as raw:
            yield Overlay(raw, lambda: raw_runs(raw), lambda: None)
        return
    with open_qcow2(path) as image:
        size = image.header.size
        progress = Progress("converting", size, sys.stderr)
        try:
            async with converted(image, lambda share: progress.reach(int(share * size))) as content:
                progress.close()
                with contextlib.closing(RawSource(content)) as raw:
                    yield _qcow2_overlay(image, raw)
        finally:
            progress.close()


def _qcow2_overlay(image: Qcow2Image, raw: RawSource) -> Overlay:
    return Overlay(
        raw,
        lambda: held_runs(image.descriptor, str(image.path)),
        lambda: check_unchanged(image.path, image.descriptor, image.status),
    )


async def _lay_over(
    client: WireClient, name: str, overlay: Overlay, progress: Progress, *, volume_size: int, take_over: bool
) -> Sent:
    opened, _ = await client.ask(OpenVolume(name, os.urandom(ID_SIZE), take_over=take_over), Opened)
    if overlay.size > volume_size:  # as nobody holds it, the store itself does that
        await release(client, opened)
        await client.ask(ResizeVolume(name, overlay.size), Volume)
        opened, _ = await client.ask(OpenVolume(name, os.urandom(ID_SIZE)), Opened)
    sender = CutSender(client, opened, cut_size=ONTO_CUT_SIZE)
    try:
        sent = await send_all(sender, overlay.parts(), progress)
        await release(client, opened)
    except BaseException as error:
        await _give_up(client, name, opened, sender, error)
        raise
    if overlay.size < volume_size:
        await client.ask(ResizeVolume(name, overlay.size, force=True), Volume)
    return sent


async def _give_up(client: WireClient, name: str, opened: Opened, sender: CutSender, cause: BaseException) -> None:
    """Release the volume, and say what is in it now unless it is as it was."""
    why = str(cause) or "interrupted"
    try:
        async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
            await release(client, opened)
    except (ForebayError, TimeoutError) as error:
        raise ForebayError(
            f"{why}; volume {name} is still held by this import ({error or 'no answer'}): import again with --take-over"
        ) from cause
    if sender.committed_cuts:
        raise ForebayError(f"{why}; volume {name} has a part of the image now: import it again") from cause
