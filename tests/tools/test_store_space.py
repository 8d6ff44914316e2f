"""Cleaning, scrubbing and checking a real store by the command line: space comes back, damage is named."""

import json
import random
from pathlib import Path

from store_rig import Forebay, StoreProcess

from forebay_core.units import BLOCK_SIZE, MIB


def imported(forebay: Forebay, folder: Path, name: str, seed: int, size: int = 8 * MIB) -> bytes:
    content = random.Random(seed).randbytes(size)
    (folder / "image").write_bytes(content)
    assert forebay("volume", "import", name, folder / "image").code == 0
    return content


def disk_size(store: StoreProcess) -> int:
    return sum(path.stat().st_size for path in (store.data / "segments").iterdir())


def flip_a_bit(store: StoreProcess) -> Path:
    """Damage the middle of the largest segment."""
    segment = max((store.data / "segments").iterdir(), key=lambda path: path.stat().st_size)
    segment.chmod(0o600)
    with segment.open("r+b") as file:
        file.seek(segment.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return segment


def test_cleaning_gives_the_space_of_deleted_volumes_back(
    tmp_path: Path, store: StoreProcess, forebay: Forebay
) -> None:
    kept = imported(forebay, tmp_path, "kept", 1)
    imported(forebay, tmp_path, "gone", 2, 32 * MIB)
    assert disk_size(store) > 40 * MIB
    assert forebay("volume", "delete", "gone").code == 0
    told = json.loads(forebay("store", "clean", "--json").out)
    assert disk_size(store) < 10 * MIB and told["segment_bytes"] < 10 * MIB
    # The cleaner may have begun by itself, so only all in all is known.
    assert json.loads(forebay("status", "--json").out)["store"]["clean"]["bytes_freed"] > 30 * MIB
    assert "that is live" in forebay("store", "clean").out
    assert forebay("volume", "export", "kept", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == kept


def test_cleaning_keeps_what_snapshots_and_clones_show(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    old = imported(forebay, tmp_path, "v", 1)
    assert forebay("snapshot", "create", "v@s").code == 0
    assert forebay("volume", "clone", "v@s", "w").code == 0
    for seed in (2, 3, 4):
        new = random.Random(seed).randbytes(8 * MIB)
        (tmp_path / "image").write_bytes(new)
        assert forebay("volume", "import", "--onto", "v", tmp_path / "image").code == 0
    assert forebay("store", "clean").code == 0
    assert disk_size(store) < 20 * MIB
    for name, content in (("v", new), ("v@s", old), ("w", old)):
        assert forebay("volume", "export", name, tmp_path / "out", "--force").code == 0
        assert (tmp_path / "out").read_bytes() == content


def test_scrub_names_the_damaged_blocks_and_ends_with_code_1(
    tmp_path: Path, store: StoreProcess, forebay: Forebay
) -> None:
    imported(forebay, tmp_path, "v", 1)
    assert forebay("snapshot", "create", "v@s").code == 0
    sound = forebay("store", "scrub", "--rate", "1GiB/s")
    assert (sound.code, sound.err) == (0, "")
    assert "no damage is known" in sound.out
    segment = flip_a_bit(store)
    found = forebay("store", "scrub", "--json", "--rate", "1GiB/s")
    assert found.code == 1
    told = json.loads(found.out)
    assert len(told["damage"]) == 1
    damaged = told["damage"][0]
    assert damaged["volume"] in ("v", "v@s") and damaged["segment"] in segment.name
    assert 0 <= damaged["start"] < damaged["start"] + damaged["count"] <= 8 * MIB // BLOCK_SIZE
    text = forebay("store", "scrub", "--no-wait")
    assert (text.code, text.out.splitlines()[0].split()[0]) == (1, "VOLUME")
    assert "damaged extents" in forebay("status").out
    cleaned = forebay("store", "clean", "--json")
    assert (cleaned.code, json.loads(cleaned.out)["damage"]) == (1, told["damage"])
    assert forebay("store", "clean").out.splitlines()[1].startswith(damaged["volume"])


def test_a_leaked_segment_is_found_and_freed(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    content = imported(forebay, tmp_path, "v", 1)
    imported(forebay, tmp_path, "gone", 2)
    leaked = max((store.data / "segments").iterdir(), key=lambda path: path.stat().st_size)
    copy = tmp_path / "copy"
    copy.write_bytes(leaked.read_bytes())
    assert forebay("volume", "delete", "gone").code == 0
    assert forebay("volume", "delete", "v").code == 0
    imported(forebay, tmp_path, "v", 1)
    assert forebay("store", "clean").code == 0
    assert not leaked.exists()
    store.end()
    try:
        assert forebay("store", "fsck", "--data", store.data).code == 0
        leaked.write_bytes(copy.read_bytes())
        leaked.chmod(0o400)
        found = forebay("store", "fsck", "--data", store.data)
        assert found.code == 1 and leaked.name in found.out
        assert forebay("store", "fsck", "--data", store.data, "--repair").code in (0, 1)
        assert not leaked.exists()
        assert "nothing wrong" in forebay("store", "fsck", "--data", store.data).out
    finally:
        store.start(listen=store.address)
    assert forebay("volume", "export", "v", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == content
