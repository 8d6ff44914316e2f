"""Starting after kill -9: time to the first answered read, at two sizes of the cache, and how warm the cache still is.

The devices are made from the formats, full, a tenth of their blocks dirty, data as holes; blocks are scattered. The
daemon is started, let work for a while, killed and started again; a raw NBD client asks for one dirty and one clean
block at once, as soon as the socket takes a connection. A store runs and does not know the volume, so nothing is
destaged; every answer comes from the cache.
"""

import os
import random
import socket
import struct
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import fio
from fio import KIB, MIB, BenchError, Load
from full_device import VOLUME, FullDevice, make_full_device
from results import OURS, Goal, Row, Sample
from rounds import Plan
from servers import FOREBAY, Cache, Store, sync_file

SIZES_GIB = (20, 80)
DIRTY_SHARE = 10
SETTLE_S = 2.0
TIMEOUT_S = 60.0
BLOCK_SIZE = 4096

HOT_CACHE = "96MiB"
HOT_VOLUME = 192 * MIB
HOT_SIZE = 8 * MIB
HOT_USES = 6

_MAGIC = struct.Struct(">8sQH")
_OPTION = struct.Struct(">8sII")
_ANSWER = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_OPTION_MAGIC = b"IHAVEOPT"
_EXPORT_NAME = 1
_READ = 0


class _Times(NamedTuple):
    """Seconds from the start of the process to each event."""

    connected: float
    dirty: float
    clean: float


def measure(plan: Plan) -> list[Row]:
    """Return the rows of a restart."""
    rows: list[Row] = []
    if "restart" in plan.keys:
        rows += _first_reads(plan)
    if "warm" in plan.keys:
        rows.append(_hit_ratio(plan))
    return rows


def _first_reads(plan: Plan) -> list[Row]:
    note = (
        f"full cache, 1/{DIRTY_SHARE} dirty, data as holes, after kill -9; pages of the file written back before; "
        "the store does not know the volume, so no answer comes from it"
    )
    rows = {
        (size, what): Row(f"restart-{what}-{size}", f"start to {text}, {size} GiB", "s", goal, note)
        for size in SIZES_GIB
        for what, text, goal in (
            ("connected", "first connection", Goal()),
            ("dirty", "first read, dirty block", Goal(2.0, less_is_better=True)),
            ("clean", "first read, clean block", Goal(2.0, less_is_better=True)),
        )
    }
    ratios = {
        what: Row(f"restart-{what}-x4", f"the same, {what} block, 4 times the size", "x", goal, note)
        for what, goal in (("dirty", Goal(1.5, less_is_better=True)), ("clean", Goal(1.5, less_is_better=True)))
    }
    imports = Row("restart-imports", "of it: python and imports", "s", Goal(), "forebay cache serve --help")
    with ExitStack() as stack:
        store = Store(plan.folder / "store")
        stack.callback(store.stop)
        caches = {size: _start_full(plan.folder, size, store.address, stack) for size in SIZES_GIB}
        for number in range(plan.rounds):
            found = {size: _restart(*caches[size], seed=number) for size in SIZES_GIB}
            for size, times in found.items():
                for what in times._fields:
                    rows[size, what].add(OURS, Sample(getattr(times, what)))
            small, large = (found[size] for size in SIZES_GIB)
            ratios["dirty"].add(OURS, Sample(large.dirty / small.dirty))
            ratios["clean"].add(OURS, Sample(large.clean / small.clean))
            imports.add(OURS, Sample(_import_s()))
    return [*rows.values(), *ratios.values(), imports]


def _start_full(folder: Path, size_gib: int, store: str, stack: ExitStack) -> tuple[Cache, FullDevice]:
    device = folder / f"full-{size_gib}"
    made = make_full_device(device, size_gib << 30, dirty_size=(size_gib << 30) // DIRTY_SHARE)
    place = folder / f"run-{size_gib}"
    place.mkdir()
    cache = Cache(device, place, store=store)
    stack.callback(cache.stop)
    cache.serve(VOLUME)
    return cache, made


def _restart(cache: Cache, made: FullDevice, *, seed: int) -> _Times:
    time.sleep(SETTLE_S)
    sync_file(cache.file)  # else the start waits for the disk to take the checkpoint that the daemon wrote last
    rng = random.Random(seed)
    clean_count = made.block_count - made.dirty_count
    # Not the first hundredth: when it starts the daemon may have freed the oldest zones.
    clean = made.lba_of(rng.randrange(clean_count // 100, clean_count))
    dirty = made.lba_of(rng.randrange(clean_count, made.block_count))
    cache.kill()
    began_s = time.monotonic()
    return cache.restart(lambda: _ask(cache.socket, dirty, clean, began_s))


def _ask(path: Path, dirty: int, clean: int, began_s: float) -> _Times:
    """Read both blocks as soon as somebody listens; return when each answer came."""
    with _connect(path, began_s + TIMEOUT_S) as peer:
        connected = time.monotonic() - began_s
        _take(peer, _MAGIC.size)
        name = VOLUME.encode()
        peer.sendall(struct.pack(">I", 3) + _OPTION.pack(_OPTION_MAGIC, _EXPORT_NAME, len(name)) + name)
        _take(peer, 10)
        for tag, lba in enumerate((dirty, clean)):
            peer.sendall(_REQUEST.pack(0x25609513, 0, _READ, tag, lba * BLOCK_SIZE, BLOCK_SIZE))
        times = {}
        for _ in range(2):
            _, error, tag = _REPLY.unpack(_take(peer, _REPLY.size))
            if error or any(_take(peer, BLOCK_SIZE)):
                raise BenchError(f"a read after the restart gave error {error} or wrong bytes")
            times[tag] = time.monotonic() - began_s
    return _Times(connected, times[0], times[1])


def _connect(path: Path, deadline_s: float) -> socket.socket:
    while time.monotonic() < deadline_s:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(TIMEOUT_S)
        try:
            peer.connect(str(path))
            return peer
        except OSError:
            peer.close()
            time.sleep(0.002)
    raise BenchError(f"nobody listens on {path}")


def _take(peer: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = peer.recv(size - len(found))
        if not piece:
            raise BenchError("the daemon closed the connection")
        found += piece
    return found


def _import_s() -> float:
    began_s = time.monotonic()
    subprocess.run([*FOREBAY, "cache", "serve", "--help"], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return time.monotonic() - began_s


def _hit_ratio(plan: Plan) -> Row:
    note = (
        f"{HOT_SIZE >> 20} MiB read {HOT_USES} times at random, then {HOT_VOLUME - HOT_SIZE >> 20} MiB once (cache "
        f"{HOT_CACHE}), then the first once more: hit ratio of that, with a checkpoint, kill -9 and start before the "
        "long read over without"
    )
    row = Row("restart-warm", "hit ratio of the frequent after a kill over before", "x", Goal(0.98, 0.995), note)
    with ExitStack() as stack:
        store = Store(plan.folder / "warm-store")
        stack.callback(store.stop)
        place = plan.folder / "warm"
        place.mkdir()
        cache = Cache(place / "cache", place, store=store.address, size=HOT_CACHE)
        stack.callback(cache.stop)
        store.command("volume", "create", "hot", "--size", str(HOT_VOLUME))
        cache.attach("hot")
        fio.run(cache.uri, Load("write", MIB, 8, 120, HOT_VOLUME, io_size=HOT_VOLUME))
        cache.settle()
        for number in range(plan.rounds):
            before = _withstood(cache, 300 + number, killed=False)
            row.add(OURS, Sample(_withstood(cache, 400 + number, killed=True) / before))
    return row


def _withstood(cache: Cache, seed: int, *, killed: bool) -> float:
    """Return the hit ratio of frequent blocks after a burst of others; where only their places are known, and not how
    often they were used, it falls."""
    hot = Load("randread", 4 * KIB, 16, 120, HOT_SIZE, io_size=HOT_SIZE, seed=seed)
    for turn in range(HOT_USES):
        fio.run(cache.uri, hot._replace(seed=10 * seed + turn))
    if killed:
        cache.stop()
        cache.restart(lambda: None)
        cache.kill()
        cache.restart(lambda: None)
    others = HOT_VOLUME - HOT_SIZE
    fio.run(cache.uri, Load("randread", 4 * KIB, 16, 120, others, io_size=others, offset=HOT_SIZE, seed=seed))
    return _hits(cache, hot)


def _hits(cache: Cache, load: Load) -> float:
    start = cache.status()
    fio.run(cache.uri, load)
    end = cache.status()
    hits, misses = (end[key] - start[key] for key in ("hit_blocks", "miss_blocks"))
    return hits / (hits + misses)
