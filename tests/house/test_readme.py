"""README and command line agree, in both directions.

The lists of commands and settings in the README are made from the parser: `python tests/house/test_readme.py`
rewrites them.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from forebay_core.config import SETTINGS, TABLE_NAMES
from forebay_core.units import format_size
from forebay_tools.arguments import Parser
from forebay_tools.main import build_parser

README = Path(__file__).resolve().parents[2] / "README.md"


def leaves(parser: Parser) -> Iterator[Parser]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for child in group.choices.values():
            yield from leaves(child)
    if not groups:
        yield parser


def synopsis(parser: Parser) -> str:
    """Return the command with its arguments and flags; daemons take each setting as a flag and show only --config."""
    words = [parser.prog]
    settings = "--config" in parser._option_string_actions
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        if "--help" in action.option_strings or (settings and "--config" not in action.option_strings):
            continue
        if not action.option_strings:
            words.append(str(action.metavar))
            continue
        flag = action.option_strings[0]
        value = "" if action.nargs == 0 else f" {action.metavar or '|'.join(action.choices or ())}"
        words.append(f"{flag}{value}" if action.required else f"[{flag}{value}]")
    return " ".join(words) + (" [--SETTING VALUE ...]" if settings else "")


def render_commands() -> str:
    lines = []
    for parser in leaves(build_parser()):
        text = parser.description or ""
        lines.append(f"- `{synopsis(parser)}`: {text[0].lower()}{text[1:].rstrip('.')}")
    return "\n".join(lines)


def render_settings() -> str:
    lines = []
    for table, settings in SETTINGS.items():
        lines += [f"| `[{TABLE_NAMES[table]}]` | default | meaning | allowed |", "|---|---|---|---|"]
        defaults = {field.name: field.default for field in msgspec.structs.fields(table)}
        for key, setting in settings.items():
            lines.append(f"| `{key}` | {shown(key, defaults[key])} | {setting.meaning} | {setting.allowed} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def shown(key: str, default: object) -> str:
    if default is msgspec.NODEFAULT:
        return "must be given"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return format_size(default) if isinstance(default, int) and "size" in key else str(default)


RENDERED = {"commands": render_commands, "settings": render_settings}


def section(text: str, name: str) -> tuple[int, int]:
    start = text.index(f"<!-- {name} -->") + len(f"<!-- {name} -->")
    return start, text.index(f"<!-- end of {name} -->")


def rewrite() -> None:
    text = README.read_text()
    for name, render in RENDERED.items():
        start, end = section(text, name)
        text = f"{text[:start]}\n\n{render()}\n\n{text[end:]}"
    README.write_text(text)


def shell_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


FOREBAY_LINES = [line for line in shell_lines() if line.startswith("forebay ")]


@pytest.mark.parametrize("name", RENDERED)
def test_the_lists_in_the_readme_are_those_of_the_code(name: str) -> None:
    text = README.read_text()
    start, end = section(text, name)
    assert text[start:end].strip() == RENDERED[name](), f"run: {sys.executable} {Path(__file__)}"


def test_the_readme_shows_commands() -> None:
    assert len(FOREBAY_LINES) >= 8


@pytest.mark.parametrize("line", FOREBAY_LINES)
def test_every_command_in_the_readme_is_one(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert build_parser().parse_args(words[1 : -1 if words[-1] == "&" else None])


def test_every_make_target_in_the_readme_exists_and_the_other_way_round() -> None:
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE)) - {"packages", "venv"}
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`[^`]*`|^make .*$", README.read_text(), re.M))))
    assert targets == named


if __name__ == "__main__":
    rewrite()
