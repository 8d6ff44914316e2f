"""The house is tidy: what STYLE.md asks for and a tool can see, checked on the syntax trees of all sources."""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from forebay_core.config import SETTINGS, TABLE_NAMES

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("storeserver", "cache", "tm_driver", "tools")
FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 700

BANNED_IN_CLASSES = {"manager", "helper", "helpers", "util", "utils", "data", "info", "handler"}
BANNED_IN_FUNCTIONS = {"manager", "helper", "helpers", "util", "utils", "info", "handler", "process", "handle", "do"}
BANNED_IN_MODULES = BANNED_IN_FUNCTIONS
MODULES_ALLOWED = {"volume_info"}  # named after the command `forebay volume info`, which is an interface that stays
PURE_FOLDERS = ("engine", "format")
PURE_MODULES_BANNED = {
    "asyncio",
    "concurrent",
    "io",
    "lmdb",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "selectors",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "uuid",
}
PURE_CALLS_BANNED = {"open", "print", "input", "exec", "eval", "breakpoint"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Source(NamedTuple):
    path: Path
    text: str
    tree: ast.Module

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@cache
def read(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(path, text, ast.parse(text, str(path)))


def sources() -> list[Source]:
    found = [read(path) for root in SOURCE_ROOTS for path in sorted((ROOT / root).rglob("*.py"))]
    assert len(found) > 20
    return found


def suite() -> list[Source]:
    return [read(path) for path in sorted((ROOT / "tests").rglob("*.py"))]


def bench() -> list[Source]:
    return [read(path) for path in sorted((ROOT / "bench").rglob("*.py"))]


def walk_functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def is_public(name: str) -> bool:
    return not name.startswith("_")


def words(name: str) -> set[str]:
    """Split a name of either case: `HTTPHandler` and `http_handler` hold `handler`."""
    apart = re.sub(r"([a-z0-9])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", name)
    return set(apart.lower().split("_"))


def complain(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def test_no_function_is_longer_than_60_lines() -> None:
    complain(
        [
            f"{source.at(node)}: {node.name} has {size} lines"
            for source in sources() + bench()
            for node in walk_functions(source.tree)
            if (size := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES_MAX
        ]
    )


def test_no_file_is_longer_than_700_lines() -> None:
    everything = sources() + suite() + bench()
    complain(
        [f"{source.path}: {size} lines" for source in everything if (size := source.text.count("\n")) > FILE_LINES_MAX]
    )


def test_every_module_opens_with_a_docstring() -> None:
    complain([str(source.path) for source in sources() + suite() + bench() if not ast.get_docstring(source.tree)])


def test_everything_public_has_a_docstring() -> None:
    complain([line for source in sources() for line in undocumented(source, source.tree)])


def undocumented(source: Source, parent: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            if not ast.get_docstring(node):
                yield f"{source.at(node)}: class {node.name}"
            yield from undocumented(source, node)
        elif (
            isinstance(node, FUNCTIONS)
            and is_public(node.name)
            and not ast.get_docstring(node)
            and not is_override(node)
        ):
            yield f"{source.at(node)}: {node.name}"


def is_override(node: Function) -> bool:
    marks = [ast.unparse(mark) for mark in node.decorator_list]
    return any(mark in ("override", "overload") or mark.endswith(".setter") for mark in marks)


def test_names_say_something() -> None:
    complain([line for source in sources() for line in empty_names(source)])


def empty_names(source: Source) -> Iterator[str]:
    stem = source.path.stem
    if stem not in MODULES_ALLOWED and (bad := words(stem) & BANNED_IN_MODULES):
        yield f"{source.path}: module name holds {bad}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and (bad := words(node.name) & BANNED_IN_CLASSES):
            yield f"{source.at(node)}: class {node.name} holds {bad}"
        if isinstance(node, FUNCTIONS) and (bad := words(node.name) & BANNED_IN_FUNCTIONS):
            yield f"{source.at(node)}: function {node.name} holds {bad}"


def test_engines_and_formats_touch_nothing_outside() -> None:
    pure = [source for source in sources() if set(PURE_FOLDERS) & set(source.path.parts)]
    assert pure
    complain([line for source in pure for line in impurities(source)])


def impurities(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PURE_CALLS_BANNED:
            yield f"{source.at(node)}: calls {node.func.id}"
        for name in imported:
            if name.split(".")[0] in PURE_MODULES_BANNED:
                yield f"{source.at(node)}: imports {name}"


def test_no_error_is_swallowed_unseen() -> None:
    complain(
        [
            f"{source.at(node)}: except {ast.unparse(node.type) if node.type else ''}: pass"
            for source in sources() + suite() + bench()
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ExceptHandler) and catches_all(node) and does_nothing(node.body)
        ]
    )


def catches_all(node: ast.ExceptHandler) -> bool:
    kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def does_nothing(body: list[ast.stmt]) -> bool:
    return all(
        isinstance(step, ast.Pass | ast.Continue)
        or (isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant))
        for step in body
    )


def test_nothing_is_left_to_be_done() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")
    complain(
        [
            f"{source.path}:{number}: {line.strip()}"
            for source in sources() + suite() + bench()
            if source.path != Path(__file__)
            for number, line in enumerate(source.text.splitlines(), 1)
            if unfinished.search(line)
        ]
    )


def test_no_test_sleeps_without_a_deadline() -> None:
    complain(
        [
            f"{source.at(call)}: sleeps, but {function.name} knows no deadline"
            for source in suite()
            for function in walk_functions(source.tree)
            for call in ast.walk(function)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "time.sleep"
            if not re.search(r"deadline|monotonic|timeout", ast.unparse(function))
        ]
    )


def test_test_files_have_names_of_their_own() -> None:
    names = [source.path.name for source in suite()]
    complain([f"{name} exists twice" for name in sorted(set(names)) if names.count(name) > 1 and name != "conftest.py"])
    complain([str(path) for path in (ROOT / "tests").rglob("__init__.py")])


def test_tests_stay_below_their_area() -> None:
    complain([str(path) for path in (ROOT / "tests").rglob("test_*.py") if path.parent.parent != ROOT / "tests"])


def test_packages_are_typed_and_listed_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["mypy"]["packages"])
    found = {path.parent.name for root in SOURCE_ROOTS for path in (ROOT / root).glob("*/py.typed")}
    assert packages == found
    assert packages == set(project["tool"]["importlinter"]["root_packages"])


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (empty_names, "class BlockManager: pass"),
        (empty_names, "class UserData: pass"),
        (empty_names, "def handle_read(): pass"),
        (empty_names, "def do_it(): pass"),
        (impurities, "import os.path"),
        (impurities, "from time import monotonic"),
        (impurities, "def f():\n    print(1)"),
    ],
)
def test_the_checks_find_what_they_look_for(check: Callable[[Source], Iterator[str]], text: str) -> None:
    assert list(check(Source(ROOT / "cache" / "x.py", text, ast.parse(text))))


def test_names_are_split_into_words() -> None:
    assert words("HTTPHandler") == {"http", "handler"}
    assert words("database_row") == {"database", "row"}
    assert words("StoreUnreachableError") == {"store", "unreachable", "error"}


def test_every_setting_is_used_by_its_daemon() -> None:
    packages = {"store": "forebay_store", "cache": "forebay_cache"}
    complain(
        [
            f"{name}.{key} is read and ignored"
            for table, settings in SETTINGS.items()
            for name in [TABLE_NAMES[table]]
            for key in settings
            if not any(
                re.search(rf"settings\.{key}\b", source.text)
                for source in sources()
                if packages[name] in source.path.parts
            )
        ]
    )
