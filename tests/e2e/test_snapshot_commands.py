"""Snapshots, clones and resizes by the command line, with real daemons: what is refused says what to do."""

import json

from e2e_rig import Rig

from forebay_core.units import BLOCK_SIZE, MIB

OLD, NEW = b"old!" * (BLOCK_SIZE // 4), b"new!" * (BLOCK_SIZE // 4)


def write(rig: Rig, name: str, plain: bytes, at: int = 0) -> None:
    with rig.nbd(name) as client:
        client.write(at, plain)


def test_a_snapshot_shows_the_moment_it_was_taken(rig: Rig) -> None:
    rig.start()
    rig.create("v", MIB)
    rig.attach("v")
    write(rig, "v", OLD)
    assert "snapshot v@s taken" in rig.run("snapshot", "create", "v@s", "--wait")
    write(rig, "v", NEW)
    rig.drain("v")
    listed = json.loads(rig.run("snapshot", "list", "v", "--json"))
    assert [(row["name"], row["pending"], row["size"]) for row in listed] == [("s", False, MIB)]
    assert listed[0]["unique_size"] > 0
    assert rig.exported("v@s")[:BLOCK_SIZE] == OLD
    assert rig.exported("v")[:BLOCK_SIZE] == NEW
    assert "taken" in rig.run("snapshot", "create", "v@t")
    assert "v" in rig.run("snapshot", "create", "v@t", code=1)


def test_a_snapshot_is_served_read_only(rig: Rig) -> None:
    rig.start()
    rig.create("v", MIB)
    rig.attach("v")
    write(rig, "v", OLD)
    rig.run("snapshot", "create", "v@s", "--wait")
    write(rig, "v", NEW)
    assert "/v%40s?" in json.loads(rig.run("attach", "v@s"))["uri"]
    with rig.nbd("v@s") as client:
        assert client.read(0, BLOCK_SIZE) == OLD
    with rig.nbd("v") as client:
        assert client.read(0, BLOCK_SIZE) == NEW
    rig.run("detach", "v@s")


def test_clones_and_their_origin_know_each_other(rig: Rig) -> None:
    rig.start()
    rig.create("v", MIB)
    rig.attach("v")
    write(rig, "v", OLD)
    rig.run("snapshot", "create", "v@s", "--wait")
    rig.run("volume", "clone", "v@s", "w")
    rig.run("attach", "w")
    write(rig, "w", NEW, BLOCK_SIZE)
    rig.drain("w")
    assert rig.exported("w") == OLD + NEW + bytes(MIB - 2 * BLOCK_SIZE)
    told = json.loads(rig.run("volume", "info", "v", "--json"))
    assert (told["snapshots"], told["clones"]) == (["s"], [{"name": "w", "snapshot": "s"}])
    assert json.loads(rig.run("volume", "info", "w", "--json"))["origin_name"] == "v@s"
    assert "w" in rig.run("snapshot", "delete", "v@s", code=1)
    rig.detach("v")
    assert "snapshot" in rig.run("volume", "delete", "v", code=1)
    rig.detach("w")
    assert "stands alone" in rig.run("volume", "flatten", "w", "--wait")
    assert rig.exported("w") == OLD + NEW + bytes(MIB - 2 * BLOCK_SIZE)
    rig.run("snapshot", "delete", "v@s")
    rig.run("volume", "delete", "v")
    assert rig.exported("w") == OLD + NEW + bytes(MIB - 2 * BLOCK_SIZE)
    assert "w" in rig.run("volume", "flatten", "w", code=1)


def test_rollback_needs_a_volume_that_is_not_attached(rig: Rig) -> None:
    rig.start()
    rig.create("v", MIB)
    rig.attach("v")
    write(rig, "v", OLD)
    rig.run("snapshot", "create", "v@s", "--wait")
    write(rig, "v", NEW)
    assert "v" in rig.run("snapshot", "rollback", "v@s", code=1)
    rig.detach("v")
    assert "is again as in snapshot v@s" in rig.run("snapshot", "rollback", "v@s")
    rig.attach("v")
    with rig.nbd("v") as client:
        assert client.read(0, BLOCK_SIZE) == OLD
    for words in (["rollback", "v@none"], ["delete", "v@none"], ["rollback", "none@s"], ["list", "none"]):
        assert "none" in rig.run("snapshot", *words, code=1)
    assert "none" in rig.run("volume", "clone", "v@none", "w", code=1)


def test_an_attached_volume_is_reached_through_the_store(rig: Rig) -> None:
    rig.start_store()
    rig.start_cache("--control", "127.0.0.1:0")
    rig.create("v", MIB)
    rig.attach("v")
    write(rig, "v", OLD)
    elsewhere = ("--run-dir", str(rig.folder))  # no daemon there
    assert "taken" in rig.run("snapshot", "create", "v@s", "--wait", *elsewhere)
    assert rig.exported("v@s")[:BLOCK_SIZE] == OLD
    assert "after they reconnect" in rig.run("volume", "resize", "v", "2MiB", *elsewhere)
    with rig.nbd("v") as client:
        assert client.read(MIB, BLOCK_SIZE) == bytes(BLOCK_SIZE)
    assert "detach" in rig.run("volume", "resize", "v", "1MiB", "--force", *elsewhere, code=1)
    rig.detach("v")
    assert "force" in rig.run("volume", "resize", "v", "1MiB", code=1)
    assert "v has 1 MiB now" in rig.run("volume", "resize", "v", "1MiB", "--force")


def test_a_holder_without_a_control_address_is_named(rig: Rig) -> None:
    rig.start()
    rig.create("v", MIB)
    rig.attach("v")
    refused = rig.run("snapshot", "create", "v@s", "--run-dir", str(rig.folder), code=1)
    assert refused.count("\n") == 1 and "run this on its host with --run-dir DIR, or detach it" in refused


def test_clean_and_scrub_end_well_on_a_sound_store(rig: Rig) -> None:
    rig.start()
    rig.create("v", 8 * MIB)
    rig.attach("v")
    for number in range(8):
        write(rig, "v", bytes([number]) * MIB, number * MIB)
    rig.detach("v")
    rig.run("volume", "delete", "v")
    told = json.loads(rig.run("store", "clean", "--json"))
    assert told["live_bytes"] == 0
    scrubbed = json.loads(rig.run("store", "scrub", "--json"))
    assert (scrubbed["damage"], scrubbed["running"]) == ([], False)


def test_a_snapshot_is_taken_while_the_store_is_away(rig: Rig) -> None:
    rig.start()
    rig.create("v", MIB)
    rig.attach("v")
    write(rig, "v", OLD)
    rig.kill_store()
    assert "it is on its way to the store" in rig.run("snapshot", "create", "v@s")
    write(rig, "v", NEW)
    assert "s" in rig.run("snapshot", "create", "v@s", code=1)
    assert "now" in rig.run("volume", "resize", "v", "2MiB")
    assert rig.status().volumes[0].pending_snapshots == ("s",)
    rig.kill_cache()
    rig.start_cache(wait=False)
    rig.start_store()
    rig.wait_status(lambda status: status.store_connected)
    rig.drain("v")
    listed = json.loads(rig.run("snapshot", "list", "v", "--json"))
    assert [(row["name"], row["pending"]) for row in listed] == [("s", False)]
    assert rig.exported("v@s") == OLD.ljust(MIB, b"\0")
    assert rig.exported("v") == NEW.ljust(2 * MIB, b"\0")
