"""`forebay volume import`: make a volume of a raw or qcow2 image, or lay one over a volume."""

import argparse
from pathlib import Path

from forebay_core.errors import WrongUsageError
from forebay_tools.arguments import Commands, add_command, add_store, add_volume
from forebay_tools.connect import store_client
from forebay_tools.importer import import_image
from forebay_tools.interrupt import run_interruptible
from forebay_tools.onto import import_onto
from forebay_tools.printing import say
from forebay_tools.source import FORMATS


def add(commands: Commands) -> None:
    """Declare the command."""
    text = "make a volume of a raw or qcow2 image, or lay one over a volume that is not attached"
    parser = add_command(commands, "import", run, text)
    add_volume(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="image file or block device")
    parser.add_argument("--format", choices=FORMATS, help="what FILE is; else its first bytes tell")
    parser.add_argument(
        "--onto", action="store_true", help="lay FILE over the volume NAME: what a qcow2 leaves out stays as it is"
    )
    parser.add_argument("--force", action="store_true", help="with --onto: make the volume as small as FILE")
    parser.add_argument(
        "--take-over", action="store_true", help="with --onto: take the volume from a writer that is gone"
    )
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Import the image; when it fails or is interrupted, no volume is left, or with --onto it is as it was."""
    if not arguments.onto and (arguments.force or arguments.take_over):
        raise WrongUsageError("--force and --take-over are for --onto; without it NAME must be a new volume")
    return run_interruptible(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    name, path, image_format = arguments.name, arguments.file, arguments.format
    async with store_client(arguments) as client:
        if arguments.onto:
            force, take_over = arguments.force, arguments.take_over
            summary = await import_onto(client, name, path, image_format, force=force, take_over=take_over)
        else:
            summary = await import_image(client, name, path, image_format)
    say(f"volume {name}: {summary}")
    return 0
