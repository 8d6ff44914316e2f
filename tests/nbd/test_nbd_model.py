"""Random request sequences over a real socket against a bytearray, answered at once or late and out of order."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbd_client import EXTENDED, SIMPLE, STRUCTURED, Client, ServerThread
from ram_volume import LateVolume, RamVolume

from forebay_cache.engine.nbd_negotiation import ReplyStyle
from forebay_cache.format import nbd

SIZE = 40 * 4096 + 512
FAST_ZERO, DF, FUA = 16, 4, 1
ENOSPC, EINVAL, ENOTSUP = 28, 22, 95

OFFSETS = st.one_of(st.integers(0, SIZE + 100), st.integers(0, 41).map(lambda block: block * 4096))
LENGTHS = st.one_of(st.integers(0, 20000), st.sampled_from((512, 4096, 8192, 65536, SIZE)))
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ("read", "read df", "write", "write fua", "trim", "zero", "fast zero", "flush", "status", "cache")
        ),
        OFFSETS,
        LENGTHS,
        st.integers(1, 255),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread]:
    path = str(tmp_path_factory.mktemp("model") / "s")
    with ServerThread(path, RamVolume("now", SIZE), LateVolume("late", SIZE, delay_s=0.0005)) as server:
        yield server


class Model:
    """What a client may expect of the volume."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.memory = bytearray(SIZE)

    def step(self, kind: str, offset: int, length: int, fill: int) -> None:
        inside = offset + length <= SIZE
        match kind:
            case "read" | "read df":
                self._read(offset, length, df=kind == "read df" and self.client.style is not SIMPLE)
            case "write" | "write fua":
                payload = bytes((fill + index // 512) & 0xFF for index in range(length))
                error = self.client.write(offset, payload, flags=FUA if kind == "write fua" else 0)
                assert error == (0 if inside else ENOSPC)
                if inside:
                    self.memory[offset : offset + length] = payload
            case "trim":
                error = self.client.ask(nbd.CMD_TRIM, offset, length).error
                assert error == (0 if inside else EINVAL)
                if inside:
                    self._clear_whole_blocks(offset, length)
            case "zero" | "fast zero":
                self._zero(offset, length, inside, FAST_ZERO if kind == "fast zero" else 0)
            case "flush":
                assert self.client.ask(nbd.CMD_FLUSH).error == 0
            case "cache":
                assert self.client.ask(nbd.CMD_CACHE, offset, length).error == (0 if inside else EINVAL)
            case "status":
                self._status(offset, length, inside)

    def _read(self, offset: int, length: int, *, df: bool) -> None:
        answer = self.client.ask(nbd.CMD_READ, offset, length, flags=DF if df else 0)
        if offset + length <= SIZE:
            assert answer.error == 0
            assert answer.bytes_at(offset, length) == self.memory[offset : offset + length]
            assert not df or len(answer.pieces) <= 1
        else:
            assert answer.error == EINVAL

    def _zero(self, offset: int, length: int, inside: bool, flags: int) -> None:
        error = self.client.ask(nbd.CMD_WRITE_ZEROES, offset, length, flags=flags).error
        whole = -(-offset // 4096) < (offset + length) // 4096
        expected = ENOSPC if not inside else ENOTSUP if flags and length and not whole else 0
        assert error == expected
        if not error:
            self.memory[offset : offset + length] = bytes(length)

    def _clear_whole_blocks(self, offset: int, length: int) -> None:
        end = offset + length
        first, last = -(-offset // 4096) * 4096, end if end == SIZE else end // 4096 * 4096
        if first < last:
            self.memory[first:last] = bytes(last - first)

    def _status(self, offset: int, length: int, inside: bool) -> None:
        answer = self.client.ask(nbd.CMD_BLOCK_STATUS, offset, length)
        if self.client.style is SIMPLE or not inside or length == 0:
            assert answer.error == EINVAL
            return
        at = offset
        for size, flags in answer.extents:
            assert flags in (0, 3)
            assert flags == 0 or not any(self.memory[at : at + size])
            at += size
        assert at == offset + length


@pytest.mark.parametrize("style", [SIMPLE, STRUCTURED, EXTENDED], ids=lambda style: style.name.lower())
@pytest.mark.parametrize("name", ["now", "late"])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_random_requests_agree_with_a_bytearray(
    served: ServerThread, style: ReplyStyle, name: str, steps: list[tuple[str, int, int, int]]
) -> None:
    with served.client().go(name, style) as client:
        model = Model(client)
        assert client.ask(nbd.CMD_WRITE_ZEROES, 0, SIZE).error == 0
        for step in steps:
            model.step(*step)
        assert client.read(0, SIZE) == model.memory


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 90000), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 70000), min_size=1, max_size=8),
    seed=st.integers(0, 255),
)
def test_pipelined_writes_cut_anywhere_all_arrive(
    served: ServerThread, lengths: list[int], cuts: list[int], seed: int
) -> None:
    with served.client().go("late") as client:
        memory = bytearray(client.read(0, SIZE))
        raw = bytearray()
        expected = {}
        for number, length in enumerate(lengths):
            offset = number * 4099 % (SIZE - length)
            payload = bytes([(seed + number) & 0xFF]) * length
            raw += client.request(nbd.CMD_WRITE, offset, length, payload=payload)
            expected[client.cookie] = offset, payload
        at = 0
        while at < len(raw):
            step = cuts[at % len(cuts)]
            client.send(bytes(raw[at : at + step]))
            at += step
        for _ in lengths:  # they overlap: the order of the answers is the order in which they were applied
            answer = client.answer()
            assert answer.error == 0
            offset, payload = expected.pop(answer.cookie)
            memory[offset : offset + len(payload)] = payload
        assert client.read(0, SIZE) == memory
