"""The command `forebay`.

Exit codes: 0 done, 1 the operation failed, 2 wrong usage. What failed is one line on stderr.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, Protocol, cast

from forebay_core.errors import EXIT_FAILED, EXIT_USAGE, ForebayError
from forebay_tools.arguments import Commands, Parser

GROUPS: Final = {
    "store": "the store daemon and its data folder",
    "cache": "the cache daemon",
    "volume": "volumes in the store",
    "snapshot": "snapshots of volumes",
    "trace": "traces of block accesses",
    "config": "the file with the settings of the daemons",
}
COMMANDS: Final = (
    *("store serve", "store clean", "store scrub", "store fsck", "store rebuild-index"),
    *("cache serve", "cache fsck", "cache salvage"),
    *("volume create", "volume import", "volume export", "volume list", "volume info", "volume resize"),
    *("volume clone", "volume flatten", "volume delete"),
    *("snapshot create", "snapshot list", "snapshot delete", "snapshot rollback"),
    *("trace record", "trace convert"),
    "config check",
    *("attach", "detach", "drain", "limit", "status", "analyze"),
)
"""Each is a module of `commands`, which declares it."""


class Command(Protocol):
    """What such a module has."""

    def add(self, commands: Commands, /) -> None:
        """Declare the command."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `words` are the arguments, by default those of this program."""
    if not __debug__:
        sys.stderr.write("forebay: runs only with its assertions on; start Python without -O and PYTHONOPTIMIZE\n")
        return EXIT_USAGE
    command = ""
    try:
        arguments = build_parser(sys.argv[1:] if words is None else words).parse_args(words)
        command = arguments.command
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except ForebayError as error:
        return _fail(command, str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output left, as `head` does; nobody is there to be told, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        return _fail(command, place + (error.strerror or str(error)), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", EXIT_FAILED)
    return code


def build_parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser of the command that the words begin with, or of all if they begin with none.

    One alone takes half the time and memory: each brings what it needs.
    """
    parser = Parser(
        prog="forebay",
        description="A write-back SSD cache in the hypervisor over a remote log-structured volume store.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    top = _group(parser)
    groups = {"": top}
    wanted = [command for command in COMMANDS if command.split() == list(words[: len(command.split())])]
    for command in wanted or COMMANDS:
        group = command.partition(" ")[0] if " " in command else ""
        if group not in groups:
            groups[group] = _group(_add_group(top, group, GROUPS[group]))
        _module_of(command).add(groups[group])
    return parser


def _module_of(command: str) -> Command:
    name = command.replace(" ", "_").replace("-", "_")
    module: Command = cast("Command", import_module(f"forebay_tools.commands.{name}"))
    return module


class _ShowVersion(argparse.Action):
    """Looks the version up only when asked: that costs as much as a whole command."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from importlib import metadata

        parser.exit(0, f"forebay {metadata.version('forebay')}\n")


def _group(parser: Parser) -> Commands:
    return parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)


def _add_group(commands: Commands, name: str, text: str) -> Parser:
    description = text[0].upper() + text[1:] + "."
    parser: Parser = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
    return parser


def _fail(command: str, text: str, code: int) -> int:
    line = " ".join(text.split())
    sys.stderr.write(f"forebay: {command}: {line}\n" if command else f"forebay: {line}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
