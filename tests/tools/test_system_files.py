"""What `make install-system` puts where, and that systemd and the daemons understand it."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forebay_cache.service.device_links import RULES
from forebay_core.notify import Watchdog, notify, watchdog_period_s
from forebay_tools.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALL = REPOSITORY / "tools" / "system" / "install"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    install(tmp_path)
    return tmp_path


def install(root: Path) -> None:
    command = ["bash", str(INSTALL), str(Path(sys.executable).with_name("forebay"))]
    subprocess.run(command, env=os.environ | {"DESTDIR": str(root)}, check=True, capture_output=True)


def test_systemd_verifies_the_units(root: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here (package systemd)")
    units = sorted(map(str, (root / "etc/systemd/system").glob("*.service")))
    done = subprocess.run([analyze, "verify", "--man=no", *units], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "forebay" in line]
    assert len(units) == 2 and ours == []


def test_the_settings_that_are_installed_are_valid(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cache", "store"):
        assert main(["config", "check", str(root / f"etc/forebay/{name}.toml")]) == 0
    capsys.readouterr()


def test_settings_of_the_admin_stay_when_it_is_installed_again(root: Path) -> None:
    mine = root / "etc/forebay/cache.toml"
    mine.write_text("[cache]\n")
    install(root)
    assert mine.read_text() == "[cache]\n"
    assert "@FOREBAY@" not in (root / "etc/systemd/system/forebay-cache.service").read_text()


def test_the_daemon_looks_for_the_rule_under_the_name_that_is_installed(root: Path) -> None:
    assert (root / "etc/udev/rules.d" / RULES).exists()


def test_systemd_hears_from_a_loop_that_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "3000")

        async def turn() -> None:
            watchdog = Watchdog(asyncio.get_running_loop())
            watchdog.start()
            said = [await asyncio.to_thread(channel.recv, 100) for _ in range(3)]
            watchdog.stop()
            assert said == [b"WATCHDOG=1"] * 3

        asyncio.run(turn())


def test_a_service_manager_that_does_not_listen_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        queued = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 1
        said = [notify("WATCHDOG=1", patience_s=0) for _ in range(queued + 5)]
        assert said == [True] * queued + [False] * 5
        assert channel.recv(100) == b"WATCHDOG=1" and notify("READY=1")


def test_a_store_tells_systemd_that_it_is_ready_that_it_lives_and_that_it_ends(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(30)
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000"}
        command = [sys.executable, "-m", "forebay_tools.main", "store", "serve", "--data", str(tmp_path / "store")]
        with subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as store:
            said = [channel.recv(100) for _ in range(3)]
            store.terminate()
            while b"STOPPING=1" not in said:
                said.append(channel.recv(100))
    assert said[:3] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"] and store.returncode == 0


@pytest.mark.parametrize(
    ("period", "pid", "seconds"),
    [
        ("30000000", None, 10.0),
        ("30000000", "7", 10.0),
        ("30000000", "8", 0),
        (None, "7", 0),
        ("x", None, 0),
        ("", None, 0),
    ],
)
def test_only_the_watched_process_tells(period: str | None, pid: str | None, seconds: float) -> None:
    assert watchdog_period_s(period, pid, 7) == seconds
