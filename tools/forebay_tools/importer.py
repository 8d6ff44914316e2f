"""Import: an image becomes a new volume, as parts of frames staged and committed in cuts.

A crash or an error leaves no volume that anybody could take for whole: the import holds it as its writer until it is
complete, and deletes it again when it fails. If the store can't be reached for that, the error says what is left.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from forebay_core.errors import ForebayError, RefusedError
from forebay_core.memory import keep_freed_memory
from forebay_core.units import BLOCK_SIZE, ID_SIZE, format_size
from forebay_tools.cuts import CutSender, release, send_all
from forebay_tools.progress import Progress
from forebay_tools.qcow2 import converted, open_qcow2
from forebay_tools.source import RawSource, detect_format
from forebay_wire.client import WireClient
from forebay_wire.messages import CreateVolume, DeleteVolume, Done, Opened, OpenVolume, Volume

CLEAN_UP_TIMEOUT_S: Final = 30.0


async def import_image(client: WireClient, name: str, path: Path, image_format: str | None) -> str:
    """Make the volume `name` of an image and return a line about it. Blocks of zeros are not stored.

    Raises:
        ForebayError: the image can't be imported, or the store refuses; no volume is left then.
    """
    keep_freed_memory()
    async with _open_source(path, image_format) as source:
        progress = Progress("importing", source.data_size, sys.stderr)
        try:
            blocks = await _import(client, name, source, progress)
        finally:
            progress.close()
    elapsed_s = max(progress.elapsed_s, 1e-3)
    rate = format_size(int(source.data_size / elapsed_s))
    padded = f"; its last block was filled up with {source.padding_size} bytes of zeros" if source.padding_size else ""
    return (
        f"{format_size(source.size)}, {format_size(blocks * BLOCK_SIZE)} of it data, "
        f"imported in {elapsed_s:.1f} s ({rate}/s){padded}"
    )


@contextlib.asynccontextmanager
async def _open_source(path: Path, image_format: str | None) -> AsyncIterator[RawSource]:
    if (image_format or detect_format(path)) == "raw":
        with contextlib.closing(RawSource(path)) as source:
            yield source
        return
    with open_qcow2(path) as image:
        if image.header.increment:
            raise ForebayError(
                f"{path}: holds only what changed since a snapshot; lay it over a volume in that state: "
                f"forebay volume import --onto NAME {path}"
            )
        size = image.header.size
        progress = Progress("converting", size, sys.stderr)
        try:
            async with converted(image, lambda share: progress.reach(int(share * size))) as raw:
                progress.close()
                with contextlib.closing(RawSource(raw)) as source:
                    yield source
        finally:
            progress.close()


async def _import(client: WireClient, name: str, source: RawSource, progress: Progress) -> int:
    await _create(client, name, source.size)
    held: Opened | None = None
    try:
        opened, _ = await client.ask(OpenVolume(name, os.urandom(ID_SIZE)), Opened)
        held = opened
        sent = await send_all(CutSender(client, opened), source.parts(), progress)
        await release(client, opened)
    except BaseException as error:
        await _undo(client, name, held, error)
        raise
    return sent.blocks


async def _create(client: WireClient, name: str, size: int) -> None:
    """Create the volume; an interruption waits for the answer, since only that tells whether there is one now."""
    creating = asyncio.create_task(client.ask(CreateVolume(name, size), Volume))
    try:
        await asyncio.shield(creating)
    except RefusedError:
        raise
    except ForebayError as error:
        raise _unknown(name, error) from error
    except asyncio.CancelledError as cause:
        await _undo_creation(client, name, creating, cause)
        raise


async def _undo_creation(
    client: WireClient, name: str, creating: "asyncio.Task[tuple[Volume, memoryview]]", cause: BaseException
) -> None:
    try:
        async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
            await creating
    except RefusedError:
        return
    except (ForebayError, TimeoutError) as error:
        raise _unknown(name, error) from cause
    await _undo(client, name, None, cause)


def _unknown(name: str, error: Exception) -> ForebayError:
    return ForebayError(
        f"{error or 'no answer'}; nobody knows whether the volume {name} was made: if forebay volume info {name} shows "
        f"an empty one, delete it: forebay volume delete {name}"
    )


async def _undo(client: WireClient, name: str, opened: Opened | None, cause: BaseException) -> None:
    try:
        async with asyncio.timeout(CLEAN_UP_TIMEOUT_S):
            if opened is not None:
                await release(client, opened)
            await client.ask(DeleteVolume(name), Done)
    except (ForebayError, TimeoutError) as error:
        why = str(cause) or "interrupted"
        raise ForebayError(
            f"{why}; the incomplete volume {name} is left ({error or 'no answer'}); "
            f"delete it: forebay volume delete {name} --take-over"
        ) from cause
