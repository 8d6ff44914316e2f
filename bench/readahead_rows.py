"""A cold sequential read of a volume over a link of 1 Gbit/s, against a plain TCP connection over the same link.

The store runs in a network namespace of its own. Every measurement of ours has a new cache device, so all that is read
comes over the link; the data does not compress.
"""

import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import fio
from fio import KIB, MIB, BenchError, Load
from namespaces import PAYLOAD_MBIT, Link
from results import OURS, Goal, Row, Sample
from rounds import Plan, make_random_file
from servers import Cache, Store, cpu_s

VOLUME_SIZE = 320 * MIB
READ_SIZE = 192 * MIB
CACHE_SIZE = "1GiB"
PEER = "tcp"
RECEIVE_SIZE = 256 * KIB
TIMEOUT_S = 60.0
SHAPES = (("1m", 1 * MIB), ("128k", 128 * KIB), ("4k", 4 * KIB))
_SEND = """
import os, socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
data = os.urandom(1 << 20)
connection, _ = listener.accept()
for _ in range(int(sys.argv[2])):
    connection.sendall(data)
"""


def measure(plan: Plan) -> list[Row]:
    """Return a row for each size of reads, one after the other."""
    note = (
        "store in a network namespace, veth with tbf 1gbit; depth 1; new cache device each time; peer: bytes from "
        "memory over one TCP connection; CPU of the cache daemon per read; the payload of 1 Gbit/s is "
        f"{PAYLOAD_MBIT} Mbit/s"
    )
    rows = [
        Row(f"readahead-{name}", f"cold sequential read, {name}, d1, 1 Gbit/s link", "Mbit/s", Goal(0.9, 0.97), note)
        for name, _ in SHAPES
    ]
    with ExitStack() as stack:
        link = stack.enter_context(Link())
        key = plan.folder / "key"
        key.write_text("k" * 32)
        key.chmod(0o600)
        words = ("--key-file", str(key))
        store = Store(plan.folder / "store", *words, prefix=link.prefix, listen=f"{link.there}:0")
        stack.callback(store.stop)
        source = plan.folder / "source.raw"
        make_random_file(source, VOLUME_SIZE)
        store.command("volume", "import", "cold", str(source), *words)
        source.unlink()
        for number in range(plan.rounds):
            for row, (_, block_size) in zip(rows, SHAPES, strict=True):
                steps = [(OURS, lambda size=block_size: _read(plan, store, key, size)), (PEER, lambda: _receive(link))]
                for name, step in steps if number % 2 == 0 else reversed(steps):
                    row.add(name, step())
    return rows


def _read(plan: Plan, store: Store, key: Path, block_size: int) -> Sample:
    device = plan.folder / "cache"
    words = ("--key-file", str(key))
    cache = Cache(device, plan.folder, store=store.address, size=CACHE_SIZE, more=words)
    try:
        cache.attach("cold")
        before_s = cpu_s(cache.pid)
        outcome = fio.run(cache.uri, Load("read", block_size, 1, TIMEOUT_S, VOLUME_SIZE, io_size=READ_SIZE))
        used_us = (cpu_s(cache.pid) - before_s) * 1e6 / outcome.operations
        cache.command("detach", "cold")
    finally:
        cache.stop()
        device.unlink()
    if outcome.operations * block_size != READ_SIZE:
        raise BenchError(f"only {outcome.operations} reads were made")
    return Sample(outcome.bytes_per_s * 8 / 1e6, used_us)


def _receive(link: Link) -> Sample:
    words = [*link.prefix, sys.executable, "-c", _SEND, link.there, str(READ_SIZE // MIB)]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        try:
            port = int(sender.stdout.readline())
            with socket.create_connection((link.there, port), timeout=TIMEOUT_S) as connection:
                began_s = time.monotonic()
                received = 0
                while chunk := connection.recv(RECEIVE_SIZE):
                    received += len(chunk)
                took_s = time.monotonic() - began_s
        finally:
            sender.kill()
    if received != READ_SIZE:
        raise BenchError(f"the peer sent {received} bytes")
    return Sample(received * 8 / 1e6 / took_s)
