"""The command line: exit codes, one-line errors, and what it accepts."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forebay_tools.arguments import Parser
from forebay_tools.main import build_parser, main

VOLUME_COMMANDS = ("create", "import", "export", "list", "info", "resize", "clone", "flatten", "delete")
PYTHON_MAIN = [sys.executable, "-m", "forebay_tools.main"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FOREBAY_STORE", "FOREBAY_RUN_DIR", "FOREBAY_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


def complaint(capsys: pytest.CaptureFixture[str], words: Sequence[str], code: int) -> str:
    assert main(words) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("forebay: ")
    return output.err


def walk(parser: Parser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Parser]]:
    groups = [action for action in parser._actions if action.nargs == "A..."]
    if not groups:
        yield words, parser
    for group in groups:
        assert isinstance(group.choices, dict)
        for name, child in group.choices.items():
            yield from walk(child, (*words, name))


ALL = dict(walk(build_parser()))


def test_the_commands_of_the_design_exist() -> None:
    assert {" ".join(words) for words in ALL} == {
        "store serve",
        "store fsck",
        "store rebuild-index",
        "cache fsck",
        "cache salvage",
        "cache serve",
        *(f"volume {name}" for name in VOLUME_COMMANDS),
        *(f"snapshot {name}" for name in ("create", "list", "delete", "rollback")),
        "store clean",
        "store scrub",
        "attach",
        "detach",
        "drain",
        "limit",
        "status",
        "analyze",
        "trace convert",
        "trace record",
        "config check",
    }


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_helps_itself(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: forebay {' '.join(words)}" in text
    assert "None" not in text


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_flag_and_argument_is_explained(words: tuple[str, ...]) -> None:
    assert all(action.help for action in ALL[words]._actions)


LISTINGS = (
    "volume list",
    "volume info",
    "snapshot list",
    "status",
    "store fsck",
    "store clean",
    "store scrub",
    "limit",
)


@pytest.mark.parametrize("words", LISTINGS)
def test_every_listing_takes_json(words: str) -> None:
    assert "--json" in ALL[tuple(words.split())].format_help()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "COMMAND; see forebay --help"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["volume"], "see forebay volume --help"),
        (["volume", "create", "v"], "--size"),
        (["volume", "create", "v", "--size", "10 elephants"], "10GiB"),
        (["volume", "create", "v", "--size", "0"], "multiple of 4096"),
        (["volume", "create", "v", "--size", "4097"], "multiple of 4096"),
        (["volume", "create", "v", "--size", "9999999T"], "multiple of 4096 up to"),
        (["volume", "create", "../../etc", "--size", "1G"], "begin with a letter or digit"),
        (["volume", "create", "a\nb", "--size", "1G"], "volume name"),
        (["volume", "info", "x" * 129], "1 to 128"),
        (["volume", "resize", "v", "-1"], "SIZE"),
        (["volume", "create", "v@s", "--size", "1G"], "volume name 'v@s'"),
        (["snapshot", "create", "v"], "write VOLUME@SNAPSHOT"),
        (["snapshot", "create", "v@"], "write VOLUME@SNAPSHOT"),
        (["snapshot", "delete", "@s"], "write VOLUME@SNAPSHOT"),
        (["snapshot", "rollback", "a@b@c"], "write VOLUME@SNAPSHOT"),
        (["snapshot", "create", "v@../x"], "snapshot name '../x'"),
        (["snapshot", "create", "../v@x"], "volume name '../v'"),
        (["snapshot", "create", "v@" + "x" * 129], "1 to 128"),
        (["snapshot", "list", "v@s"], "volume name 'v@s'"),
        (["volume", "clone", "v", "w"], "write VOLUME@SNAPSHOT"),
        (["volume", "clone", "v@s", "w@x"], "volume name 'w@x'"),
        (["volume", "export", "v@", "f"], "write VOLUME@SNAPSHOT"),
        (["volume", "export", "v@s@t", "f"], "write VOLUME@SNAPSHOT"),
        (["volume", "export", "v", "f", "--since", "v@s"], "snapshot name 'v@s'"),
        (["attach", "@s"], "write VOLUME@SNAPSHOT"),
        (["detach", "v@s@t"], "write VOLUME@SNAPSHOT"),
        (["store", "scrub", "--rate", "1"], "is not from 512 KiB/s"),
        (["volume", "list"], "use --store HOST:PORT or set FOREBAY_STORE"),
        (["volume", "list", "--store", "nowhere"], "write HOST:PORT"),
        (["volume", "list", "--store", "a:1,b:2"], "write HOST:PORT"),
        (["volume", "list", "--sto", "a:1"], "unrecognized arguments"),
        (["volume", "import", "v", "f", "--format", "vmdk"], "choose from"),
        (["attach", "v"], "use --run-dir DIR or set FOREBAY_RUN_DIR"),
        (["attach", "v", "--front", "nfs"], "choose from 'nbd'"),
        (["attach", "v", "--block-size", "4096"], "--block-size is for --front kernel, not for nbd"),
        (["attach", "v", "--front", "kernel", "--block-size", "1024"], "choose from '512', '4096'"),
        (["detach", "v", "--timeout", "-1"], "is not a number of seconds from 0 to 86400"),
        (["detach", "v", "--timeout", "nan"], "is not a number of seconds from 0 to 86400"),
        (["status"], "--run-dir DIR or --store HOST:PORT"),
        (["store", "serve"], "store.data is missing"),
        (["store", "serve", "--data", "d", "--listen", "here"], 'store.listen = "here": allowed is HOST:PORT'),
        (["cache", "serve", "--fill-blocks", "3"], 'cache.fill_blocks = "3": allowed is 1, 2, 4, 8 or 16'),
        (["config", "check", "/does/not/exist"], "/does/not/exist: can't be read"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in complaint(capsys, words, 2)


def test_a_store_that_is_not_there_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, ["volume", "list", "--store", "127.0.0.1:1"], 1)
    assert line.startswith("forebay: volume list: no store answers (127.0.0.1:1")


def test_a_cache_that_is_not_there_is_one_line_and_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "start one with forebay cache serve" in complaint(capsys, ["status", "--run-dir", str(tmp_path)], 1)
    with socket.socket(socket.AF_UNIX) as stale:  # as a killed daemon leaves it
        stale.bind(str(tmp_path / "control.sock"))
    for command in (["drain", "v"], ["limit", "v"], ["status"]):
        told = complaint(capsys, [*command, "--run-dir", str(tmp_path)], 1)
        assert "if it has ended, start one with forebay cache serve" in told


def test_the_environment_stands_in_for_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_STORE", "127.0.0.1:1")
    monkeypatch.setenv("FOREBAY_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("FOREBAY_KEY_FILE", str(tmp_path / "key"))
    assert "key" in complaint(capsys, ["volume", "list"], 2)
    monkeypatch.delenv("FOREBAY_KEY_FILE")
    assert "127.0.0.1:1" in complaint(capsys, ["volume", "list"], 1)
    assert str(tmp_path) in complaint(capsys, ["detach", "v"], 1)


def test_config_check_tells_what_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text('[store]\ndata = "d"\n[cache]\ndevice = "c"\nrun_dir = "r"\nstore = "a:1"\n')
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: [store] and [cache] can be used\n"
    file.write_text("[cache]\nsize = 1\n")
    assert str(file) in complaint(capsys, ["config", "check", str(file)], 2)


@pytest.mark.parametrize("name", ["absent", "folder", "other.vmdk"])
def test_a_demonstration_of_an_image_that_is_none_starts_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.vmdk").write_bytes(b"KDMV" + bytes(4096))
    before = sorted(tmp_path.iterdir())
    environment = {**os.environ, "IMAGE": str(tmp_path / name)}
    words = [sys.executable, "-m", "forebay_tools.demo"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("forebay demo: ") and done.stderr.count("\n") == 1 and name in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_optimised_python_is_refused() -> None:
    ended = subprocess.run([sys.executable, "-O", *PYTHON_MAIN[1:], "--help"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "without -O" in ended.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text('[store]\ndata = "d"\n')
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [*PYTHON_MAIN, "config", "check", str(file)], stdout=writing, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_full_disk_below_stdout_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text('[store]\ndata = "d"\n')
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*PYTHON_MAIN, "config", "check", str(file)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 1
    assert ended.stderr == "forebay: config check: No space left on device\n"


def test_status_json_has_a_place_for_both(capsys: pytest.CaptureFixture[str]) -> None:
    from forebay_tools.commands.status import cache_json, store_json
    from forebay_wire.messages import CacheStatus, StoreStatus

    cache = CacheStatus("d", 1, 2, 3, 4, 5, 6, 2, 8, 9, 3, 11, "s:1", True, ())
    assert json.loads(json.dumps(cache_json(cache)))["hit_ratio"] == 0.75
    assert cache_json(cache)["compression_ratio"] == 3.0
    store = StoreStatus(1, 2, 3, 4, 5, 6, 7)
    assert store_json(store)["error"] is None
