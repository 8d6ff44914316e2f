"""Flags that several commands share, and the parser that reports a mistake as one line.

A flag wins over its environment variable (FOREBAY_STORE, FOREBAY_RUN_DIR, FOREBAY_KEY_FILE).
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeVar

from forebay_core.config import BOOL_ALLOWED, SETTINGS, Settings
from forebay_core.errors import WrongUsageError
from forebay_core.names import check_name, parse_snapshot_name
from forebay_core.units import (
    BLOCK_SIZE,
    RATE_MAX,
    RATE_MIN,
    VOLUME_SIZE_MAX,
    format_rate,
    format_size,
    parse_rate,
    parse_size,
)

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
T = TypeVar("T")


def add_command(commands: Commands, name: str, run: Run, text: str) -> Parser:
    """Return the parser of a new command that `run` executes; `text` is its one-line help."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.set_defaults(run=run, command=parser.prog.removeprefix("forebay "))
    return parser


def add_volume(parser: Parser) -> None:
    """Add the name of a volume."""
    parser.add_argument("name", metavar="NAME", type=_checked(check_name), help="name of the volume")


def add_snapshot(parser: Parser) -> None:
    """Add the name of a snapshot with that of its volume: a SnapshotName in `snapshot`."""
    parser.add_argument(
        "snapshot", metavar="VOL@SNAP", type=_checked(parse_snapshot_name), help="names of the volume and its snapshot"
    )


def add_volume_or_snapshot(parser: Parser) -> None:
    """Add the name of a volume or of a snapshot, as text in `name`."""
    parser.add_argument("name", metavar="VOL[@SNAP]", type=_checked(_either), help="name of the volume, or VOL@SNAP")


def add_wait(parser: Parser, text: str, *, default: bool) -> None:
    """Add --wait, or --wait and --no-wait where waiting is the `default`."""
    action = argparse.BooleanOptionalAction if default else "store_true"
    parser.add_argument("--wait", action=action, default=default, help=text)


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


def snapshot_name(text: str) -> str:
    """Return the name of a snapshot, without its volume, that the user typed.

    Raises:
        ArgumentTypeError: it may not be a name.
    """
    return _checked(lambda name: check_name(name, "snapshot"))(text)


def transfer_rate(text: str) -> int:
    """Return the bytes per second that the user typed.

    Raises:
        ArgumentTypeError: it is no rate, or out of range.
    """
    try:
        rate = parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not RATE_MIN <= rate <= RATE_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not from {format_rate(RATE_MIN)} to {format_rate(RATE_MAX)}")
    return rate


def above_zero(what: str, below: float) -> Callable[[str], float]:
    """Return what reads a number between 0 and `below`, both excluded; a complaint calls it `what`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 < number < below:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} above 0")
        return number

    return read


def store_address(arguments: argparse.Namespace) -> str:
    """Return HOST:PORT of the store from the flag or the environment.

    Raises:
        WrongUsageError: neither is given.
    """
    address = arguments.store or os.environ.get(STORE_VARIABLE)
    if not address:
        raise WrongUsageError(f"no store given; use --store HOST:PORT or set {STORE_VARIABLE}")
    return str(address)


def names_store(arguments: argparse.Namespace) -> bool:
    """Tell whether the flag or the environment names a store."""
    return bool(arguments.store or os.environ.get(STORE_VARIABLE))


def names_run_dir(arguments: argparse.Namespace) -> bool:
    """Tell whether the flag or the environment names a run directory."""
    return bool(arguments.run_dir or os.environ.get(RUN_DIR_VARIABLE))


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


def _either(text: str) -> str:
    return str(parse_snapshot_name(text)) if "@" in text else check_name(text)


def _checked(check: Callable[[str], T]) -> Callable[[str], T]:
    def name(text: str) -> T:
        try:
            return check(text)
        except WrongUsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return name
