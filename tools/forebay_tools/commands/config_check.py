"""`forebay config check`: read a configuration as the daemons would."""

import argparse
from pathlib import Path

from forebay_core.config import TABLE_NAMES, check_file
from forebay_core.errors import WrongUsageError
from forebay_tools.arguments import Commands, add_command
from forebay_tools.printing import say


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "check", run, "check a file with settings as the daemons read it")
    parser.add_argument("file", metavar="FILE", type=Path, help="TOML file with the tables [store] and [cache]")


def run(arguments: argparse.Namespace) -> int:
    """Check the file."""
    from forebay_wire.reach import check_reach, read_key

    tables = check_file(arguments.file)
    for settings in tables:
        try:
            check_reach(settings, read_key(settings.key_file))
        except WrongUsageError as error:
            raise WrongUsageError(f"{arguments.file}: {error}") from error
    found = " and ".join(f"[{TABLE_NAMES[type(settings)]}]" for settings in tables)
    say(f"{arguments.file}: {found} can be used")
    return 0
