"""The ring: what is shared with the kernel is as the tables say, and the kernel agrees."""

import ctypes
import os
import re
from pathlib import Path

import pytest

from forebay_cache.service import uring
from forebay_cache.service.uring import COMPLETION, PARAMS, SUBMISSION, Ring


@pytest.fixture
def ring() -> Ring:
    try:
        return Ring(4)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")


def test_the_submission_entry_is_as_its_table_says() -> None:
    codes = {"u8": "B", "u16": "H", "u32": "I", "i32": "i", "u64": "Q"}
    rows = re.findall(r"^ +(\d+) +(\d+)  (u8|u16|u32|i32|u64|\d+x) +(\w+)", uring.__doc__ or "", re.MULTILINE)
    assert "<" + "".join(codes.get(kind, kind) for _, _, kind, _ in rows) == SUBMISSION.format
    at = 0
    for offset, size, _, name in rows:
        assert int(offset) == at, name
        at += int(size)
    assert at == SUBMISSION.size == 64 and COMPLETION.size == 16 and PARAMS.size == 120


def test_reads_arrive_with_their_tags_around_the_ring(ring: Ring, tmp_path: Path) -> None:
    content = os.urandom(4096 * 10)
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        for turn in range(10):
            buffers = [bytearray(4096) for _ in range(4)]
            exports = [ctypes.c_char.from_buffer(buffer) for buffer in buffers]
            for index, export in enumerate(exports):
                offset = (turn + index) % 10 * 4096
                ring.prepare_read(fd, offset, ctypes.addressof(export), 4096, 1000 * turn + index)
            assert not ring.has_room
            assert ring.submit()
            tags = []
            while ring.in_flight:
                ring.wait()
                tags += [tag for tag, result in ring.completions() if result == 4096]
            assert sorted(tags) == [1000 * turn + index for index in range(4)]
            for index, buffer in enumerate(buffers):
                offset = (turn + index) % 10 * 4096
                assert buffer == content[offset : offset + 4096]
    finally:
        os.close(fd)
        ring.close()


def test_an_error_is_a_negative_number(ring: Ring) -> None:
    buffer = bytearray(4096)
    export = ctypes.c_char.from_buffer(buffer)
    ring.prepare_read(ring.event_fd + 1000, 0, ctypes.addressof(export), 4096, 7)
    assert ring.submit()
    ring.wait()
    assert ring.completions() == [(7, -9)]
    ring.close()


def test_a_sync_is_completed_and_its_error_is_a_negative_number(ring: Ring, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x")
        file.flush()
        results = {}
        for tag, fd in enumerate((file.fileno(), ring.event_fd)):  # an eventfd can't be synced
            ring.prepare_sync(fd, tag)
            assert ring.submit()
            ring.wait()
            results.update(ring.completions())
    assert results == {0: 0, 1: -22}
    ring.close()
