"""Listings and long work of a store, as commands show them: snapshots, families, cleaning, scrubbing, flattening."""

import json
from pathlib import Path

import numpy as np
from fake_peer import Answer, Serve
from store_rig import Forebay
from test_holder import DEVICE, attached, status

from forebay_core.units import BLOCK_SIZE, GIB, MIB
from forebay_wire.messages import (
    PIECE_DTYPE,
    AnyMessage,
    CleanStatus,
    CleanStore,
    Damage,
    DamagedExtent,
    Done,
    FlattenVolume,
    GetCacheStatus,
    GetDamage,
    GetHeld,
    GetStoreStatus,
    GetVolume,
    Held,
    HeldReport,
    ListSnapshots,
    MapExtents,
    Mapped,
    ScrubStatus,
    ScrubStore,
    SnapshotRow,
    Snapshots,
    StoreStatus,
    Volume,
    VolumeRow,
)

NOBODY = Held(HeldReport(b"", 0, 0, 0, 0), HeldReport(b"", 0, 0, 0, 0), 0)


def snapshots(count: int) -> list[SnapshotRow]:
    rows = [SnapshotRow(bytes([n]) * 16, DEVICE, "v", f"s{n}", n + 1, GIB, n, n * MIB) for n in range(count)]
    rows[1] = SnapshotRow(b"1" * 16, DEVICE, "v", "s1", 2, GIB, 1, MIB, clones=("c1", "c2"))
    return rows


def family(count: int, row: VolumeRow) -> Answer:
    def answer(message: AnyMessage) -> AnyMessage | None:
        match message:
            case ListSnapshots():
                rows = [one for one in snapshots(count) if one.version > message.after][:3]
                return Snapshots(tuple(rows), bool(rows) and rows[-1].version < count)
            case GetVolume():
                return Volume(row)
            case GetHeld():
                return NOBODY
        return None

    return answer


def volume(**fields: object) -> VolumeRow:
    return VolumeRow(DEVICE, "v", GIB, 1, 9, 0, 0, b"", 0, 5, **fields)  # type: ignore[arg-type]


def test_all_pages_of_snapshots_are_listed_and_pending_ones_behind_them(
    tmp_path: Path, serve: Serve, forebay: Forebay
) -> None:
    far = serve(family(8, volume()))
    here = status(attached("v", "s7", "new"))
    serve(lambda message: here if isinstance(message, GetCacheStatus) else None, run_dir=tmp_path)
    where = ("--store", far.address, "--run-dir", tmp_path)
    listed = json.loads(forebay("snapshot", "list", "v", "--json", *where).out)
    assert [(row["name"], row["pending"]) for row in listed] == [*((f"s{n}", False) for n in range(8)), ("new", True)]
    assert (listed[1]["clones"], listed[2]["unique_size"], listed[8]["size"]) == (["c1", "c2"], 2 * MIB, None)
    lines = forebay("snapshot", "list", "v", *where).out.splitlines()
    assert lines[0].split() == ["SNAPSHOT", "TAKEN", "SIZE", "UNIQUE", "CLONES", "STATE"]
    assert lines[2].split() == ["s1", "1970-01-01", "00:00:00", "UTC", "1", "GiB", "1", "MiB", "c1,", "c2", "stored"]
    assert lines[9].split() == ["new", "-", "-", "-", "-", "pending"]


def test_a_list_that_does_not_go_on_is_an_error(serve: Serve, forebay: Forebay) -> None:
    far = serve(lambda _message: Snapshots(tuple(snapshots(2)), True))
    refused = forebay("snapshot", "list", "v", "--store", far.address)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "does not go on" in refused.err


def test_a_volume_shows_its_family(serve: Serve, forebay: Forebay) -> None:
    row = volume(origin=b"O" * 16, origin_name="base@gold", snapshots=30, clones=2, flattening=True, control="h:1")
    far = serve(family(30, row))
    told = json.loads(forebay("volume", "info", "v", "--json", "--store", far.address).out)
    assert (told["origin_name"], told["flattening"], told["control"]) == ("base@gold", True, "h:1")
    assert told["snapshots"] == [f"s{n}" for n in range(30)]
    assert told["clones"] == [{"name": "c1", "snapshot": "s1"}, {"name": "c2", "snapshot": "s1"}]
    text = forebay("volume", "info", "v", "--store", far.address).out
    assert "base@gold, being flattened" in text
    assert "c1 of s1, c2 of s1" in text
    assert "s19 and 10 more" in text


def test_a_volume_without_family_asks_for_no_list(serve: Serve, forebay: Forebay) -> None:
    far = serve(family(2, volume()))
    told = json.loads(forebay("volume", "info", "v", "--json", "--store", far.address).out)
    assert (told["snapshots"], told["clones"], told["origin_name"]) == ([], [], None)
    assert [type(message) for message in far.asked] == [GetVolume, GetHeld]


class Store:
    """Shows one status after the other, the last one for ever, and a few damaged extents."""

    def __init__(self, *statuses: StoreStatus, damaged: int = 0) -> None:
        self._statuses = list(statuses)
        self._damage = [DamagedExtent("v@s", n * 10, 1 + n, "0-7", 4096, "bad sum") for n in range(damaged)]

    def __call__(self, message: AnyMessage) -> AnyMessage | None:
        match message:
            case GetStoreStatus():
                return self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
            case CleanStore() | ScrubStore():
                return Done()
            case GetDamage():
                page = self._damage[message.after :][:2]
                return Damage(tuple(page), message.after + len(page) < len(self._damage))
        return None


def store_status(*, clean: CleanStatus | None = None, scrub: ScrubStatus | None = None, error: str = "") -> StoreStatus:
    return StoreStatus(1, 2, 3 * GIB, 4, 5, 6, 7, error, GIB, clean or CleanStatus(), scrub or ScrubStatus())


def test_clean_waits_for_its_pass_and_says_what_it_gave(serve: Serve, forebay: Forebay) -> None:
    before = store_status(clean=CleanStatus(True, 4, 1, MIB, 0))
    under_way = store_status(clean=CleanStatus(True, 4, 2, 2 * MIB, 0))
    after = store_status(clean=CleanStatus(False, 5, 4, 9 * MIB, MIB))
    far = serve(Store(before, under_way, under_way, after))
    done = forebay("store", "clean", "--store", far.address)
    assert done.out == ("8 MiB in 3 segments freed, 1 MiB copied; the store has 3 GiB on disk for 1 GiB that is live\n")
    far = serve(Store(before, after))
    told = json.loads(forebay("store", "clean", "--wait", "--json", "--store", far.address).out)
    assert (told["bytes_freed"], told["segments_freed"], told["bytes_copied"]) == (8 * MIB, 3, MIB)
    far = serve(Store(before))
    assert "is asked for" in forebay("store", "clean", "--no-wait", "--store", far.address).out


def test_a_pass_that_ended_early_and_a_store_that_refuses_are_errors(serve: Serve, forebay: Forebay) -> None:
    early = store_status(clean=CleanStatus(passes=1, error="disk full"))
    for after, part in (
        (early, "cleaning ended early: disk full"),
        (store_status(error="EIO"), "the store refuses changes: EIO"),
    ):
        far = serve(Store(store_status(), after))
        failed = forebay("store", "clean", "--store", far.address)
        assert (failed.code, failed.out, failed.err) == (1, "", f"forebay: store clean: {part}\n")


def test_scrub_waits_and_lists_all_damage_with_exit_code_1(serve: Serve, forebay: Forebay) -> None:
    before = store_status(scrub=ScrubStatus(finished_ns=5))
    under_way = store_status(scrub=ScrubStatus(True, MIB, 2 * MIB, 0, 6, 5))
    after = store_status(scrub=ScrubStatus(False, 2 * MIB, 2 * MIB, 5, 6, 8))
    far = serve(Store(before, under_way, after, damaged=5))
    done = forebay("store", "scrub", "--rate", "1MiB/s", "--store", far.address)
    assert (done.code, done.err) == (1, "")
    lines = done.out.splitlines()
    assert lines[1].split() == ["v@s", "0", "0", "0-7", "4096", "bad", "sum"]
    assert lines[5].split()[:3] == ["v@s", "40-44", str(40 * BLOCK_SIZE)]
    assert lines[6] == "2 MiB verified; 5 damaged extents are known"
    assert ScrubStore(MIB) in far.asked
    far = serve(Store(before, under_way, after, damaged=5))
    told = json.loads(forebay("store", "scrub", "--json", "--store", far.address).out)
    assert (len(told["damage"]), told["damage"][4]["start"], told["finished_ns"]) == (5, 40, 8)


def test_scrub_without_damage_is_code_0_and_one_that_stopped_is_not(serve: Serve, forebay: Forebay) -> None:
    before, stopped = store_status(), store_status(scrub=ScrubStatus(False, MIB, 2 * MIB, 0, 6, 0))
    whole = store_status(scrub=ScrubStatus(False, 2 * MIB, 2 * MIB, 0, 6, 8))
    done = forebay("store", "scrub", "--store", serve(Store(before, whole)).address)
    assert (done.code, done.out) == (0, "2 MiB verified; no damage is known\n")
    failed = forebay("store", "scrub", "--store", serve(Store(before, stopped)).address)
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    begun = forebay("store", "scrub", "--no-wait", "--store", serve(Store(before, damaged=1)).address)
    assert (begun.code, "1 damaged extents are known" in begun.out) == (1, True)


def test_status_shows_space_cleaning_and_scrub(serve: Serve, forebay: Forebay) -> None:
    far = serve(Store(store_status(scrub=ScrubStatus(damaged=2), clean=CleanStatus(bytes_freed=MIB))))
    text = forebay("status", "--store", far.address).out
    assert "1 GiB of it live" in text and "1 MiB freed" in text and "never; 2 damaged extents" in text
    told = json.loads(forebay("status", "--json", "--store", far.address).out)["store"]
    assert (told["live_bytes"], told["clean"]["bytes_freed"], told["scrub"]["damaged"]) == (GIB, MIB, 2)


def test_flatten_follows_to_the_end_only_if_asked(serve: Serve, forebay: Forebay) -> None:
    rows = [volume(origin=b"O" * 16, flattening=True)] * 3 + [volume()]

    def answer(message: AnyMessage) -> AnyMessage | None:
        match message:
            case FlattenVolume():
                return Done()
            case GetVolume():
                return Volume(rows.pop(0))
            case GetStoreStatus():
                return store_status()
            case MapExtents():
                return Mapped(np.array([(0, GIB // BLOCK_SIZE, 0, 0, 1)], PIECE_DTYPE).tobytes())
        return None

    far = serve(answer)
    assert "is being flattened" in forebay("volume", "flatten", "v", "--store", far.address).out
    assert [type(message) for message in far.asked] == [FlattenVolume]
    done = forebay("volume", "flatten", "v", "--wait", "--store", far.address)
    assert (done.code, done.out, rows) == (0, "volume v stands alone now, 20 KiB of it data\n", [])
