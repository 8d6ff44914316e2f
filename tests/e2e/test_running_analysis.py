"""`forebay analyze` on a running host: what the daemon sampled, marked with its own size, over restarts."""

import json
from typing import Any

import numpy as np
from e2e_rig import Rig

from forebay_core.units import BLOCK_SIZE, MIB
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
