"""Serve volumes in memory over NBD, for clients in other processes: serve_ram.py SOCKET NAME=SIZE... [--late S]."""

import argparse
import asyncio
import signal

from ram_volume import LateVolume, RamExports, RamVolume

from forebay_cache.service.nbd_server import NbdServer


async def serve(options: argparse.Namespace) -> None:
    volumes = []
    for spec in options.volumes:
        name, _, size = spec.partition("=")
        late = options.late is not None
        volumes.append(LateVolume(name, int(size), delay_s=options.late) if late else RamVolume(name, int(size)))
        if options.full:
            volumes[-1].written[:] = b"\1" * len(volumes[-1].written)
            volumes[-1].view[:] = b"\xa5" * int(size)
    server = NbdServer(RamExports(*volumes))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if await server.listen_inherited() == 0:
        await server.listen_unix(options.socket)
    print("ready", flush=True)
    await stop.wait()
    await server.close(5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("volumes", nargs="+")
    parser.add_argument("--late", type=float)
    parser.add_argument("--full", action="store_true")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
