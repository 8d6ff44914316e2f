"""Flags that several commands share, and the parser that reports a mistake as one line.

A flag wins over its environment variable (FOREBAY_STORE, FOREBAY_RUN_DIR, FOREBAY_KEY_FILE).
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias

from forebay_core.config import BOOL_ALLOWED, SETTINGS, Settings
from forebay_core.errors import WrongUsageError
from forebay_core.names import check_name
from forebay_core.units import BLOCK_SIZE, VOLUME_SIZE_MAX, format_size, parse_size

STORE_VARIABLE = "FOREBAY_STORE"
RUN_DIR_VARIABLE = "FOREBAY_RUN_DIR"
KEY_FILE_VARIABLE = "FOREBAY_KEY_FILE"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint instead of printing the usage."""
        words = " ".join(message.split())
        raise WrongUsageError(f"{words}; see {self.prog} --help")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]


def add_command(commands: Commands, name: str, run: Run, text: str) -> Parser:
    """Return the parser of a new command that `run` executes; `text` is its one-line help."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.set_defaults(run=run, command=parser.prog.removeprefix("forebay "))
    return parser


def add_volume(parser: Parser) -> None:
    """Add the name of a volume."""
    parser.add_argument("name", metavar="NAME", type=_checked(check_name), help="name of the volume")


def add_store(parser: Parser) -> None:
    """Add --store and --key-file."""
    parser.add_argument("--store", metavar="HOST:PORT", help=f"where the store listens; else ${STORE_VARIABLE}")
    parser.add_argument("--key-file", metavar="FILE", type=Path, help=f"key of the store; else ${KEY_FILE_VARIABLE}")


def add_run_dir(parser: Parser) -> None:
    """Add --run-dir."""
    parser.add_argument(
        "--run-dir", metavar="DIR", type=Path, help=f"run directory of the cache daemon; else ${RUN_DIR_VARIABLE}"
    )


def add_json(parser: Parser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_settings(parser: Parser, table: type[Settings]) -> None:
    """Add --config and one flag for each setting of a daemon."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with the settings; flags override it")
    for key, setting in SETTINGS[table].items():
        flag = "--" + key.replace("_", "-")
        if setting.allowed == BOOL_ALLOWED:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=setting.meaning)
        else:
            text = f"{setting.meaning} ({setting.allowed})"
            parser.add_argument(flag, metavar=setting.metavar, help=text.replace("%", "%%"))


def given_settings(arguments: argparse.Namespace, table: type[Settings]) -> dict[str, object]:
    """Return the settings that flags gave."""
    return {key: getattr(arguments, key) for key in SETTINGS[table]}


def volume_size(text: str) -> int:
    """Return the bytes of a volume of the size that the user typed.

    Raises:
        ArgumentTypeError: it is no size, no multiple of a block, or out of range.
    """
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not BLOCK_SIZE <= size <= VOLUME_SIZE_MAX or size % BLOCK_SIZE:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a multiple of {BLOCK_SIZE} up to {format_size(VOLUME_SIZE_MAX)}"
        )
    return size


def store_address(arguments: argparse.Namespace) -> str:
    """Return HOST:PORT of the store from the flag or the environment.

    Raises:
        WrongUsageError: neither is given.
    """
    address = arguments.store or os.environ.get(STORE_VARIABLE)
    if not address:
        raise WrongUsageError(f"no store given; use --store HOST:PORT or set {STORE_VARIABLE}")
    return str(address)


def run_dir(arguments: argparse.Namespace) -> Path:
    """Return the run directory from the flag or the environment.

    Raises:
        WrongUsageError: neither is given.
    """
    found = arguments.run_dir or os.environ.get(RUN_DIR_VARIABLE)
    if not found:
        raise WrongUsageError(f"no run directory given; use --run-dir DIR or set {RUN_DIR_VARIABLE}")
    return Path(found)


def key_file(arguments: argparse.Namespace) -> Path | None:
    """Return the key file from the flag or the environment, or None."""
    found = arguments.key_file or os.environ.get(KEY_FILE_VARIABLE)
    return Path(found) if found else None


def _checked(check: Callable[[str], str]) -> Callable[[str], str]:
    def name(text: str) -> str:
        try:
            return check(text)
        except WrongUsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return name
