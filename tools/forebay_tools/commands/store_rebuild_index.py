"""`forebay store rebuild-index`: make the index of a stopped store from its segments alone."""

import argparse
from pathlib import Path

from forebay_tools.arguments import Commands, add_command
from forebay_tools.printing import say


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "rebuild-index", run, "make the index of a stopped store anew from its segments")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="the store's data folder")


def run(arguments: argparse.Namespace) -> int:
    """Rebuild and print what was found."""
    from forebay_store.service.rebuild import rebuild_index

    say(f"{arguments.data}: {rebuild_index(arguments.data)}")
    return 0
