"""Addresses and keys that a daemon refuses: `forebay config check` refuses them as well, and nothing is made before."""

from pathlib import Path

import pytest

from forebay_core.config import CacheSettings
from forebay_core.errors import WrongUsageError
from forebay_tools.main import main
from forebay_wire.reach import check_reach

KEY = b"k" * 32
STORE = '[store]\ndata = "{folder}/data"\n'
CACHE = '[cache]\ndevice = "{folder}/cache.dev"\nsize = "64MiB"\nrun_dir = "{folder}/run"\nstore = "127.0.0.1:7300"\n'
REFUSED = {
    "nbd beyond loopback": (CACHE + 'nbd = "0.0.0.0:10809"\n', "nbd_allow_remote"),
    "nbd under a name": (CACHE + 'nbd = "host.example:10809"\n', "nbd_allow_remote"),
    "control beyond loopback": (CACHE + 'control = ":7301"\n', "give cache.key_file"),
    "control at an address that is none": (CACHE + 'control = "[::1::]:7301"\n', "write HOST:PORT"),
    "the cache's key file is missing": (CACHE + 'key_file = "{folder}/absent"\n', "No such file"),
    "others may read the cache's key": (CACHE + 'key_file = "{folder}/open.key"\n', "chmod 600"),
    "the store beyond loopback": (STORE + 'listen = "[::]:7300"\n', "give store.key_file"),
    "the store's key is too short": (STORE + 'key_file = "{folder}/short.key"\n', "a key has"),
    "the store's key file is a folder": (STORE + 'key_file = "{folder}"\n', "not a regular file"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content, mode in (("good", KEY, 0o600), ("open", KEY, 0o644), ("short", b"k", 0o600)):
        path = tmp_path / f"{name}.key"
        path.write_bytes(content)
        path.chmod(mode)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "forebay.toml"
    path.write_text(text.format(folder=folder))
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_check_and_daemon_refuse_the_same_and_make_nothing(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected = REFUSED[name]
    path = written(folder, text)
    before = sorted(folder.iterdir())
    lines = []
    for command in (["config", "check", str(path)], [text[1:6].strip("]"), "serve", "--config", str(path)]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
        lines.append(line)
    assert lines[0].endswith(lines[1].split(": ", 2)[2])
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "text",
    [
        STORE + 'listen = "0.0.0.0:7300"\nkey_file = "{folder}/good.key"\n',
        STORE + 'listen = "localhost:7300"\n' + CACHE + 'nbd = "[::1]:10809"\ncontrol = "127.0.0.1:7301"\n',
        CACHE + 'nbd = "0.0.0.0:10809"\nnbd_allow_remote = true\ncontrol = ":1"\nkey_file = "{folder}/good.key"\n',
    ],
)
def test_what_is_protected_can_be_used(text: str, folder: Path) -> None:
    assert main(["config", "check", str(written(folder, text))]) == 0


def test_the_address_of_the_store_is_one(folder: Path) -> None:
    check_reach(CacheSettings(device=folder, run_dir=folder, store=("127.0.0.1:1",)), None)
    with pytest.raises(WrongUsageError, match="HOST:PORT"):
        check_reach(CacheSettings(device=folder, run_dir=folder, store=("[::x]:1",)), None)
