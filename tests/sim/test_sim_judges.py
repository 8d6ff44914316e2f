"""Who may change a volume in the store: its holder under the newest epoch, and nobody else but the store when asked."""

from contextlib import closing

import pytest
from sim_index import DictIndex
from sim_judges import ZEROS, Branch, Official, StoreJudge
from sim_run import MS, PROFILES, Scenario
from sim_world import Violation

from forebay_core.units import BLOCK_SIZE, epoch_of, make_version
from forebay_store.engine.volumes import put_volume
from forebay_store.format.rows import VolumeState
from forebay_wire import messages

ID = bytes([1]) * 16
HOLDER = bytes([2]) * 16


class Watched:
    """A volume of zeros whose first holder wrote up to 1/5, with a second one that holds it by now, or released it."""

    def __init__(self) -> None:
        self.official = Official(ID, "v")
        self.official.version = make_version(1, 5)
        for epoch in (1, 2):
            branch = Branch(f"v under epoch {epoch}", self.official.version, {})
            branch.synced = make_version(epoch, 9)
            self.official.begin(epoch, branch)
        self.judge = StoreJudge()
        self.judge.volumes[ID] = self.official

    def show(self, version: int, *, writer: bytes) -> None:
        """Let the judge see the volume at a version of epoch 2 or before."""
        row = VolumeState(
            *(ID, "v", BLOCK_SIZE),
            epoch=2,
            version=version,
            committed_ns=0,
            created_ns=0,
            stored_size=0,
            data_blocks=0,
            floor=0,
            in_sync_version=0,
            writer=writer,
            origin=b"",
            number=1,
        )
        index = DictIndex()
        index.update(lambda rows: put_volume(rows, row))
        self.judge.shown(index, None)  # type: ignore[arg-type]


def test_a_holder_of_the_newest_epoch_changes_its_volume() -> None:
    watched = Watched()
    watched.show(make_version(2, 6), writer=HOLDER)
    assert watched.official.version == make_version(2, 6)


def test_an_older_epoch_changes_nothing_even_under_a_number_that_the_store_could_give() -> None:
    watched = Watched()
    watched.official.ask({})
    with pytest.raises(Violation, match="epoch 1 changed what epoch 2 holds"):
        watched.show(make_version(1, 6), writer=HOLDER)


@pytest.mark.parametrize("epoch", [1, 2])
def test_nobody_changes_a_released_volume(epoch: int) -> None:
    with pytest.raises(Violation, match="while nobody held"):
        Watched().show(make_version(epoch, 6), writer=b"")


def test_the_store_numbers_what_it_is_asked_for_behind_the_last_change() -> None:
    watched = Watched()
    watched.official.ask({})
    watched.show(make_version(1, 6), writer=b"")
    assert watched.official.version == make_version(1, 6)
    with pytest.raises(Violation, match="while nobody held"):
        watched.show(make_version(1, 7), writer=b"")


def test_the_store_shows_what_it_was_asked_for() -> None:
    watched = Watched()
    watched.official.ask({0: b"1" + ZEROS[1:]})
    with pytest.raises(Violation, match="is no past of it"):
        watched.show(make_version(1, 6), writer=b"")


def test_a_snapshot_of_a_volume_that_was_only_read_has_a_number_of_the_epoch_before() -> None:
    with closing(Scenario(0, PROFILES["family"])) as scenario:
        official = _clone_what_was_only_read(scenario)
    [(version, shown)] = official.snapshots.values()
    assert (official.epoch, epoch_of(version), shown) == (1, 0, {})


def _clone_what_was_only_read(scenario: Scenario) -> Official:
    scenario.store.start()
    scenario._create(messages.CreateVolume("red", 120 * BLOCK_SIZE), depth=4, pause_ns=8 * MS)
    red = scenario.guests["red"]
    red.kinds = {"read": 1}
    scenario.caches[0].start()
    scenario.place(red, scenario.caches[0])
    scenario._clone("green")
    assert red.requests
    return scenario.judge.volumes[red.id]
