"""kill -9 of cache and store at random moments under load, with comparison of everything afterwards."""

import random
import threading
import time

import pytest
from e2e_load import History
from e2e_rig import Rig

from forebay_core.units import BLOCK_SIZE, MIB

BLOCKS = 2048
SIZE = BLOCKS * BLOCK_SIZE


def read_all(rig: Rig) -> bytes:
    with rig.nbd("disk") as client:
        return b"".join(client.read(at, MIB) for at in range(0, SIZE, MIB))


def load_and_kill(rig: Rig, history: History, kill_after_s: float) -> None:
    with rig.nbd("disk") as client:
        killer = threading.Timer(kill_after_s, rig.kill_cache)
        killer.start()
        try:
            history.run(client, depth=16, until=lambda: False)
        finally:
            killer.join()


@pytest.mark.parametrize(("seed", "cache_size"), [(1, "48MiB"), (2, "12MiB")])
def test_acknowledged_writes_survive_kill_of_the_cache_under_load(rig: Rig, seed: int, cache_size: str) -> None:
    rig.cache_size = cache_size  # the small one wraps, so zones are reclaimed under load
    rig.cache_flags = ["--zone-size", "256KiB", "--cut-age-s-max", "0.3"]
    moments = random.Random(seed)
    history = History(BLOCKS, seed)
    rig.start()
    rig.create("disk", SIZE)
    rig.attach("disk")
    for _ in range(4):
        load_and_kill(rig, history, moments.uniform(0.05, 1.2))
        began_s = time.monotonic()
        rig.start_cache()
        assert rig.cache is not None
        content = read_all(rig)
        assert time.monotonic() - began_s < 20
        history.verify(content)
        history.settle(content)
    assert history.acknowledged > 100 and history.flushed > 5
    rig.detach("disk")
    history.verify(rig.exported("disk"))


@pytest.mark.parametrize("seed", [3])
def test_nothing_is_lost_when_the_store_is_killed_under_load(rig: Rig, seed: int) -> None:
    moments = random.Random(seed)
    history = History(BLOCKS, seed)
    rig.cache_flags = ["--zone-size", "1MiB", "--cut-age-s-max", "0.1"]
    rig.start()
    rig.create("disk", SIZE)
    rig.attach("disk")
    with rig.nbd("disk") as client:
        for _ in range(4):
            until_s = time.monotonic() + moments.uniform(0.3, 1.0)
            history.run(client, depth=16, until=lambda until_s=until_s: time.monotonic() > until_s)
            rig.kill_store()
            until_s = time.monotonic() + 0.2
            history.run(client, depth=16, until=lambda until_s=until_s: time.monotonic() > until_s)
            rig.start_store()
    content = read_all(rig)
    history.verify(content)
    history.settle(content)
    rig.detach("disk")
    history.verify(rig.exported("disk"))
    assert rig.store is not None
    assert rig.store.stop() == 0
    rig.run("store", "fsck", "--data", str(rig.store_data))


def test_both_killed_at_once_lose_nothing_acknowledged(rig: Rig) -> None:
    history = History(BLOCKS, 5)
    rig.cache_flags = ["--zone-size", "1MiB", "--cut-age-s-max", "0.1"]
    rig.start()
    rig.create("disk", SIZE)
    rig.attach("disk")
    for wait_s in (0.6, 0.9):
        load_and_kill(rig, history, wait_s)
        rig.kill_store()
        rig.start_cache()
        rig.start_store()
        content = read_all(rig)
        history.verify(content)
        history.settle(content)
    rig.detach("disk")
    history.verify(rig.exported("disk"))


def test_the_store_alone_shows_the_volume_as_it_was_at_one_moment(rig: Rig) -> None:
    history = History(256, 7)
    rig.cache_flags = ["--zone-size", "256KiB", "--cut-age-s-max", "0.1"]
    rig.start()
    rig.create("disk", 256 * BLOCK_SIZE)
    rig.attach("disk")
    last = 0
    with rig.nbd("disk") as client:
        for _ in range(4):
            until_s = time.monotonic() + 0.4
            history.run(client, depth=1, until=lambda until_s=until_s: time.monotonic() > until_s)
            rig.kill_store()  # at any point of a cut
            rig.start_store()
            prefix = history.prefix_of(rig.exported("disk"))
            assert prefix >= last, f"the store shows no moment of the history behind {last}"
            last = prefix
    assert last > 0
