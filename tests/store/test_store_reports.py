"""What caches report they are ahead: kept over a restart of the store, however it ended; bytes, file and daemon."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from sim_index import DictIndex
from store_daemon import DEVICE, StoreDaemon, Writer, create, run

from forebay_core.errors import CorruptionError, RefusedError
from forebay_core.units import make_version
from forebay_store import limits
from forebay_store.engine.held import HeldReports
from forebay_store.engine.volumes import put_volume
from forebay_store.format.reports import (
    HELD_REPORT,
    LOSS,
    REPORTS_HEADER,
    Loss,
    Report,
    Reports,
    decode_reports,
    encode_reports,
)
from forebay_store.format.rows import VolumeState
from forebay_store.service.folder import NEW_REPORTS_NAME, REPORTS_NAME
from forebay_store.service.fsck import fsck
from forebay_store.service.rebuild import rebuild_index
from forebay_store.service.report_file import ReportFile
from forebay_wire import messages
from forebay_wire.client import WireClient

STORE = bytes(range(16))
VOLUME, OTHER = b"volume-of-a-test", b"another volume !"
FIRST = Report(VOLUME, 1, make_version(1, 9), 5, 6)
SAMPLE = Reports([FIRST, Report(OTHER, 2, make_version(2, 3), 0, 7)], [Loss(Report(OTHER, 1, 8, 9, 10), 11)])
GOLDEN = (
    "46425245504f525401000000000102030405060708090a0b0c0d0e0f0200000001000000000000000000000000000000"
    "4e3fc858aaab844f766f6c756d652d6f662d612d74657374010000000900000000100000050000000000000006000000"
    "00000000616e6f7468657220766f6c756d65202102000000030000000020000000000000000000000700000000000000"
    "616e6f7468657220766f6c756d65202101000000080000000000000009000000000000000a000000000000000b000000"
    "00000000"
)


def decode(content: bytes) -> Reports:
    return decode_reports(content, store=STORE, place="test")


def test_the_bytes_of_the_file_stay_as_they_are() -> None:
    assert encode_reports(STORE, SAMPLE).hex() == GOLDEN
    assert decode(bytes.fromhex(GOLDEN)) == SAMPLE


def test_any_flipped_bit_any_other_length_and_any_other_store_are_found() -> None:
    whole = encode_reports(STORE, SAMPLE)
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            decode(bytes(damaged))
    for content in (*(whole[:size] for size in range(len(whole))), whole + b"x", bytes(len(whole))):
        with pytest.raises(CorruptionError):
            decode(content)
    with pytest.raises(CorruptionError, match="store"):
        decode_reports(whole, store=bytes(16), place="test")


def row(volume: bytes, *, epoch: int, version: int) -> VolumeState:
    return VolumeState(volume, volume.decode(), 1 << 20, epoch, version, 1, 1, 0, 0, 0, 0, DEVICE, b"")


def index_of(*rows: VolumeState) -> DictIndex:
    index = DictIndex()
    for one in rows:
        index.update(lambda writer, one=one: put_volume(writer, one))  # type: ignore[misc]
    return index


def restored(kept: Reports, *rows: VolumeState) -> HeldReports:
    held = HeldReports()
    with index_of(*rows).view() as reader:
        held.restore(reader, kept)
    return held


def test_a_take_over_that_the_file_missed_is_found_when_it_is_read() -> None:
    taken = row(VOLUME, epoch=2, version=make_version(1, 4))
    held = restored(Reports([FIRST], []), taken).told(taken)
    assert (held.lost, held.lost_from) == (messages.HeldReport(*FIRST), taken.version)
    assert held.report.reported_ns == 0


def test_what_is_kept_of_deleted_volumes_is_forgotten() -> None:
    there = row(OTHER, epoch=2, version=0)
    assert restored(SAMPLE, there).kept() == Reports((SAMPLE.reports[1],), tuple(SAMPLE.losses))
    assert restored(SAMPLE).kept() == Reports((), ())


def test_only_news_counts_as_change() -> None:
    held = HeldReports()
    said = messages.HeldReport(*FIRST)
    again = messages.HeldReport(*FIRST._replace(reported_ns=1000))
    with index_of(row(VOLUME, epoch=1, version=0)).view() as reader:
        assert held.receive(reader, DEVICE, [said]) == []
        assert held.changed
        held.kept()
        assert held.receive(reader, DEVICE, [again]) == []
        assert (held.changed, held.heard) == (False, True)
        for number in (-1, 1 << 64):
            with pytest.raises(RefusedError, match="between"):
                held.receive(reader, DEVICE, [messages.HeldReport(*FIRST._replace(oldest_ns=number))])
    assert held.kept().reports == (FIRST._replace(reported_ns=1000),)


def test_of_too_many_volumes_the_one_heard_of_longest_ago_is_forgotten() -> None:
    rows = [row(bytes([65 + number]) * 16, epoch=1, version=0) for number in range(5)]
    held = HeldReports(reports_max=3)
    with index_of(*rows).view() as reader:
        held.receive(reader, DEVICE, [messages.HeldReport(one.id, 1, 5, 1, 1) for one in rows])
    assert [report.volume for report in held.kept().reports] == [one.id for one in rows[2:]]


def test_the_fullest_file_reads_back() -> None:
    most = Reports([FIRST] * limits.REPORTS_MAX, [Loss(FIRST, 0)] * limits.REPORTS_MAX)
    whole = encode_reports(STORE, most)
    assert len(whole) == REPORTS_HEADER.size + limits.REPORTS_MAX * (2 * HELD_REPORT.size + LOSS.size)
    assert decode(whole) == most


def test_a_missing_or_damaged_file_means_no_reports_and_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = ReportFile(tmp_path, STORE)
    for content in (None, b"", b"nonsense", encode_reports(bytes(16), SAMPLE)):
        if content is not None:
            (tmp_path / REPORTS_NAME).write_bytes(content)
        caplog.clear()
        assert file.read() == Reports((), ())
        assert len(caplog.records) == 1
    file.write(SAMPLE)
    assert file.read() == SAMPLE


def test_a_write_that_broke_off_leaves_the_file_of_before(tmp_path: Path) -> None:
    file = ReportFile(tmp_path, STORE)
    file.write(SAMPLE)
    (tmp_path / NEW_REPORTS_NAME).write_bytes(encode_reports(STORE, Reports([], []))[:30])
    assert file.read() == SAMPLE
    assert [path.name for path in tmp_path.iterdir()] == [REPORTS_NAME]


def test_a_file_that_can_not_be_written_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = ReportFile(tmp_path / "gone", STORE)
    file.write(SAMPLE)
    file.write(SAMPLE)
    assert len(caplog.records) == 1


class Reporter:
    """A cache that reports of one volume, and an operator who asks."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / REPORTS_NAME
        self.opened: messages.Opened | None = None

    async def report(self, daemon: StoreDaemon, sequence: int) -> None:
        """Report as the volume's holder."""
        assert daemon.address is not None
        client = await WireClient.connect(daemon.address, key=None, node=DEVICE, timeout_s=10)
        if self.opened is None:
            await create(client, "vm", 64)
            self.opened = (await Writer.open(client, "vm")).opened
        told = messages.HeldReport(self.opened.row.id, 1, make_version(1, sequence), 5, 6)
        assert (await client.ask(messages.ReportHeld((told,)), messages.Reported))[0].lost == ()
        await client.close()

    async def until_kept(self, expected: Callable[[Reports], bool]) -> None:
        """Wait until the file says so."""
        async with asyncio.timeout(20):
            while not self.file.exists() or not expected(self.kept()):
                await asyncio.sleep(0.01)

    def kept(self) -> Reports:
        content = self.file.read_bytes()
        return decode_reports(content, store=content[12:28], place="test")

    async def told(self, daemon: StoreDaemon) -> messages.Held:
        async with daemon.client() as client:
            return (await client.ask(messages.GetHeld("vm"), messages.Held))[0]


def test_a_store_that_was_killed_still_says_how_far_a_cache_was_ahead(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path / "s")

    async def report(daemon: StoreDaemon) -> None:
        await reporter.report(daemon, 9)
        await reporter.until_kept(lambda kept: len(kept.reports) == 1)

    async def take_over(daemon: StoreDaemon) -> None:
        held = await reporter.told(daemon)
        assert (held.report.version, held.report.reported_ns) == (make_version(1, 9), 6)
        async with daemon.client() as client:
            await Writer.open(client, "vm", device=b"another device !", take_over=True)
        await reporter.until_kept(lambda kept: len(kept.losses) == 1)

    async def lost(daemon: StoreDaemon) -> None:
        held = await reporter.told(daemon)
        assert (held.lost.version, held.lost.epoch, held.lost_from) == (make_version(1, 9), 1, 0)
        assert held.report.reported_ns == 0

    for work in (report, take_over, lost):
        with StoreDaemon(tmp_path / "s") as daemon:
            run(work(daemon))
            daemon.kill()
    assert fsck(tmp_path / "s") == []
    rebuild_index(tmp_path / "s")
    with StoreDaemon(tmp_path / "s") as daemon:
        run(lost(daemon))


def test_a_store_that_ends_in_order_keeps_reports_that_were_not_written_yet(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path / "s")

    async def report_twice(daemon: StoreDaemon) -> None:
        await reporter.report(daemon, 9)
        await reporter.report(daemon, 10)

    async def ask(daemon: StoreDaemon) -> None:
        assert (await reporter.told(daemon)).report.version == make_version(1, 10)

    for work in (report_twice, ask):
        with StoreDaemon(tmp_path / "s") as daemon:
            run(work(daemon))


@pytest.mark.parametrize("content", [None, bytes(99)], ids=["missing", "damaged"])
def test_a_store_starts_without_its_reports(tmp_path: Path, content: bytes | None) -> None:
    reporter = Reporter(tmp_path / "s")
    with StoreDaemon(tmp_path / "s") as daemon:
        run(reporter.report(daemon, 9))
    reporter.file.unlink()
    if content is not None:
        reporter.file.write_bytes(content)

    async def ask(daemon: StoreDaemon) -> None:
        assert (await reporter.told(daemon)).report.reported_ns == 0
        await reporter.report(daemon, 10)
        assert (await reporter.told(daemon)).report.version == make_version(1, 10)

    with StoreDaemon(tmp_path / "s") as daemon:
        run(ask(daemon))
        daemon.stop()
        assert daemon.end().count("known once they report") == 1
