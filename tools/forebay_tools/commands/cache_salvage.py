"""`forebay cache salvage`: save what a cache device that is not in use holds of a volume; changes nothing on it."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from forebay_core.errors import EXIT_FAILED, CorruptionError, ForebayError, WrongUsageError
from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, format_size, sequence_of
from forebay_tools.arguments import Commands, add_command, add_json
from forebay_tools.connect import store_client
from forebay_tools.interrupt import run_interruptible
from forebay_tools.printing import Json, note, say, say_json, say_table

if TYPE_CHECKING:
    from forebay_cache.engine.salvage import Salvage, SalvageVolume
    from forebay_tools.salvager import Fill
    from forebay_tools.target import Target
    from forebay_wire.messages import VolumeRow

HEAD = ("VOLUME", "SIZE", "STATE", "CHANGES", "SEQUENCES", "DIRTY", "CACHED", "ID")


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "write what a cache device not in use holds of a volume to a sparse raw file; without VOL list the volumes"
    parser = add_command(commands, "salvage", run, text)
    parser.add_argument("volume", metavar="VOL", nargs="?", help="name or id of the volume")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, help="file to make; FILE.map.json says what is in it"
    )
    parser.add_argument("--device", metavar="DEV", type=Path, required=True, help="cache file or block device")
    parser.add_argument(
        "--store", metavar="HOST:PORT", help="fill the rest from this store if it stands where it should"
    )
    parser.add_argument("--key-file", metavar="FILE", type=Path, help="key of the store")
    parser.add_argument("--force", action="store_true", help="overwrite FILE and its map")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """List or save; exit code 1 if anything is damaged."""
    if arguments.volume is not None and arguments.file is None:
        raise WrongUsageError("give FILE as well, or neither VOL nor FILE to list what could be salvaged")
    return run_interruptible(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    from forebay_cache.engine.salvage import search_device
    from forebay_cache.service.stopped_device import open_stopped
    from forebay_tools.salvager import choose_volume, save, saved_json, summary

    with open_stopped(arguments.device) as device:
        try:
            found = search_device(device.read, device.size)
        except CorruptionError as error:
            raise ForebayError(f"{arguments.device}: {error}; nothing can be saved") from error
        if arguments.volume is None:
            return _list(arguments, found)
        volume = choose_volume(found, arguments.volume)
        async with AsyncExitStack() as stack:
            row, fill = await _prepare(stack, arguments, volume)
            saved = await save(
                device, volume, arguments.file, force=arguments.force, doubts=found.doubts, row=row, fill=fill
            )
    if arguments.json:
        say_json(saved_json(saved))
    else:
        for line in summary(saved):
            say(line)
    return EXIT_FAILED if saved.bad or saved.doubts else 0


async def _prepare(
    stack: AsyncExitStack, arguments: argparse.Namespace, volume: "SalvageVolume"
) -> "tuple[VolumeRow | None, Fill | None]":
    """Return the store's row of the volume and what fills a file from it, if a store is named."""
    from forebay_tools.exporter import copy_view
    from forebay_tools.progress import Progress
    from forebay_tools.salvager import check_store
    from forebay_tools.view import view_of_volume
    from forebay_wire.messages import GetVolume, Volume

    if arguments.store is None:
        return None, None
    client = await stack.enter_async_context(store_client(arguments))
    answer, _ = await client.ask(GetVolume(volume.note.name), Volume)
    row = answer.row
    check_store(volume, row)

    async def fill(target: "Target", skip: Sequence[Extent]) -> int:
        progress = Progress("filling", row.data_blocks * BLOCK_SIZE, sys.stderr)
        try:
            return await copy_view(client, view_of_volume(row), target, progress, skip=skip)
        finally:
            progress.close()

    return row, fill


def _list(arguments: argparse.Namespace, found: "Salvage") -> int:
    rows = [_listed(volume) for volume in found.volumes]
    if arguments.json:
        say_json({"volumes": rows, "doubts": found.doubts})
    else:
        say_table(HEAD, [_cells(row) for row in rows])
        for doubt in found.doubts:
            note(f"not whole: {doubt}")
    return EXIT_FAILED if found.doubts else 0


def _listed(volume: "SalvageVolume") -> dict[str, Json]:
    from forebay_cache.format.volume_note import CLOSED, LEFT_DIRTY

    flags = volume.note.flags
    return {
        "name": volume.note.name,
        "id": volume.note.volume_id.hex(),
        "size": volume.note.size,
        "state": "released" if flags & CLOSED else "left dirty" if flags & LEFT_DIRTY else "attached",
        "epoch": volume.note.epoch,
        "changes": max(0, sequence_of(volume.version) - sequence_of(volume.acknowledged)),
        "first_sequence": sequence_of(volume.acknowledged) + 1,
        "last_sequence": sequence_of(volume.version),
        "dirty_bytes": volume.dirty.size * BLOCK_SIZE,
        "cached_bytes": volume.clean.size * BLOCK_SIZE,
    }


def _cells(row: dict[str, Json]) -> tuple[str, ...]:
    sizes = {key: format_size(value) for key, value in row.items() if isinstance(value, int)}
    sequences = f"{row['first_sequence']}-{row['last_sequence']}" if row["changes"] else "-"
    return (
        str(row["name"]),
        sizes["size"],
        str(row["state"]),
        str(row["changes"]),
        sequences,
        sizes["dirty_bytes"],
        sizes["cached_bytes"],
        str(row["id"]),
    )
