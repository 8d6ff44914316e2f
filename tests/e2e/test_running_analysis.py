"""`forebay analyze` on a running host, from what the daemon sampled, and `forebay trace record`."""

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from e2e_rig import FOREBAY, READY_TIMEOUT_S, Rig

from forebay_core.units import BLOCK_SIZE, MIB
from forebay_tools.analysis.traces import read_trace
from forebay_wire.messages import GetSample, Sample


def busy(rig: Rig, *, rounds: int = 6) -> None:
    """Use a hot MiB of one volume again and again, and a cold MiB of another one once."""
    rig.start()
    for name in ("hot", "cold"):
        rig.create(name)
        rig.attach(name)
    with rig.nbd("hot") as client:
        client.write(0, bytes(range(256)) * 4096)
        for _ in range(rounds):
            for at in range(0, MIB, 65536):
                client.read(at, 65536)
    with rig.nbd("cold") as client:
        client.write(0, bytes(range(256)) * 4096)


def analyzed(rig: Rig, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rig.run("analyze", "--json", *words))
    return found


def sampled_accesses(rig: Rig) -> int:
    return rig.ask_cache(GetSample(), Sample).accesses


def test_a_running_host_answers_from_what_it_was_asked_for(rig: Rig) -> None:
    busy(rig)
    found = analyzed(rig)
    blocks = MIB // BLOCK_SIZE
    assert found["accesses"] == 8 * blocks
    assert found["distinct_blocks"] == 2 * blocks
    assert found["today"]["size_bytes"] == rig.status().capacity_bytes
    uses = {volume["name"]: volume for volume in found["volumes"]}
    assert uses["hot"]["working_set_blocks"] == uses["cold"]["working_set_blocks"] == blocks
    assert uses["hot"]["hit_share"] > 0.99 > 0.01 > uses["cold"]["hit_ratio"]
    assert found["curve"][-1]["hit_ratio"] == np.float64(1 - 2 * blocks / found["accesses"])
    assert "thin evidence" in rig.ask("analyze").stderr
    rig.detach("cold")
    assert {volume["name"] for volume in analyzed(rig)["volumes"]} == {"hot", "cold (detached)"}


def test_the_sample_outlives_the_daemon(rig: Rig) -> None:
    busy(rig)
    before = sampled_accesses(rig)
    assert rig.cache is not None and rig.cache.stop() == 0
    rig.start_cache()
    assert sampled_accesses(rig) == before
    with rig.nbd("hot") as client:
        client.read(0, 65536)
    assert sampled_accesses(rig) == before + 16


def test_a_damaged_sample_is_a_line_in_the_log_and_no_more(rig: Rig) -> None:
    busy(rig, rounds=1)
    assert rig.cache is not None and rig.cache.stop() == 0
    path = rig.run_dir / "sample"
    path.write_bytes(path.read_bytes()[:-9])
    rig.start_cache()
    assert rig.cache is not None
    assert rig.cache.output.count("begins anew") == 1
    complaint = rig.run("analyze", code=1)
    assert "no access yet" in complaint and complaint.count("\n") == 1


def test_an_attached_snapshot_leaves_no_trace(rig: Rig) -> None:
    busy(rig, rounds=1)
    rig.run("snapshot", "create", "hot@one", "--wait")
    before = sampled_accesses(rig)
    rig.attach("hot@one", read_only=True)
    with rig.nbd("hot@one") as client:
        client.read(0, 65536)
    assert sampled_accesses(rig) == before


# --- trace record -----------------------------------------------------------------------------------------------


@contextmanager
def recording(rig: Rig, *words: str, file_size_max: int = resource.RLIM_INFINITY) -> Iterator[subprocess.Popen[str]]:
    """Record until the block ends; by then the file has begun."""
    file = Path(words[-1])
    command = [*FOREBAY, "trace", "record", *words, "--run-dir", str(rig.run_dir)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_max, file_size_max)),
    )
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (file.exists() and file.stat().st_size):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str], number: int = 0) -> tuple[int, str, str]:
    if number:
        os.kill(process.pid, number)
    out, err = process.communicate(timeout=READY_TIMEOUT_S)
    return process.returncode, out, err


def requests(path: Path) -> list[tuple[str, int, int, bool]]:
    found = []
    for part in read_trace(path):
        rows = zip(part.batch.keys.tolist(), part.batch.counts.tolist(), part.batch.writes.tolist(), strict=True)
        found += [(part.volumes[key >> 40], key & (1 << 40) - 1, count, write) for key, count, write in rows]
    return found


def test_what_guests_ask_for_is_recorded_until_interrupted(rig: Rig, tmp_path: Path) -> None:
    busy(rig, rounds=1)
    one, every = tmp_path / "one", tmp_path / "all"
    with recording(rig, "hot", str(one)) as first, recording(rig, "--all", str(every)) as second:
        with rig.nbd("hot") as hot, rig.nbd("cold") as cold:
            hot.read(8192, 12288)
            cold.write(4096, bytes(4096))
            hot.write(0, bytes(8192))
            cold.read(512, 512)
        code, out, err = ended(first, signal.SIGINT)
        assert (code, err) == (0, "") and "2 requests" in out
        code, out, err = ended(second, signal.SIGTERM)
        assert (code, err) == (0, "") and "4 requests" in out
    assert requests(one) == [("hot", 2, 3, False), ("hot", 0, 2, True)]
    cold_ones = [("cold", 1, 1, True), ("cold", 0, 1, False)]
    assert sorted(requests(every)) == sorted([*requests(one), *cold_ones])
    assert json.loads(rig.run("analyze", "--json", str(every)))["accesses"] == 7
    rig.run("trace", "convert", str(every), str(tmp_path / "converted"))
    assert requests(tmp_path / "converted") == requests(every)


def test_a_daemon_that_dies_leaves_what_was_recorded(rig: Rig, tmp_path: Path) -> None:
    busy(rig, rounds=1)
    file = tmp_path / "trace"
    with recording(rig, "hot", str(file)) as process:
        with rig.nbd("hot") as client:
            client.read(0, 4096)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while file.stat().st_size < 64:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        rig.kill_cache()
        code, out, err = ended(process)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "does not answer any more" in err and "has the 1 requests" in err
    assert requests(file) == [("hot", 0, 1, False)]


def test_a_full_disk_ends_the_recording_and_leaves_whole_rows(rig: Rig, tmp_path: Path) -> None:
    busy(rig, rounds=1)
    file = tmp_path / "trace"
    with recording(rig, "hot", str(file), file_size_max=16 + 32 + 100 * 16 + 7) as process:
        with rig.nbd("hot") as client:
            for _ in range(300):
                client.read(0, 4096)
        code, out, err = ended(process)
        assert (code, out, err.count("\n")) == (1, "", 1) and "too large" in err
    assert file.stat().st_size % 16 == 0
    if file.stat().st_size > 16:
        assert set(requests(file)) == {("hot", 0, 1, False)}


def test_what_can_not_be_recorded_is_a_line(rig: Rig, tmp_path: Path) -> None:
    busy(rig, rounds=1)
    there = tmp_path / "there"
    there.write_text("mine")
    for words, said in (
        (("nobody", str(tmp_path / "new")), "not attached"),
        (("hot", str(there)), "exists already"),
        (("hot", str(tmp_path / "no" / "folder")), "No such file"),
    ):
        complaint = rig.run("trace", "record", *words, "--seconds", "9", code=1)
        assert said in complaint and complaint.count("\n") == 1
    assert there.read_text() == "mine" and not (tmp_path / "new").exists()
    for words in (("--all", "hot", str(there)), (str(there),)):
        assert "record what?" in rig.run("trace", "record", *words, code=2)
    rig.run("trace", "record", "hot", str(there), "--seconds", "0.1", "--force")
    assert there.read_bytes().startswith(b"FBTRACE1")
