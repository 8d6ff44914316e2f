"""`forebay store fsck`: check all of a stopped store's folder; changes nothing unless told to repair."""

import argparse
from pathlib import Path

from forebay_core.errors import EXIT_FAILED
from forebay_tools.arguments import Commands, add_command, add_json
from forebay_tools.printing import say, say_json


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "fsck", run, "check every checksum and the index of a stopped store")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="the store's data folder")
    parser.add_argument(
        "--repair", action="store_true", help="free what a crash left and what nothing needs, if nothing else is wrong"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check and print what was found; exit code 1 if anything was."""
    from forebay_store.service.fsck import fsck

    findings = fsck(arguments.data, repair=arguments.repair)
    if arguments.json:
        say_json([found._asdict() for found in findings])
    elif findings:
        for found in findings:
            say(f"{found.code}: {found.place}: {found.text}{'; deleted' if found.repaired else ''}")
    else:
        say(f"{arguments.data}: nothing wrong found")
    return 0 if all(found.repaired for found in findings) else EXIT_FAILED
