"""A guest on a volume while daemons are killed at any moment, again and again, and snapshots are taken in between."""

import random
import time
from pathlib import Path

import pytest
import vm_debian
from vm_host import HostCache, HostStore
from vm_image import CannotError
from vm_machine import Machine, nbd_drive
from vm_story import (
    VOLUME,
    assert_whole,
    check_elsewhere,
    complaints,
    names,
    start_writer,
    stop_writer,
    written,
)

ROUNDS = 16
SNAPSHOT_EVERY = 4
WRITING_S_MAX = 5.0
OUTAGE_S_MAX = 20.0


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_a_guest_lives_through_kills_at_any_moment(tmp_path: Path, seed: int) -> None:
    try:
        image = vm_debian.disk()
    except CannotError as error:
        pytest.skip(f"no guest can run here: {error}")
    chance = random.Random(seed)
    with HostStore(tmp_path / "store") as store, HostCache(tmp_path / "cache", store) as cache:
        store.forebay("volume", "import", VOLUME, str(image))
        cache.forebay("attach", VOLUME)
        with Machine(tmp_path / "machine", nbd_drive(cache.socket, VOLUME)) as machine:
            machine.booted()
            start_writer(machine)
            for number in range(ROUNDS):
                written(machine, len(written(machine)) + 5)
                outage(chance, store, cache)
                if number % SNAPSHOT_EVERY == 0:
                    snapshot(machine, store, cache, f"s{number}", tmp_path)
            sums = stop_writer(machine)
            log = written(machine)
            assert complaints(machine) == ""
            assert [name for name, total in sums.items() if name != total] == []
            assert sums.keys() == names(log)


def outage(chance: random.Random, store: HostStore, cache: HostCache) -> None:
    """Kill one daemon or both, and start them again in some order."""
    last(chance.uniform(0, WRITING_S_MAX))
    victims = chance.choice(((store,), (cache,), (cache,), (store, cache)))
    for one in victims:
        one.kill()
    for one in chance.sample(victims, len(victims)):
        last(chance.uniform(0, OUTAGE_S_MAX / len(victims)))
        one.start()


def snapshot(machine: Machine, store: HostStore, cache: HostCache, name: str, folder: Path) -> None:
    """Take one under the writer; it has what was there before and after it, and nothing that is not whole."""
    before = names(written(machine))
    cache.forebay("snapshot", "create", f"{VOLUME}@{name}", "--wait")
    after = names(written(machine))
    assert before & after <= assert_whole(check_elsewhere(store, name, folder))


def last(seconds: float) -> None:
    """Let the guest go on for so long."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(left)
