"""A volume with a file or device that its cache lost, and takes over again: what is seen of it, and when that fails."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from e2e_fronts import FUSE, LOOP, Front, fronts_missing, take_loop_away
from e2e_fuse import front_pid, tidy
from e2e_rig import Rig

from forebay_cache.service.device_links import FOLDER
from forebay_core.units import MIB

pytestmark = pytest.mark.skipif(bool(fronts_missing()), reason=fronts_missing())
SIZE = 16 * MIB


@pytest.fixture(params=[FUSE, LOOP])
def stopped(rig: Rig, request: pytest.FixtureRequest) -> Iterator[tuple[Rig, Front]]:
    """A volume behind a front, which another cache has taken over and given back meanwhile."""
    with tidy(rig), ExitStack() as stack:
        rig.start()
        front = Front(rig, request.param, SIZE)
        stack.callback(take_loop_away, rig, front.volume)
        rig.run("attach", front.volume, "--front", front.kind)
        write(rig, front, b"old!")
        rig.drain(front.volume)
        folder = rig.folder / "second"
        folder.mkdir()
        other = Rig(folder, rig.template)
        other.store_address = rig.store_address
        other.start_cache()
        stack.callback(other.stop)
        other.wait_status(lambda status: status.store_connected)
        other.attach(front.volume, take_over=True)
        rig.wait_status(lambda status: status.volumes[0].error != "")
        other.detach(front.volume)
        yield rig, front


def place(rig: Rig, front: Front) -> Path:
    return FOLDER / front.volume if front.kind == LOOP else rig.run_dir / "volumes" / front.volume


def write(rig: Rig, front: Front, text: bytes) -> None:
    with place(rig, front).open("r+b", buffering=0) as file:
        file.write(text * 1024)
        os.fsync(file.fileno())


def take_over(rig: Rig, front: Front, kind: str, code: int = 0) -> str:
    return rig.run("attach", front.volume, "--take-over", "--front", kind, code=code)


def test_a_take_over_that_fails_half_way_leaves_neither_file_nor_device(stopped: tuple[Rig, Front]) -> None:
    rig, front = stopped
    seen = place(rig, front)
    with seen.open("rb", buffering=0) as held:
        rig.kill_store()
        rig.wait_status(lambda status: not status.store_connected)
        said = take_over(rig, front, front.kind, code=1)
        assert said.count("\n") == 1
        assert rig.status().volumes == ()
        assert not os.path.lexists(seen) and os.listdir(rig.run_dir / "volumes") == []
        with pytest.raises(OSError) as caught:  # and no wait for a volume that is gone
            os.preadv(held.fileno(), [bytearray(4096)], MIB)
        assert caught.value.errno in (errno.EIO, errno.ENXIO)
    rig.start_store()
    rig.wait_status(lambda status: status.store_connected)
    take_over(rig, front, front.kind)
    write(rig, front, b"new!")
    rig.run("detach", front.volume, "--timeout", "20")
    assert not os.path.lexists(seen) and front_pid(rig) == 0


def test_a_take_over_keeps_what_is_open(stopped: tuple[Rig, Front]) -> None:
    rig, front = stopped
    with place(rig, front).open("rb", buffering=0) as held:
        take_over(rig, front, front.kind)
        write(rig, front, b"new!")
        assert os.pread(held.fileno(), 4, 4096 - 4) == b"new!"


def test_a_take_over_by_another_front_takes_the_first_one_away(stopped: tuple[Rig, Front]) -> None:
    rig, front = stopped
    take_over(rig, front, "nbd")
    assert not os.path.lexists(place(rig, front)) and front_pid(rig) == 0
    with rig.nbd(front.volume) as client:
        client.write(0, b"new!" * 1024)
