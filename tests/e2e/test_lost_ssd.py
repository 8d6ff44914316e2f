"""A cache device that is lost, or comes back too late: the volume is its last cut, and what was not in it is saved."""

import json
import os
import time
from pathlib import Path

from e2e_rig import Rig

from forebay_core.units import BLOCK_SIZE, MIB

SIZE = 16 * MIB


def begin(rig: Rig) -> tuple[bytes, bytes, bytes]:
    """Write and drain `old`, then overwrite some of it and trim some; return old, what the guest sees, and the rest."""
    rig.cache_flags = ["--zone-size", "1MiB", "--cut-age-s-max", "3600"]
    rig.start()
    rig.create("disk", SIZE)
    rig.attach("disk")
    old, new = os.urandom(4 * MIB), os.urandom(MIB)
    with rig.nbd("disk") as client:
        client.write(0, old)
    rig.drain("disk")
    with rig.nbd("disk") as client:
        client.write(2 * MIB, new)
        client.trim(0, MIB)
        client.flush()
    seen = bytes(MIB) + old[MIB : 2 * MIB] + new + old[3 * MIB :]
    return old, seen, new


def take_over_on_a_new_device(rig: Rig) -> Path:
    """The host is gone: another device takes the volume. Returns where the old device is."""
    rig.kill_cache()
    lost = rig.folder / "lost"
    rig.device.rename(lost)
    rig.start_cache()
    assert "take it over" in rig.run("attach", "disk", code=1)
    rig.run("attach", "disk", "--take-over")
    return lost


def padded(content: bytes) -> bytes:
    return content + bytes(SIZE - len(content))


def told(rig: Rig, key: str) -> dict[str, int] | None:
    found: dict[str, dict[str, int] | None] = json.loads(rig.run("volume", "info", "disk", "--json"))
    return found[key]


def test_the_store_knows_how_far_a_lost_cache_was_ahead(rig: Rig) -> None:
    rig.cache_flags = ["--zone-size", "1MiB", "--cut-age-s-max", "3600"]
    rig.start()
    rig.create("disk", SIZE)
    rig.attach("disk")
    assert "no cache has reported" in rig.run("volume", "info", "disk")
    with rig.nbd("disk") as client:
        client.write(0, os.urandom(MIB))
        client.flush()
    deadline = time.monotonic() + 30
    while not (reported := told(rig, "held")) or not reported["changes"]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    sequence = rig.status().volumes[0].sequence
    assert reported["changes"] == sequence and reported["seconds"] > 0
    take_over_on_a_new_device(rig)
    lost = told(rig, "lost")
    assert lost is not None and (lost["changes"], lost["epoch"]) == (sequence, 1)
    assert f"{sequence} changes" in rig.run("volume", "info", "disk")
    rig.drain("disk")
    while not (reported := told(rig, "held")):
        assert time.monotonic() < deadline + 30
        time.sleep(0.5)
    assert reported["changes"] == 0 and told(rig, "lost") == lost


def test_without_the_ssd_the_volume_is_its_last_cut(rig: Rig) -> None:
    old, _, _ = begin(rig)
    take_over_on_a_new_device(rig).unlink()
    with rig.nbd("disk") as client:
        assert client.read(0, SIZE) == padded(old)
    row = json.loads(rig.run("volume", "info", "disk", "--json"))
    assert row["committed_sequence"] > 0 and row["committed_ns"] > 0


def test_a_device_that_comes_back_later_is_refused_and_its_changes_are_saved(rig: Rig) -> None:
    old, seen, new = begin(rig)
    lost = take_over_on_a_new_device(rig)
    with rig.nbd("disk") as client:
        client.write(8 * MIB, new)
    rig.detach("disk")
    rig.kill_cache()
    rig.device.unlink()
    lost.rename(rig.device)

    rig.start_cache()
    rig.wait_status(lambda status: bool(status.volumes[0].error))
    said = rig.run("attach", "disk", code=1)
    assert "changed elsewhere" in said and "forebay cache salvage" in said
    in_use = rig.run("cache", "salvage", "--device", str(rig.device), code=1)
    assert "in use by process" in in_use
    rig.run("detach", "disk", "--leave-dirty")
    said = rig.run("attach", "disk", code=1)
    assert "not merged" in said and "forebay cache salvage" in said
    rig.kill_cache()
    assert rig.exported("disk") == padded(old)[: 8 * MIB] + new + bytes(7 * MIB)

    before = rig.device.read_bytes()
    (listed,) = json.loads(rig.run("cache", "salvage", "--device", str(rig.device), "--json"))["volumes"]
    assert (listed["name"], listed["dirty_bytes"], listed["changes"] > 0) == ("disk", MIB, True)
    target = rig.folder / "saved"
    words = ("cache", "salvage", "--device", str(rig.device), "disk", str(target))
    assert "changes that are not in the store" in rig.run(*words)
    assert target.read_bytes() == padded(seen)  # all of it was cached
    saved = json.loads(Path(f"{target}.map.json").read_text())
    states = {state for _, _, state in saved["extents"]}
    assert states >= {"dirty", "dirty-hole", "cached", "absent"} and saved["bad_blocks"] == []
    assert sum(count for _, count, _ in saved["extents"]) == SIZE // BLOCK_SIZE
    assert [2 * MIB // BLOCK_SIZE, MIB // BLOCK_SIZE, "dirty"] in saved["extents"]
    assert "--force" in rig.run(*words, code=1)
    assert "can't tell any more" in rig.run(*words, "--force", "--store", rig.store_address, code=1)
    assert target.read_bytes() == padded(seen)
    assert rig.device.read_bytes() == before


def test_the_store_fills_what_is_not_cached_while_it_stands_where_it_did(rig: Rig) -> None:
    old, seen, _ = begin(rig)
    rig.kill_cache()
    rig.device.rename(rig.folder / "first")
    rig.start_cache()
    rig.run("attach", "disk", "--take-over")  # nothing is written there yet
    rig.kill_cache()
    device = rig.folder / "first"
    # Without any cached block left, only the store has them: the clean ones on the device are damaged.
    content = bytearray(device.read_bytes())
    for at in (MIB, MIB + 9 * BLOCK_SIZE, 3 * MIB):
        content[content.index(old[at : at + BLOCK_SIZE]) + 5] ^= 1
    device.write_bytes(content)
    target = rig.folder / "saved"
    words = ("cache", "salvage", "--device", str(device), "disk", str(target), "--store", rig.store_address)
    rig.run(*words)
    assert target.read_bytes() == padded(seen)


def test_a_damaged_device_saves_what_is_whole_and_names_the_rest(rig: Rig) -> None:
    _, seen, new = begin(rig)
    rig.wait_idle()  # only then the last record is known durable; damage in it would else look like an unfinished one
    rig.kill_cache()
    content = bytearray(rig.device.read_bytes())
    at = content.index(new[7 * BLOCK_SIZE : 8 * BLOCK_SIZE])
    content[at + 100] ^= 1
    rig.device.write_bytes(content)
    target = rig.folder / "saved"
    rig.run("cache", "salvage", "--device", str(rig.device), "disk", str(target), code=1)
    bad = 2 * MIB + 7 * BLOCK_SIZE
    assert target.read_bytes() == padded(seen[:bad] + bytes(BLOCK_SIZE) + seen[bad + BLOCK_SIZE :])
    assert json.loads(Path(f"{target}.map.json").read_text())["bad_blocks"] == [bad // BLOCK_SIZE]
    assert "no volume 'other'" in rig.run(
        "cache", "salvage", "--device", str(rig.device), "other", str(rig.folder / "x"), code=1
    )
    assert not (rig.folder / "x").exists()
