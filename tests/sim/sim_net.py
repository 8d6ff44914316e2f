"""The network: byte streams that are delayed, cut into pieces, cut off at any byte, and know nothing of each other.

Bytes of one connection keep their order; connections overtake each other, and what an old one still carries may
arrive long after a new one is in use. Real `Link`s and `Connection`s of `forebay_wire` talk over these sockets.
"""

from collections import deque
from collections.abc import Callable, Sequence

from sim_world import SimLoop, World

from forebay_core.units import Buffer

RESET = 104
PIPE = 32


class SimSocket:
    """One end of a connection; what asyncio code asks of a non-blocking socket."""

    def __init__(self, network: "Network", loop: SimLoop) -> None:
        self.network = network
        self.loop = loop
        self.inbox = bytearray()
        self.ended = ""  # "closed" by the peer, or "reset"
        self.closed = False
        self.out: Pipe
        self._reader: Callable[[], None] | None = None
        self._woken = False

    def set_reader(self, callback: Callable[[], None] | None) -> None:
        """What add_reader and remove_reader do."""
        self._reader = callback
        self.poke()

    def poke(self) -> None:
        """Call the reader soon if there is something to read."""
        if self._reader is not None and not self._woken and (self.inbox or self.ended):
            self._woken = True
            self.loop.call_soon(self._readable)

    def _readable(self) -> None:
        self._woken = False
        if self._reader is not None:
            self._reader()
            self.poke()

    def recv_into(self, view: memoryview) -> int:
        """See socket."""
        if self.inbox:
            count = min(view.nbytes, len(self.inbox))
            view[:count] = self.inbox[:count]
            del self.inbox[:count]
            return count
        if self.ended == "reset":
            raise ConnectionResetError(RESET, "Connection reset by peer")
        if self.ended:
            return 0
        raise BlockingIOError

    def send(self, content: Buffer) -> int:
        """See socket; takes everything."""
        if self.ended == "reset":
            raise BrokenPipeError(PIPE, "Broken pipe")
        packed = bytes(content)
        if self.loop.alive:
            self.out.send(packed)
        return len(packed)

    def sendmsg(self, buffers: Sequence[Buffer]) -> int:
        """See socket."""
        return self.send(b"".join(buffers))

    def close(self) -> None:
        """See socket."""
        if not self.closed:
            self.closed = True
            self._reader = None
            if self.loop.alive:
                self.out.end("closed")


class Pipe:
    """One direction: bytes on their way to `target`."""

    def __init__(self, network: "Network", name: str, target: SimSocket) -> None:
        self._network = network
        self._name = name
        self._target = target
        self._chunks: deque[bytes] = deque()
        self._ending = ""
        self._last_ns = 0
        self._round = 0
        self._outage_ns = 0  # the end of the last one that it met
        self._resumed_ns = 0  # when it has noticed that end

    def send(self, content: bytes) -> None:
        """Put bytes on their way, whole or in pieces."""
        if self._ending:
            return
        for piece in self._network.pieces(content):
            self._chunks.append(piece)
            self._schedule(self._network.delay())

    def end(self, how: str) -> None:
        """Let the stream end behind what is on its way."""
        if not self._ending:
            self._ending = how
            self._schedule(self._network.delay())

    def cut(self, *, late_ns: int) -> None:
        """Let a part of what is on its way arrive, some time, and then the end."""
        rest = b"".join(self._chunks)
        kept = rest[: self._network.random.randrange(len(rest) + 1)]
        self._chunks.clear()
        self._round += 1
        self._ending = "reset"
        if kept:
            self._chunks.append(kept)
            self._schedule(late_ns)
        self._schedule(late_ns)

    def _schedule(self, delay_ns: int) -> None:
        world = self._network.world
        due_ns = max(self._last_ns + 1, world.now_ns + delay_ns)
        self._last_ns = due_ns
        world.at(due_ns - world.now_ns, self._arrive, self._round)

    def _arrive(self, round_number: int) -> None:
        if round_number != self._round:
            return
        world = self._network.world
        if self._network.down_ns > max(world.now_ns, self._outage_ns):
            self._outage_ns = self._network.down_ns
            self._resumed_ns = self._outage_ns + self._network.backoff()
        if self._resumed_ns > world.now_ns:
            world.at(self._resumed_ns - world.now_ns, self._arrive, round_number)
            return
        if self._chunks:
            chunk = self._chunks.popleft()
            world.note(f"{self._name} {len(chunk)} bytes arrive", chunk, quiet=True)
            self._target.inbox += chunk
            world.point(f"{self._name} message")
        else:
            self._target.ended = self._ending
        if self._target.loop.alive:
            self._target.poke()


class Network:
    """Between all hosts. `slow` delays by up to seconds; until `down_ns` nothing arrives, and what was under way does
    when its sender has tried again, as TCP does at longer and longer intervals."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.rng("network")
        self._retries = world.rng("retries")
        self.slow = False
        self.down_ns = 0
        self.splitting = 0.1
        self._pairs: list[tuple[SimSocket, SimSocket]] = []

    def connect(self, client: SimLoop, server: SimLoop, names: tuple[str, str]) -> tuple[SimSocket, SimSocket]:
        """Return the two ends of a new connection."""
        ours, theirs = SimSocket(self, client), SimSocket(self, server)
        ours.out = Pipe(self, f"{names[0]}>{names[1]}", theirs)
        theirs.out = Pipe(self, f"{names[1]}>{names[0]}", ours)
        self._pairs.append((ours, theirs))
        return ours, theirs

    def cut(self, loop: SimLoop | None = None) -> None:
        """Cut connections, all or those of one program, each at a byte of its own choosing."""
        cut = [pair for pair in self._pairs if loop is None or loop in (pair[0].loop, pair[1].loop)]
        self._pairs = [pair for pair in self._pairs if pair not in cut]
        for pair in cut:
            for end in pair:
                late_ns = self.random.choice((0, 0, self.random.randrange(3_000_000_000)))
                end.out.cut(late_ns=late_ns)

    def heal(self) -> None:
        """Be a good network from now on."""
        self.slow = False
        self.down_ns = 0

    def delay(self) -> int:
        """Return how long the next bytes take."""
        if self.slow and self.random.random() < 0.3:
            return self.random.randrange(2_000_000_000)
        return self.random.randrange(20_000, 400_000)

    def backoff(self) -> int:
        """Return how long after an outage a connection that was in use goes on."""
        return self._retries.choice((0, self._retries.randrange(200_000_000), self._retries.randrange(4_000_000_000)))

    def pieces(self, content: bytes) -> list[bytes]:
        """Return the bytes in one piece or several."""
        if len(content) < 2 or self.random.random() >= self.splitting:
            return [content]
        cuts = sorted({self.random.randrange(1, len(content)) for _ in range(self.random.randrange(1, 4))})
        return [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
