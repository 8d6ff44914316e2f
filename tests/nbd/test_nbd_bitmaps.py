"""Changes since a snapshot as a meta context, as qemu and libnbd ask for dirty bitmaps."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_client import EXTENDED, STRUCTURED, ServerThread, context_query, export_query, option_bytes
from ram_volume import LateVolume, RamExports, RamVolume

from forebay_cache.engine.front import IoError
from forebay_cache.engine.nbd_limits import CONTEXTS_MAX
from forebay_cache.engine.nbd_negotiation import DIRTY_BITMAP, Context, Negotiation, ReplyStyle
from forebay_cache.format import nbd
from forebay_cache.format import nbd_options as o

SIZE = 1 << 20
DIRTY = [(4096, 12288), (SIZE - 4096, SIZE)]


@pytest.fixture
def volume() -> RamVolume:
    volume = RamVolume("vol", SIZE)
    volume.dirty = {"monday": DIRTY, "tuesday": []}
    return volume


@pytest.fixture
def served(tmp_path: Path, volume: RamVolume) -> Iterator[ServerThread]:
    with ServerThread(str(tmp_path / "s"), volume, RamVolume("plain", SIZE)) as server:
        yield server


def asked(volume: RamVolume, option: int, *queries: str) -> tuple[list[tuple[int, bytes]], Negotiation]:
    negotiation = Negotiation(RamExports(volume))
    negotiation.take_output()
    for part in (b"\0\0\0\3", option_bytes(o.OPT_STRUCTURED_REPLY)):
        negotiation.receive(memoryview(part))
    negotiation.take_output()
    negotiation.receive(memoryview(option_bytes(option, context_query("vol", *queries))))
    raw, found = negotiation.take_output(), []
    while raw:
        _magic, _option, kind, size = o.OPTION_REPLY.unpack_from(raw)
        found.append((kind, raw[20 : 20 + size]))
        raw = raw[20 + size :]
    return found, negotiation


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ((), ["base:allocation", "qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"]),
        (("qemu:",), ["qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"]),
        (("qemu:dirty-bitmap:",), ["qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"]),
        (("qemu:dirty-bitmap:tuesday",), ["qemu:dirty-bitmap:tuesday"]),
        (("qemu:dirty-bitmap:sunday", "qemu:allocation-depth"), []),
        (("base:",), ["base:allocation"]),
    ],
)
def test_contexts_of_all_snapshots_are_listed(volume: RamVolume, queries: tuple[str, ...], names: list[str]) -> None:
    found, _ = asked(volume, o.OPT_LIST_META_CONTEXT, *queries)
    assert found == [(o.REP_META_CONTEXT, bytes(4) + name.encode()) for name in names] + [(o.REP_ACK, b"")]


def test_several_contexts_are_selected_and_only_those_that_are_named_whole(volume: RamVolume) -> None:
    queries = ("qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:", "base:allocation", "qemu:dirty-bitmap:sunday")
    found, negotiation = asked(volume, o.OPT_SET_META_CONTEXT, *queries)
    assert [payload for kind, payload in found[:-1]] == [b"\0\0\0\1base:allocation", b"\0\0\0\2" + queries[0].encode()]
    negotiation.receive(memoryview(option_bytes(o.OPT_GO, export_query("vol"))))
    assert negotiation.session is not None
    assert negotiation.session.contexts == (Context(1, ""), Context(2, "monday"))


def test_too_many_contexts_are_refused(volume: RamVolume) -> None:
    volume.dirty = {f"s{number}": [] for number in range(CONTEXTS_MAX + 1)}
    found, _ = asked(volume, o.OPT_SET_META_CONTEXT, *(DIRTY_BITMAP + name for name in volume.dirty))
    assert [kind for kind, _ in found] == [o.REP_ERR_TOO_BIG]


@pytest.mark.parametrize("style", [STRUCTURED, EXTENDED], ids=lambda style: style.name.lower())
def test_a_status_has_a_chunk_for_each_context(served: ServerThread, style: ReplyStyle) -> None:
    with served.client() as client:
        client.greet()
        client.option(o.OPT_STRUCTURED_REPLY if style is STRUCTURED else o.OPT_EXTENDED_HEADERS)
        names = ("base:allocation", "qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday")
        client.option(o.OPT_SET_META_CONTEXT, context_query("vol", *names))
        client.option(o.OPT_GO, export_query("vol"))
        client.style = style
        answer = client.ask(nbd.CMD_BLOCK_STATUS, 0, SIZE)
        assert answer.extents == [(SIZE, 3)]
        assert answer.others == {2: [(4096, 0), (8192, 1), (SIZE - 16384, 0), (4096, 1)], 3: [(SIZE, 0)]}
        answer = client.ask(nbd.CMD_BLOCK_STATUS, 4608, 512, flags=nbd.CMD_FLAG_REQ_ONE)
        assert answer.others == {2: [(512, 1)], 3: [(512, 0)]}


def test_a_failure_of_one_context_fails_the_request_once(served: ServerThread, volume: RamVolume) -> None:
    with served.client() as client:
        client.greet()
        client.option(o.OPT_STRUCTURED_REPLY)
        client.option(o.OPT_SET_META_CONTEXT, context_query("vol", "base:allocation", "qemu:dirty-bitmap:monday"))
        client.option(o.OPT_GO, export_query("vol"))
        client.style = STRUCTURED
        volume.failure = IoError.IO
        assert client.ask(nbd.CMD_BLOCK_STATUS, 0, SIZE).error == 5
        volume.failure = IoError.OK
        assert client.ask(nbd.CMD_BLOCK_STATUS, 0, SIZE).extents == [(SIZE, 3)]


def test_a_late_answer_waits_for_the_other_context(tmp_path: Path) -> None:
    late = LateVolume("vol", SIZE, delay_s=0.01)
    late.dirty = {"monday": DIRTY}
    with ServerThread(str(tmp_path / "s"), late) as served, served.client() as client:
        client.greet()
        client.option(o.OPT_STRUCTURED_REPLY)
        client.option(o.OPT_SET_META_CONTEXT, context_query("vol", "base:allocation", "qemu:dirty-bitmap:monday"))
        client.option(o.OPT_GO, export_query("vol"))
        client.style = STRUCTURED
        answer = client.ask(nbd.CMD_BLOCK_STATUS, 0, SIZE)
        assert answer.extents == [(SIZE, 3)]
        assert answer.others[2][0] == (4096, 0)


@pytest.mark.skipif(shutil.which("nbdinfo") is None, reason="nbdinfo (libnbd-bin) is not installed")
def test_nbdinfo_maps_what_changed(served: ServerThread, tmp_path: Path) -> None:
    uri = f"nbd+unix:///vol?socket={tmp_path / 's'}"
    command = ["nbdinfo", "--json", "--map=qemu:dirty-bitmap:monday", uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = [(one["offset"], one["length"]) for one in json.loads(done.stdout) if one["type"] == 1]
    assert found == [(4096, 8192), (SIZE - 4096, 4096)]
