"""What every front promises: whatever is away, the daemon or the store, is a wait for who uses it, never an error."""

import time

import pytest
from e2e_fronts import FUSE, LOOP, NBD, QEMU, RECONNECTING, Load, fronts_missing, fronts_of, loads_of
from e2e_rig import READY_TIMEOUT_S, Rig

from forebay_core.units import MIB

pytestmark = pytest.mark.skipif(bool(fronts_missing()), reason=fronts_missing())
SIZE = 32 * MIB
OUTAGE_S = 3.0
KERNEL_TIMEOUT_S = 35.0
"""Longer than what the block layer, and our own eye on slow clients, give a request: 30 s."""

HOUR_S = 3600.0


def all_go_on(loads: list[Load], seconds: float) -> bool:
    """Tell whether all loads still run after so long."""
    end_s = time.monotonic() + seconds
    return all(load.goes_on(max(0.0, end_s - time.monotonic())) for load in loads)


def wait_until_full(rig: Rig, loads: list[Load]) -> int:
    """Wait until nothing is written any more because nothing can be; return the dirty bytes."""
    deadline = time.monotonic() + 2 * READY_TIMEOUT_S
    before = -1
    while (now := rig.status().dirty_bytes) != before or now < MIB:
        assert time.monotonic() < deadline, f"the buffer does not fill: {now} bytes"
        before = now
        assert all_go_on(loads, 3.0), "a load has ended"
    return now


@pytest.mark.slow
def test_kill_of_the_daemon_is_a_wait_on_every_front(rig: Rig) -> None:
    """Twice: the second daemon meets devices that it did not make."""
    with fronts_of(rig, RECONNECTING, SIZE) as fronts:
        with loads_of(fronts, "--size=16m", "--rate_iops=700") as loads:
            for _ in range(2):
                rig.wait_status(lambda status: all(volume.dirty_bytes > 0 for volume in status.volumes))
                rig.kill_cache()
                assert all_go_on(loads, OUTAGE_S)
                rig.start_cache()
            for load in loads:
                load.check()
        assert not any(volume.error for volume in rig.status().volumes)


@pytest.mark.parametrize(
    "hold_s",
    [
        pytest.param(KERNEL_TIMEOUT_S, marks=pytest.mark.slow),
        pytest.param(HOUR_S, marks=[pytest.mark.soak, pytest.mark.timeout(HOUR_S + 600)]),
    ],
)
def test_a_full_buffer_is_a_wait_on_every_front(rig: Rig, hold_s: float) -> None:
    rig.cache_size = "64MiB"
    rig.cache_flags += ["--dirty-share-max", "0.3"]
    with fronts_of(rig, (NBD, QEMU, FUSE, LOOP), SIZE) as fronts, loads_of(fronts, "--size=24m") as loads:
        rig.wait_status(lambda status: all(volume.dirty_bytes > 0 for volume in status.volumes))
        rig.kill_store()
        full = wait_until_full(rig, loads)
        assert all_go_on(loads, hold_s), "a load has ended before the store came back"
        assert rig.status().dirty_bytes == full  # or they did not wait for all of that time
        rig.start_store()
        for load in loads:
            load.check()
        for front in fronts:
            rig.drain(front.volume)
        assert not any(volume.error for volume in rig.status().volumes)
