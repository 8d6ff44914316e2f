"""What the cache daemon refuses to start with or to do, and how it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
from e2e_rig import FOREBAY, Rig

from forebay_core.errors import RefusedError
from forebay_core.units import MIB
from forebay_wire import messages


def refused(rig: Rig, *flags: str) -> str:
    """Start a cache that must end by itself with exit code 1 or 2; return its one line."""
    rig.start_cache(*flags, wait=False)
    assert rig.cache is not None
    code = rig.cache.wait()
    assert code in (1, 2), rig.cache.output
    lines = [line for line in rig.cache.output.splitlines() if line.startswith("forebay: ")]
    assert len(lines) == 1 and "Traceback" not in rig.cache.output, rig.cache.output
    return lines[0]


@pytest.mark.parametrize("content", [b"\x55" * 8192, bytes(4096) + b"LUKS" + bytes(4092)])
def test_a_device_with_something_foreign_is_refused_and_left_alone(rig: Rig, content: bytes) -> None:
    rig.device.write_bytes(content + bytes(48 * MIB - len(content)))
    assert "--format" in refused(rig)
    assert rig.device.read_bytes()[: len(content)] == content
    rig.start_cache("--format")
    assert rig.cache is not None and rig.cache.stop() == 0


def test_a_first_start_that_fails_leaves_no_device_behind(rig: Rig) -> None:
    assert "too small" in refused(rig, "--size", "16MiB")
    assert not rig.device.exists()


def test_there_is_no_writer_of_a_snapshot_to_take_over_from(rig: Rig) -> None:
    assert "nobody writes it" in rig.run("attach", "disk@s", "--take-over", "--run-dir", str(rig.run_dir), code=2)


def test_a_device_with_both_superblocks_damaged_is_refused(rig: Rig) -> None:
    rig.start_cache()
    assert rig.cache is not None and rig.cache.stop() == 0
    with rig.device.open("r+b") as file:
        for offset in (100, 4196):
            file.seek(offset)
            file.write(b"\xff")
    assert "superblock" in refused(rig)


def test_one_damaged_superblock_is_no_harm(rig: Rig) -> None:
    rig.start_cache()
    assert rig.cache is not None and rig.cache.stop() == 0
    with rig.device.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    rig.start_cache()


def test_a_device_that_holds_dirty_data_is_not_formatted(rig: Rig) -> None:
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    rig.kill_store()
    with rig.nbd("disk") as client:
        client.write(0, os.urandom(MIB))
    rig.kill_cache()
    assert "changes of volume disk" in refused(rig, "--format")
    rig.start_cache()
    with rig.nbd("disk") as client:
        assert any(client.read(0, MIB))


def test_a_device_or_run_directory_in_use_is_refused(rig: Rig) -> None:
    rig.start_cache()
    first = rig.cache
    try:
        assert "another cache daemon uses it" in refused(rig)
        ours, rig.run_dir = rig.run_dir, rig.folder / "run2"
        assert f"in use by process {first.pid}" in refused(rig) if first is not None else False
        rig.run_dir = ours
    finally:
        rig.cache = first


def test_a_device_that_is_too_small_is_refused(rig: Rig) -> None:
    rig.cache_size = "4MiB"
    assert "too small" in refused(rig)


def test_a_wrong_key_is_said_and_nothing_else_happens(rig: Rig) -> None:
    for name, key in (("right", b"k" * 32), ("wrong", b"w" * 32)):
        path = rig.folder / name
        path.write_bytes(key)
        path.chmod(0o600)
    rig.store_flags = ["--key-file", str(rig.folder / "right")]
    rig.start_store()
    rig.key = b"k" * 32
    rig.create("disk")
    rig.start_cache("--key-file", str(rig.folder / "wrong"))
    status = rig.wait_status(lambda status: status.error != "")
    assert "key" in status.error and not status.store_connected
    with pytest.raises(RefusedError, match="key"):
        rig.attach("disk")
    assert rig.cache is not None and rig.cache.stop() == 0
    rig.start_cache("--key-file", str(rig.folder / "right"))
    rig.wait_status(lambda status: status.store_connected)
    rig.attach("disk")


def test_commands_for_what_is_not_there_say_so(rig: Rig) -> None:
    rig.start()
    rig.wait_status(lambda status: status.store_connected)
    for act in (rig.attach, rig.detach, rig.drain):
        with pytest.raises(RefusedError) as refused_:
            act("no-such")
        assert refused_.value.code in (messages.NO_SUCH_VOLUME, messages.NOT_ATTACHED)
    assert "no-such" in rig.run("attach", "no-such", code=1)


def test_python_without_checks_is_refused(rig: Rig) -> None:
    command = [sys.executable, "-O", *FOREBAY[1:], "cache", "serve", "--device", str(rig.device), "--size", "48MiB"]
    command += ["--run-dir", str(rig.run_dir), "--store", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and "-O" in done.stderr
    assert not rig.device.exists()


def test_a_stopped_cache_leaves_clients_a_closed_connection_and_no_sockets(rig: Rig) -> None:
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    with rig.nbd("disk") as client:
        client.write(0, b"kept" * 1024)
        assert rig.cache is not None and rig.cache.stop() == 0
        with pytest.raises((ConnectionError, BrokenPipeError)):
            client.read(0, 4096)
    assert [path.name for path in rig.run_dir.iterdir() if path.is_socket()] == []
    rig.start_cache()
    with rig.nbd("disk") as client:
        assert client.read(0, 4096) == b"kept" * 1024


def test_told_twice_it_ends_at_once(rig: Rig) -> None:
    rig.start()
    rig.create("disk")
    rig.attach("disk")
    rig.kill_store()
    with rig.nbd("disk") as client:
        rig.wait_status(lambda status: not status.store_connected)
        client.submit(0, 8 * MIB, 4096)  # a miss that waits, and holds up the end for its grace
        assert rig.cache is not None
        rig.cache.signal(signal.SIGTERM)
        rig.cache.wait_for("stopping")
        began_s = time.monotonic()
        rig.cache.signal(signal.SIGTERM)
        assert rig.cache.wait() == 1
        assert time.monotonic() - began_s < 2


def test_nbd_over_tcp_and_control_over_tcp_answer_where_they_say(rig: Rig) -> None:
    rig.start_store()
    rig.start_cache("--nbd", "127.0.0.1:0", "--control", "127.0.0.1:0")
    assert rig.cache is not None
    match = rig.cache.wait_for(r"READY .*nbd=tcp:(\S+) control=tcp:(\S+)")
    listed = subprocess.run(["nbdinfo", "--list", f"nbd://{match[1]}"], capture_output=True, text=True, check=False)
    assert "protocol" in listed.stdout + listed.stderr
