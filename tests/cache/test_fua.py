"""A write with FUA is durable when it is answered, whichever way through the engine it takes."""

import pytest
from engine_rig import Rig

from forebay_cache.engine.front import IoError
from forebay_core.units import BLOCK_SIZE


@pytest.mark.parametrize("length", [BLOCK_SIZE, 3 * BLOCK_SIZE, 512])
@pytest.mark.parametrize("offset", [7 * BLOCK_SIZE, 7 * BLOCK_SIZE + 1024])
@pytest.mark.parametrize("seed", range(3))
def test_a_fua_write_that_was_answered_survives_a_power_cut(seed: int, offset: int, length: int) -> None:
    rig = Rig(seed)
    payload = rig.rng.randbytes(length)
    assert rig.write(offset, payload, fua=True) == IoError.OK
    rig.restart(power=True)
    assert rig.read(offset, length) == payload


@pytest.mark.parametrize("length", [BLOCK_SIZE, 3 * BLOCK_SIZE])
def test_a_fua_write_is_answered_behind_a_sync_that_began_when_it_was_written(length: int) -> None:
    rig = Rig(1)
    answers: list[IoError] = []
    rig.volume.write(0, b"x" * length, True, answers.append)
    rig.volume.kick()
    rig.run_until(lambda: bool(answers))
    assert answers == [IoError.OK]
    assert rig.engine.log.durable == rig.engine.log.changed_position > 0
