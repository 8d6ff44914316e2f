"""The commands that the README shows for use by hand, run as they are written (on a free port)."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forebay_core.units import MIB

README = Path(__file__).resolve().parents[2] / "README.md"
PORT = "7300"
COMMAND_TIMEOUT_S = 120
SECTIONS = (
    "By hand",
    "Snapshots and clones",
    "Incremental backup",
    "Space: trim, clean, scrub",
    "Keys and networks",
)


def lines_below(*titles: str) -> list[str]:
    found: list[str] = []
    for title in titles:
        section = re.search(rf"^## {title}$(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)
        assert section is not None
        for block in re.findall(r"```sh\n(.*?)```", section[1], re.DOTALL):
            found += block.splitlines()
    return found


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


class Shell:
    """Runs lines one after the other as somebody would type them, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        commands = folder / "bin"
        commands.mkdir()
        (commands / "forebay").write_text(f'#!/bin/sh\nexec {sys.executable} -m forebay_tools.main "$@"\n')
        (commands / "forebay").chmod(0o755)
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")} | {
            "PATH": f"{commands}:{os.environ['PATH']}"
        }
        self.daemons: list[subprocess.Popen[str]] = []

    def type(self, line: str) -> str:
        if line.startswith("export "):
            name, value = line.removeprefix("export ").split("=", 1)
            self._environment[name] = value
            return ""
        if line.endswith("&"):
            self._start(line)
            return ""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _start(self, line: str) -> None:
        child = subprocess.Popen(
            ["bash", "-c", "exec " + line.removesuffix("&")],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.daemons.append(child)
        assert child.stdout is not None
        assert re.search("ready|listening", child.stdout.readline(), re.IGNORECASE), line

    def end(self) -> None:
        for child in reversed(self.daemons):
            child.terminate()
            assert child.stdout is not None
            child.stdout.close()
            child.wait(timeout=COMMAND_TIMEOUT_S)


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils is not installed")
def test_the_commands_of_the_readme_run_as_written(tmp_path: Path) -> None:
    image = random.Random(1).randbytes(3 * MIB)
    (tmp_path / "disk.img").write_bytes(image)
    shell = Shell(tmp_path)
    port = free_port()
    printed = {}
    try:
        for line in lines_below(*SECTIONS):
            printed[line] = shell.type(line.replace(PORT, port))
        shell.type("forebay detach debian")
        for name in ("debian@monday", "restored", "vm1"):
            shell.type(f"forebay volume export {name} {name}.out")
    finally:
        shell.end()
    expected = bytearray(image)
    expected[MIB : MIB + 65536] = b"\x07" * 65536
    assert (tmp_path / "copy.img").read_bytes() == expected
    assert (tmp_path / "base.raw").read_bytes() == expected
    clone = bytearray(expected)
    clone[:65536] = b"\x09" * 65536
    assert (tmp_path / "vm1.out").read_bytes() == clone
    expected[2 * MIB : 2 * MIB + 65536] = b"\x05" * 65536
    expected[:65536] = bytes(65536)
    assert (tmp_path / "debian@monday.out").read_bytes() == expected
    assert (tmp_path / "restored.out").read_bytes() == expected
    assert printed["forebay attach debian"].startswith('{"uri": "nbd+unix:///debian?socket=')
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert len(shell.daemons) == 2
