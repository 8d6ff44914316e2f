"""Requests over a real socket, in all three reply styles: what is answered, and that the connection stays in step."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from nbd_client import EXTENDED, SIMPLE, STRUCTURED, Answer, Client, ServerThread
from ram_volume import LateVolume, RamVolume

from forebay_cache.engine.front import Allocation, IoError, ReadReply
from forebay_cache.engine.nbd_negotiation import ReplyStyle
from forebay_cache.engine.nbd_transmission import clip_extents
from forebay_cache.format import nbd

SIZE = (64 << 20) + 512  # ends inside a block
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 75, 95, 108
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
ALL_STYLES = pytest.mark.parametrize("style", [SIMPLE, STRUCTURED, EXTENDED], ids=lambda style: style.name.lower())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServerThread]:
    volumes = (RamVolume("vol", SIZE), RamVolume("frozen@monday", 1 << 20, read_only=True))
    with ServerThread(str(tmp_path / "s"), *volumes) as server:
        yield server


@pytest.fixture
def volume(served: ServerThread) -> RamVolume:
    return served.exports.volumes["vol"]


def pattern(size: int, seed: int = 1) -> bytes:
    return bytes((seed * 37 + index * 11 + (index >> 8)) & 0xFF for index in range(size))


def refused(client: Client, answer: Answer, error: int) -> None:
    assert answer.error == error
    assert bool(answer.text) == (client.style is not SIMPLE)
    assert client.write(0, b"still in step") == 0
    assert client.read(0, 13) == b"still in step"


@ALL_STYLES
@pytest.mark.parametrize("offset, size", [(0, 4096), (1, 1), (511, 2), (4095, 2), (5000, 20000), (SIZE - 3, 3)])
def test_writes_at_any_alignment_read_back(served: ServerThread, style: ReplyStyle, offset: int, size: int) -> None:
    with served.client().go("vol", style) as client:
        payload = pattern(size)
        assert client.write(offset, payload) == 0
        assert client.read(offset, size) == payload
        around = client.read(max(0, offset - 7), min(SIZE - max(0, offset - 7), size + 14))
        assert payload in around
        assert sum(around) == sum(payload)


@ALL_STYLES
def test_sparse_reads_are_zeros(served: ServerThread, style: ReplyStyle) -> None:
    with served.client().go("vol", style) as client:
        client.write(8192, pattern(4096))
        answer = client.ask(nbd.CMD_READ, 0, 20480)
        assert answer.bytes_at(0, 20480) == bytes(8192) + pattern(4096) + bytes(8192)
        if style is not SIMPLE:
            assert answer.pieces == [(0, 8192), (8192, pattern(4096)), (12288, 8192)]


@ALL_STYLES
def test_zero_lengths_are_answered(served: ServerThread, style: ReplyStyle) -> None:
    with served.client().go("vol", style) as client:
        for command in (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES, nbd.CMD_CACHE):
            for offset in (0, 77, SIZE):
                assert client.ask(command, offset, 0).error == 0
        assert client.ask(nbd.CMD_WRITE_ZEROES, 5, 0, flags=FAST_ZERO).error == 0
        refused(client, client.ask(nbd.CMD_BLOCK_STATUS, 0, 0), EINVAL)


@ALL_STYLES
def test_beyond_the_end_has_its_own_errors_and_offsets_do_not_overflow(served: ServerThread, style: ReplyStyle) -> None:
    with served.client().go("vol", style) as client:
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (2**64 - 1, 4096), (2**63, 512), (2**64 - 4096, 4096)):
            for command in (nbd.CMD_READ, nbd.CMD_TRIM, nbd.CMD_CACHE):
                refused(client, client.ask(command, offset, length), EINVAL)
            refused(client, client.ask(nbd.CMD_WRITE_ZEROES, offset, length), ENOSPC)
            refused(client, client.ask(nbd.CMD_WRITE, offset, length, payload=bytes(length)), ENOSPC)


@ALL_STYLES
def test_flags_that_do_not_belong_are_refused_and_fua_belongs_everywhere(
    served: ServerThread, style: ReplyStyle
) -> None:
    with served.client().go("vol", style) as client:
        for command in (nbd.CMD_READ, nbd.CMD_FLUSH, nbd.CMD_TRIM, nbd.CMD_CACHE, nbd.CMD_WRITE_ZEROES):
            length = 0 if command == nbd.CMD_FLUSH else 4096
            assert client.ask(command, 0, length, flags=FUA).error == 0
            refused(client, client.ask(command, 0, length, flags=1 << 14), EINVAL)
            refused(client, client.ask(command, 0, length, flags=REQ_ONE), EINVAL)
        for flags in (DF, NO_HOLE, FAST_ZERO, 1 << 9):
            refused(client, client.ask(nbd.CMD_WRITE, 0, 600, flags=flags, payload=bytes(600)), EINVAL)
        for command in (8, 9, 77, 65535):
            refused(client, client.ask(command, 0, 4096), EINVAL)


@ALL_STYLES
def test_read_only_volumes_refuse_changes_and_answer_the_rest(served: ServerThread, style: ReplyStyle) -> None:
    with served.client().go("frozen@monday", style) as client:
        assert client.flags & 2
        for command, payload in ((nbd.CMD_WRITE, bytes(4096)), (nbd.CMD_TRIM, b""), (nbd.CMD_WRITE_ZEROES, b"")):
            assert client.ask(command, 0, 4096, payload=payload).error == EPERM
            assert client.ask(command, 1 << 20, 4096, payload=payload).error == EPERM
        assert client.read(0, 4096) == bytes(4096)
        assert client.ask(nbd.CMD_FLUSH).error == 0


@ALL_STYLES
def test_the_payload_of_a_refused_write_is_consumed_however_large(served: ServerThread, style: ReplyStyle) -> None:
    with served.client().go("vol", style) as client:
        huge = 32 << 20
        refused(client, client.ask(nbd.CMD_WRITE, SIZE - 1, huge, payload=bytes(huge)), ENOSPC)


@ALL_STYLES
def test_the_largest_write_and_read_pass(served: ServerThread, style: ReplyStyle) -> None:
    with served.client().go("vol", style) as client:
        payload = pattern(1 << 20) * 32
        assert client.write(4093, payload) == 0
        assert client.read(4093, len(payload)) == payload


def test_reads_above_the_maximum_are_refused_with_df_as_overflow(served: ServerThread) -> None:
    with served.client().go("vol") as client:
        refused(client, client.ask(nbd.CMD_READ, 0, (32 << 20) + 1), EINVAL)
        refused(client, client.ask(nbd.CMD_READ, 0, (32 << 20) + 1, flags=DF), EOVERFLOW)


@pytest.mark.parametrize("style", [STRUCTURED, EXTENDED])
def test_df_answers_in_one_piece_with_zeros_spelled_out(served: ServerThread, style: ReplyStyle) -> None:
    with served.client().go("vol", style) as client:
        client.write(4096, pattern(4096))
        answer = client.ask(nbd.CMD_READ, 0, 3 << 20, flags=DF)
        assert answer.pieces == [(0, bytes(4096) + pattern(4096) + bytes((3 << 20) - 8192))]


def test_df_needs_structured_replies(served: ServerThread) -> None:
    with served.client().go("vol", SIMPLE) as client:
        refused(client, client.ask(nbd.CMD_READ, 0, 4096, flags=DF), EINVAL)


@ALL_STYLES
def test_trim_leaves_partial_blocks_alone_and_write_zeroes_writes_them(served: ServerThread, style: ReplyStyle) -> None:
    with served.client().go("vol", style) as client:
        payload = pattern(5 * 4096)
        client.write(0, payload)
        assert client.ask(nbd.CMD_TRIM, 100, 4 * 4096).error == 0
        assert client.read(0, len(payload)) == payload[:4096] + bytes(3 * 4096) + payload[4 * 4096 :]
        client.write(0, payload)
        assert client.ask(nbd.CMD_WRITE_ZEROES, 100, 4 * 4096, flags=NO_HOLE).error == 0
        assert client.read(0, len(payload)) == payload[:100] + bytes(4 * 4096) + payload[4 * 4096 + 100 :]


def test_fast_zero_is_refused_where_zeroing_is_no_faster_than_writing(served: ServerThread, volume: RamVolume) -> None:
    with served.client().go("vol") as client:
        assert client.ask(nbd.CMD_WRITE_ZEROES, 4096, 8192, flags=FAST_ZERO).error == 0
        assert client.ask(nbd.CMD_WRITE_ZEROES, 4000, 8192, flags=FAST_ZERO | NO_HOLE).error == 0
        refused(client, client.ask(nbd.CMD_WRITE_ZEROES, 4000, 4096, flags=FAST_ZERO), ENOTSUP)
        assert volume.calls == ["zero 4096 8192 False", "zero 4000 8192 False"]


def test_fua_and_flush_reach_the_volume(served: ServerThread, volume: RamVolume) -> None:
    with served.client().go("vol") as client:
        client.ask(nbd.CMD_TRIM, 0, 4096, flags=FUA)
        client.ask(nbd.CMD_WRITE_ZEROES, 0, 4096, flags=FUA)
        client.ask(nbd.CMD_FLUSH)
        client.ask(nbd.CMD_CACHE, 4096, 100)
        assert volume.calls == ["trim 0 4096 True", "zero 0 4096 True", "flush", "prefetch 4096 100"]


def test_trim_and_zeroes_have_no_maximum(served: ServerThread) -> None:
    with served.client().go("vol") as client:
        assert client.ask(nbd.CMD_TRIM, 0, 60 << 20).error == 0
        assert client.ask(nbd.CMD_WRITE_ZEROES, 0, SIZE).error == 0
        assert client.ask(nbd.CMD_CACHE, 0, SIZE).error == 0


@pytest.mark.parametrize("style", [STRUCTURED, EXTENDED])
@pytest.mark.parametrize("offset, length", [(0, SIZE), (4096, 8192), (1, 1), (4095, 2), (8191, 4099), (SIZE - 1, 1)])
def test_block_status_tells_holes_at_any_alignment(
    served: ServerThread, style: ReplyStyle, offset: int, length: int
) -> None:
    with served.client().go("vol", style) as client:
        client.write(8192, pattern(4096))
        extents = client.ask(nbd.CMD_BLOCK_STATUS, offset, length).extents
        assert sum(size for size, _flags in extents) == length
        assert all(one[1] != two[1] for one, two in pairwise(extents))
        at = offset
        for size, flags in extents:
            middle = at + size // 2
            assert flags == (0 if 8192 <= middle < 12288 else 3)
            at += size
        first = client.ask(nbd.CMD_BLOCK_STATUS, offset, length, flags=REQ_ONE).extents
        assert first == extents[:1]


def test_block_status_needs_a_selected_context(served: ServerThread) -> None:
    with served.client().go("vol", allocation=False) as client:
        refused(client, client.ask(nbd.CMD_BLOCK_STATUS, 0, 4096), EINVAL)


def test_a_volume_may_answer_more_or_less_than_the_status_asked_for() -> None:
    hole, solid = Allocation(4096, True), Allocation(4096, False)
    assert clip_extents([Allocation(1 << 40, True)], 512, count_max=9) == [Allocation(512, True)]
    assert clip_extents([hole, hole, solid], 1 << 20, count_max=9) == [Allocation(8192, True), solid]
    assert clip_extents([hole, hole, solid, hole], 1 << 20, count_max=2) == [Allocation(8192, True), solid]
    assert clip_extents([hole, solid], 1 << 20, count_max=1) == [hole]


def test_extended_headers_carry_64_bit_lengths(tmp_path: Path) -> None:
    class Endless(RamVolume):
        def __init__(self) -> None:
            super().__init__("vol", 1 << 20)
            self.size = 1 << 43

        def trim(self, offset: int, length: int, fua: bool, reply: object) -> None:
            self.calls.append(f"trim {offset} {length}")
            reply(IoError.OK)  # type: ignore[operator]

        def allocation(self, offset: int, length: int, reply: object) -> None:
            reply(IoError.OK, [Allocation(length, True)])  # type: ignore[operator]

    volume = Endless()
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol", EXTENDED) as client:
        assert client.size == 1 << 43
        assert client.ask(nbd.CMD_TRIM, 1 << 41, 1 << 42).error == 0
        assert volume.calls == [f"trim {1 << 41} {1 << 42}"]
        assert client.ask(nbd.CMD_BLOCK_STATUS, 0, 1 << 43).extents == [(1 << 43, 3)]
        assert client.ask(nbd.CMD_READ, 0, 1 << 40).error == EINVAL


def test_a_write_has_its_payload_whether_it_says_so_or_not_as_qemu_does_not(served: ServerThread) -> None:
    def write(client: Client, cookie: int, flags: int, offset: int, content: bytes) -> int:
        header = (nbd.EXTENDED_REQUEST_MAGIC, flags, nbd.CMD_WRITE, cookie, offset, len(content))
        client.send(nbd.EXTENDED_REQUEST.pack(*header) + content)
        return client.answer().error

    with served.client().go("vol", EXTENDED) as client:
        for number, flags in enumerate((0, FUA, PAYLOAD_LEN, FUA | PAYLOAD_LEN)):
            assert write(client, number, flags, number * 4096, bytes([65 + number]) * 4096) == 0
        assert client.read(0, 4 * 4096) == b"".join(bytes([65 + number]) * 4096 for number in range(4))
        for number, flags in enumerate((0, FUA, PAYLOAD_LEN, 1 << 9)):
            assert write(client, number, flags, 1 << 50 if flags < 1 << 9 else 0, b"x" * 700)
            assert client.read(0, 1) == b"A"  # still in step


def test_payloads_of_other_requests_with_extended_headers_follow_the_flag(served: ServerThread) -> None:
    with served.client().go("vol", EXTENDED) as client:
        for command in (nbd.CMD_READ, nbd.CMD_TRIM, nbd.CMD_FLUSH, nbd.CMD_BLOCK_STATUS, 99):
            refused(client, client.ask(command, 0, 700, flags=PAYLOAD_LEN, payload=bytes(700)), EINVAL)
    with served.client().go("vol", STRUCTURED) as client:
        refused(client, client.ask(nbd.CMD_READ, 0, 700, flags=PAYLOAD_LEN), EINVAL)


@ALL_STYLES
@pytest.mark.parametrize(
    "failure, error",
    [(IoError.IO, EIO), (IoError.NO_SPACE, ENOSPC), (IoError.READ_ONLY, EPERM), (IoError.SHUTDOWN, ESHUTDOWN)],
)
def test_what_the_volume_says_is_passed_on(
    served: ServerThread, volume: RamVolume, style: ReplyStyle, failure: IoError, error: int
) -> None:
    with served.client().go("vol", style) as client:
        volume.failure = failure
        for command in (nbd.CMD_READ, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES, nbd.CMD_CACHE, nbd.CMD_FLUSH):
            assert client.ask(command, 0, 4096).error == error
        assert client.ask(nbd.CMD_WRITE, 0, 4096, payload=bytes(4096)).error == error
        if style is not SIMPLE:
            assert client.ask(nbd.CMD_BLOCK_STATUS, 0, 4096).error == error
        volume.failure = IoError.OK
        assert client.read(0, 4096) == bytes(4096)


@ALL_STYLES
def test_requests_read_the_same_whole_byte_by_byte_and_with_trailing_bytes(
    served: ServerThread, style: ReplyStyle
) -> None:
    with served.client().go("vol", style) as client:
        conversation = b"".join(
            (
                client.request(nbd.CMD_WRITE, 100, 700, payload=pattern(700)),
                client.request(nbd.CMD_WRITE, SIZE, 300, payload=pattern(300)),
                client.request(nbd.CMD_READ, 0, 1000),
                client.request(nbd.CMD_FLUSH),
                client.request(nbd.CMD_WRITE, 0, 0),
            )
        )
        for step in (len(conversation), 1, 11, 400):
            for at in range(0, len(conversation), step):
                client.send(conversation[at : at + step])
            answers = [client.answer()._replace(text="") for _ in range(5)]
            assert [answer.error for answer in answers] == [0, ENOSPC, 0, 0, 0]
            assert answers[2].bytes_at(0, 1000) == bytes(100) + pattern(700) + bytes(200)
            client._reads[answers[2].cookie] = 0, 1000
        client.send(client.request(nbd.CMD_FLUSH) + conversation[:50])
        assert client.answer().error == 0


def test_answers_come_in_any_order_each_as_it_is_done(tmp_path: Path) -> None:
    volume = LateVolume("vol", 1 << 20, delay_s=None)
    with ServerThread(str(tmp_path / "s"), volume) as server, server.client().go("vol") as client:
        client.send(b"".join(client.request(nbd.CMD_WRITE, n * 512, 512, payload=pattern(512, n)) for n in range(9)))
        server.until(lambda: len(volume.parked) == 9)
        server.call(lambda: volume.release(lambda parked: parked.reverse()))
        cookies = [client.answer().cookie for _ in range(9)]
        assert cookies == sorted(cookies, reverse=True)
        client.send(client.request(nbd.CMD_READ, 0, 9 * 512))
        server.until(lambda: len(volume.parked) == 1)
        server.call(volume.release)
        assert client.answer().bytes_at(0, 9 * 512) == b"".join(pattern(512, n) for n in range(9))


def test_a_flush_on_one_connection_and_writes_on_another_meet_in_one_volume(served: ServerThread) -> None:
    with served.client().go("vol") as one, served.client().go("vol", EXTENDED) as two:
        assert one.flags & 1 << 8
        assert one.write(0, b"from one") == 0
        assert two.ask(nbd.CMD_FLUSH).error == 0
        assert two.read(0, 8) == b"from one"


def test_others_have_their_turn_between_the_large_reads_of_one_client(served: ServerThread, volume: RamVolume) -> None:
    with served.client().go("vol") as greedy, served.client().go("vol") as modest:
        reads: list[int] = []
        plain_read = volume.read

        def noting(offset: int, length: int, reply: ReadReply) -> None:
            reads.append(length)
            plain_read(offset, length, reply)

        def ask() -> None:
            greedy.send(b"".join(greedy.request(nbd.CMD_READ, 0, 1 << 20) for _ in range(8)))
            modest.send(modest.request(nbd.CMD_READ, 0, 512))

        volume.read = noting  # type: ignore[method-assign]
        served.call(ask)
        assert modest.answer().bytes_at(0, 512) == bytes(512)
        for _ in range(8):
            assert greedy.answer().bytes_at(0, 1 << 20) == bytes(1 << 20)
        assert (len(reads), reads.index(512) <= 1) == (9, True)
