"""The command `forebay`.

Exit codes: 0 done, 1 the operation failed, 2 wrong usage. What failed is one line on stderr.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from forebay_core.errors import EXIT_FAILED, EXIT_USAGE, ForebayError
from forebay_tools.arguments import Commands, Parser
from forebay_tools.commands import (
    analyze,
    attach,
    cache_fsck,
    cache_salvage,
    cache_serve,
    config_check,
    detach,
    drain,
    limit,
    snapshot_create,
    snapshot_delete,
    snapshot_list,
    snapshot_rollback,
    status,
    store_clean,
    store_fsck,
    store_rebuild_index,
    store_scrub,
    store_serve,
    trace_convert,
    trace_record,
    volume_clone,
    volume_create,
    volume_delete,
    volume_export,
    volume_flatten,
    volume_import,
    volume_info,
    volume_list,
    volume_resize,
)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `words` are the arguments, by default those of this program."""
    if not __debug__:
        sys.stderr.write("forebay: runs only with its assertions on; start Python without -O and PYTHONOPTIMIZE\n")
        return EXIT_USAGE
    command = ""
    try:
        arguments = build_parser().parse_args(words)
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


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="forebay",
        description="A write-back SSD cache in the hypervisor over a remote log-structured volume store.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    top = _group(parser)
    store = _group(_add_group(top, "store", "the store daemon and its data folder"))
    cache = _group(_add_group(top, "cache", "the cache daemon"))
    volume = _group(_add_group(top, "volume", "volumes in the store"))
    snapshot = _group(_add_group(top, "snapshot", "snapshots of volumes"))
    trace = _group(_add_group(top, "trace", "traces of block accesses"))
    config = _group(_add_group(top, "config", "the file with the settings of the daemons"))
    for module in (store_serve, store_clean, store_scrub, store_fsck, store_rebuild_index):
        module.add(store)
    for module in (cache_serve, cache_fsck, cache_salvage):
        module.add(cache)
    for module in (
        volume_create,
        volume_import,
        volume_export,
        volume_list,
        volume_info,
        volume_resize,
        volume_clone,
        volume_flatten,
        volume_delete,
    ):
        module.add(volume)
    for module in (snapshot_create, snapshot_list, snapshot_delete, snapshot_rollback):
        module.add(snapshot)
    for module in (attach, detach, drain, limit, status, analyze):
        module.add(top)
    trace_record.add(trace)
    trace_convert.add(trace)
    config_check.add(config)
    return parser


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
