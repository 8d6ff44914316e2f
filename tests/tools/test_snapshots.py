"""Snapshots, clones and increments of volumes that nobody holds, by the command line against a real store."""

import json
import random
import shutil
from pathlib import Path

import pytest
from store_rig import Forebay, StoreProcess

from forebay_core.extents import Extent
from forebay_core.units import BLOCK_SIZE, MIB
from forebay_tools.qcow2_writer import Qcow2Writer

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
BLOCKS = 600


class Twin:
    """Volumes and snapshots in a store and what they should hold; changed by laying images over them."""

    def __init__(self, forebay: Forebay, folder: Path, seed: int) -> None:
        self.forebay = forebay
        self.chance = random.Random(seed)
        self._folder = folder
        self.volumes: dict[str, bytearray] = {}
        self.snapshots: dict[str, bytes] = {}

    def create(self, name: str) -> None:
        self.run("volume", "create", name, "--size", str(BLOCKS * BLOCK_SIZE))
        self.volumes[name] = bytearray(BLOCKS * BLOCK_SIZE)

    def run(self, *words: str | Path) -> str:
        done = self.forebay(*words)
        assert (done.code, done.err) == (0, ""), (words, done)
        return done.out

    def change(self, name: str) -> None:
        """Write and trim some blocks, as an increment does."""
        content, at = self.volumes[name], 0
        with (self._folder / "change").open("w+b") as file:
            writer = Qcow2Writer(file.fileno(), len(content))
            while (at := at + self.chance.choice([0, 1, 5, 50, 200])) < len(content) // BLOCK_SIZE:
                extent = Extent(at, min(self.chance.choice([1, 1, 2, 16, 40]), len(content) // BLOCK_SIZE - at))
                plain = bytes(extent.count * BLOCK_SIZE)
                if self.chance.random() < 0.3:
                    writer.add_zeros(extent)
                else:
                    plain = self.chance.randbytes(BLOCK_SIZE) * extent.count
                    for piece, offset in writer.add_data(extent):
                        writer.write(offset, plain[: piece.count * BLOCK_SIZE])
                content[extent.start * BLOCK_SIZE : extent.end * BLOCK_SIZE] = plain
                at = extent.end
            writer.finish()
        self.run("volume", "import", "--onto", name, self._folder / "change")

    def snapshot(self, name: str) -> None:
        self.run("snapshot", "create", name)
        self.snapshots[name] = bytes(self.volumes[name.partition("@")[0]])

    def exported(self, name: str, *words: str) -> bytes:
        target = self._folder / "exported"
        self.run("volume", "export", name, *words, target, "--force")
        return target.read_bytes()

    def check(self) -> None:
        for name, content in {**self.volumes, **self.snapshots}.items():
            assert self.exported(name) == content, name


@needs_qemu_img
@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_snapshots_and_clones_hold_what_they_held(
    tmp_path: Path, store: StoreProcess, forebay: Forebay, seed: int
) -> None:
    twin = Twin(forebay, tmp_path, seed)
    twin.create("v")
    for number in range(12):
        step = twin.chance.choice(["change", "change", "snapshot", "clone", "rollback", "delete"])
        volume = twin.chance.choice(sorted(twin.volumes))
        snapshots = sorted(name for name in twin.snapshots if name.startswith(f"{volume}@"))
        if step == "change":
            twin.change(volume)
        elif step == "snapshot" or not snapshots:
            twin.snapshot(f"{volume}@s{number}")
        elif step == "clone":
            twin.run("volume", "clone", snapshots[-1], f"c{number}")
            twin.volumes[f"c{number}"] = bytearray(twin.snapshots[snapshots[-1]])
        elif step == "rollback":
            chosen = twin.chance.choice(snapshots)
            twin.run("snapshot", "rollback", chosen)
            twin.volumes[volume][:] = twin.snapshots[chosen]
        elif twin.forebay("snapshot", "delete", snapshots[0]).code == 0:
            del twin.snapshots[snapshots[0]]
    twin.check()
    store.end()
    store.start(listen=store.address)
    twin.check()


@needs_qemu_img
@pytest.mark.parametrize("seed", range(3))
def test_increments_lead_from_snapshot_to_snapshot(
    tmp_path: Path, store: StoreProcess, forebay: Forebay, seed: int
) -> None:
    twin = Twin(forebay, tmp_path, seed)
    twin.create("base")
    twin.change("base")
    twin.snapshot("base@gold")
    twin.run("volume", "clone", "base@gold", "v")
    twin.volumes["v"] = bytearray(twin.snapshots["base@gold"])
    names = []
    for number in range(4):
        twin.snapshot(f"v@s{number}")
        names.append(f"v@s{number}")
        twin.change("v")
        if number == 2:
            twin.run("snapshot", "rollback", "v@s1")
            twin.volumes["v"][:] = twin.snapshots["v@s1"]
    names.append("v")
    twin.run("volume", "export", names[0], tmp_path / "whole")
    twin.run("volume", "import", "restored", tmp_path / "whole", "--format", "raw")
    twin.volumes["restored"] = bytearray(twin.snapshots[names[0]])
    for number, name in enumerate(names[1:]):
        twin.run("volume", "export", name, "--since", f"s{number}", tmp_path / f"inc{number}")
        twin.run("volume", "import", "--onto", "restored", tmp_path / f"inc{number}")
        twin.volumes["restored"] = bytearray(twin.snapshots.get(name, twin.volumes["v"]))
        assert twin.exported("restored") == twin.volumes["restored"], name
    twin.check()


def test_snapshots_are_listed_with_what_is_theirs_alone(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    (tmp_path / "image").write_bytes(random.Random(1).randbytes(MIB))
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    for name in ("first", "second"):
        assert forebay("snapshot", "create", f"v@{name}").out == f"snapshot v@{name} taken\n"
    (tmp_path / "image").write_bytes(random.Random(2).randbytes(MIB))
    assert forebay("volume", "import", "--onto", "v", tmp_path / "image").code == 0
    listed = json.loads(forebay("snapshot", "list", "v", "--json").out)
    assert [(row["name"], row["unique_size"]) for row in listed] == [("first", 0), ("second", 0)]
    assert forebay("snapshot", "delete", "v@first").code == 0
    assert json.loads(forebay("snapshot", "list", "v", "--json").out)[0]["unique_size"] >= MIB
    assert "second" in forebay("volume", "info", "v").out


def test_an_export_counts_all_that_it_copied(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    (tmp_path / "image").write_bytes(random.Random(1).randbytes(32 * MIB))
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    assert "32 MiB, 32 MiB of it data" in forebay("volume", "export", "v", tmp_path / "out").out


def test_what_depends_on_a_snapshot_keeps_it(store: StoreProcess, forebay: Forebay) -> None:
    assert forebay("volume", "create", "v", "--size", "1MiB").code == 0
    assert forebay("snapshot", "create", "v@s").code == 0
    for name in ("w", "x"):
        assert forebay("volume", "clone", "v@s", name).code == 0
    for words, parts in (
        (["snapshot", "delete", "v@s"], ["w", "x"]),
        (["volume", "delete", "v"], ["snapshot"]),
        (["snapshot", "create", "v@s"], ["a snapshot s already"]),
        (["volume", "clone", "v@s", "w"], ["w"]),
        (["volume", "flatten", "v"], ["v"]),
        (["snapshot", "delete", "v@t"], ["t"]),
        (["snapshot", "list", "none"], ["none"]),
        (["snapshot", "create", "none@s"], ["none"]),
        (["volume", "clone", "none@s", "y"], ["none"]),
        (["volume", "export", "v@t", "/does/not/matter"], ["t"]),
        (["volume", "resize", "w", "512KiB"], ["--force"]),
    ):
        refused = forebay(*words)
        assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1), words
        assert all(part in refused.err for part in parts), (words, refused.err)
    assert forebay("volume", "flatten", "w", "--wait").out.startswith("volume w stands alone now")
    assert forebay("volume", "delete", "x").code == 0
    assert forebay("snapshot", "delete", "v@s").code == 0
    assert forebay("volume", "delete", "v").code == 0


def test_a_volume_is_made_smaller_only_with_force(tmp_path: Path, store: StoreProcess, forebay: Forebay) -> None:
    image = random.Random(1).randbytes(MIB)
    (tmp_path / "image").write_bytes(image)
    assert forebay("volume", "import", "v", tmp_path / "image").code == 0
    assert forebay("snapshot", "create", "v@s").code == 0
    assert forebay("volume", "resize", "v", "512KiB").code == 1
    assert forebay("volume", "resize", "v", "512KiB", "--force").out == "volume v has 512 KiB now\n"
    assert forebay("volume", "resize", "v", "1MiB").code == 0
    for name, content in (("v", image[: MIB // 2] + bytes(MIB // 2)), ("v@s", image)):
        assert forebay("volume", "export", name, tmp_path / "out", "--force").code == 0
        assert (tmp_path / "out").read_bytes() == content


def test_a_volume_that_had_no_cut_yet_tells_no_time_of_one(store: StoreProcess, forebay: Forebay) -> None:
    forebay("volume", "create", "vm1", "--size", "16MiB")
    forebay("snapshot", "create", "vm1@new")
    out = forebay("volume", "info", "vm1").out
    assert "newest cut: sequence 1 of epoch 0\n" in out
