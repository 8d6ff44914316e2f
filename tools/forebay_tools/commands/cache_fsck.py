"""`forebay cache fsck`: check all of a cache device that is not in use; changes nothing."""

import argparse
import sys
from pathlib import Path

from forebay_core.errors import EXIT_FAILED
from forebay_tools.arguments import Commands, add_command, add_json
from forebay_tools.printing import say, say_json
from forebay_tools.progress import Progress


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "fsck", run, "check every checksum and invariant of a cache device not in use")
    parser.add_argument("--device", metavar="DEV", type=Path, required=True, help="cache file or block device")
    parser.add_argument("--headers-only", action="store_true", help="do not read the cached blocks themselves")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check and print what was found; exit code 1 if anything was."""
    from forebay_cache.service.fsck import fsck

    progress = Progress("checking", 0, sys.stderr)
    try:
        findings = fsck(arguments.device, with_blocks=not arguments.headers_only, reached=progress.reach_of)
    finally:
        progress.close()
    if arguments.json:
        say_json([{"code": found.code, "place": found.place, "text": found.text} for found in findings])
    elif findings:
        for found in findings:
            say(f"{found.code}: {found.place}: {found.text}")
    else:
        say(f"{arguments.device}: nothing wrong found")
    return EXIT_FAILED if findings else 0
