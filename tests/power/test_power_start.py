"""The power goes while a daemon starts for the first time: the next start is a start, and what it had said is true."""

import pytest
from _pytest.mark import ParameterSet
from power_rig import Power, PowerRig

from forebay_core.units import MIB
from forebay_wire.messages import GetVolume, Volume

SEEDS = range(4)


def soak(everything: bool, step: int) -> ParameterSet:
    return pytest.param(everything, step, marks=pytest.mark.soak)


@pytest.mark.parametrize(("everything", "step"), [(True, 1), (False, 3), soak(False, 1)])
def test_a_store_cut_at_any_point_of_its_first_start_starts_again(rig: PowerRig, everything: bool, step: int) -> None:
    for count in range(0, 300, step):
        rig.store_data = rig.server.folder / str(count)
        served = rig.start_store_until_off(count)
        rig.cut(Power.SERVER, count, everything=everything)
        rig.start_store()
        rig.create("disk", MIB)
        rig.kill_store()
        if served:
            return
    raise AssertionError("the store never served")


@pytest.mark.parametrize("everything", [True, False])
def test_a_volume_survives_that_a_new_store_said_it_made(rig: PowerRig, everything: bool) -> None:
    for seed in SEEDS:
        rig.store_data = rig.server.folder / "above" / str(seed)
        rig.start_store()
        rig.create("disk", MIB)
        rig.cut(Power.SERVER, seed, everything=everything)
        rig.start_store()
        assert rig.ask_store(GetVolume("disk"), Volume).row.size == MIB
        rig.kill_store()


@pytest.mark.parametrize(("everything", "step"), [(True, 4), (False, 5), soak(True, 1), soak(False, 1)])
def test_a_cache_cut_at_any_point_of_its_first_start_starts_again(rig: PowerRig, everything: bool, step: int) -> None:
    rig.cache_size = "24MiB"
    rig.start_store()
    rig.create("disk", MIB)
    for count in range(0, 300, step):
        rig.device = rig.hypervisor.folder / str(count)
        served = rig.start_cache_until_off(count)
        rig.cut(Power.HYPERVISOR, count, everything=everything)
        rig.start_cache()
        if served:
            break
        rig.kill_cache()
    else:
        raise AssertionError("the cache never served")
    rig.attach("disk")
    rig.cut(Power.HYPERVISOR, 1, everything=True)
    rig.start_cache()
    with rig.nbd("disk") as client:
        client.write(0, b"x" * 4096, fua=True)
    rig.cut(Power.BOTH, 2, everything=True)
    rig.power_on(Power.BOTH)
    with rig.nbd("disk") as client:
        assert client.read(0, 8192) == b"x" * 4096 + bytes(4096)
