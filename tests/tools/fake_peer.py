"""A store or cache daemon that answers as a test says, on a real socket in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from forebay_core.errors import RefusedError
from forebay_core.units import Buffer
from forebay_wire.address import UnixPath, parse_address
from forebay_wire.messages import BAD_REQUEST, AnyMessage, Failed
from forebay_wire.peer import Peer
from forebay_wire.server import WireServer

Answer: TypeAlias = Callable[[AnyMessage], AnyMessage | tuple[AnyMessage, Sequence[Buffer]] | None]
"""What a message is answered with, with a payload or without; None: it is refused."""

START_TIMEOUT_S = 30


class FakePeer:
    """Keeps what it was asked; what the test has no answer for is refused."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[AnyMessage] = []
        self.address = ""
        self._make = answer

    async def answer(
        self, _peer: Peer, message: AnyMessage, _payload: memoryview
    ) -> tuple[AnyMessage, Sequence[Buffer]]:
        self.asked.append(message)
        answer = self._make(message)
        if answer is None:
            raise RefusedError(BAD_REQUEST, f"{type(message).__name__} is not for this one")
        if isinstance(answer, Failed):
            raise RefusedError(answer.code, answer.text)
        return answer if isinstance(answer, tuple) else (answer, ())


@contextmanager
def fake_peer(answer: Answer, *, run_dir: Path | None = None) -> Iterator[FakePeer]:
    """Serve on loopback, or as the cache daemon of a run directory."""
    peer = FakePeer(answer)
    started, loop = threading.Event(), asyncio.new_event_loop()
    ended = asyncio.Event()

    async def serve() -> None:
        server = WireServer(peer.answer, key=None, node=b"P" * 16)
        if run_dir is not None:
            await server.listen_unix(UnixPath(str(run_dir / "control.sock")))
        else:
            peer.address = str(await server.listen_tcp(parse_address("127.0.0.1:0")))
        started.set()
        await ended.wait()
        await server.close(1.0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(START_TIMEOUT_S)
        yield peer
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(START_TIMEOUT_S)
        loop.close()


Serve: TypeAlias = Callable[..., FakePeer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start peers that end with the test; the environment names none of them."""
    for name in ("FOREBAY_STORE", "FOREBAY_RUN_DIR", "FOREBAY_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as stack:
        yield lambda answer, **where: stack.enter_context(fake_peer(answer, **where))
