"""The NBD handshake, without I/O: bytes in, bytes out, and in the end a session or a hang-up.

Invariants:
    Nothing is allocated from a length that the client sent; options, their sizes and their sum are bounded.
    In state OVER no more bytes are consumed; what a client sent behind GO belongs to the transmission phase.
Crash: a client connects again.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from forebay_cache.engine.front import Exports, FrontVolume
from forebay_cache.engine.nbd_limits import (
    CONTEXTS_MAX,
    NEGOTIATION_OUTPUT_MAX,
    NEGOTIATION_SIZE_MAX,
    OPTION_SIZE_MAX,
    OPTION_SKIP_MAX,
    OPTIONS_MAX,
)
from forebay_cache.format.nbd_options import (
    BLOCK_SIZE_INFORMATION,
    BLOCK_SIZE_MIN,
    BLOCK_SIZE_PREFERRED,
    CLIENT_FLAGS,
    EXPORT_INFORMATION,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    FLAG_CAN_MULTI_CONN,
    FLAG_HAS_FLAGS,
    FLAG_READ_ONLY,
    FLAG_SEND_CACHE,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    GREETING,
    HANDSHAKE_FLAG_FIXED_NEWSTYLE,
    HANDSHAKE_FLAG_NO_ZEROES,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_NAME,
    MEMORY,
    NBD_MAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_MEMORY,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    OPTION,
    OPTION_MAGIC,
    PAYLOAD_SIZE_MAX,
    REP_ACK,
    REP_ERR_EXT_HEADER_REQD,
    REP_ERR_POLICY,
    REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    STRING_SIZE_MAX,
    BadOptionError,
    decode_context_query,
    decode_export_query,
    decode_string,
    encode_context,
    encode_reply,
    encode_server,
    encode_text,
)
from forebay_core.errors import ProtocolError

BASE_NAMESPACE: Final = "base:"
BASE_ALLOCATION: Final = "base:allocation"
QEMU_NAMESPACE: Final = "qemu:"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
_HANDSHAKE_FLAGS: Final = HANDSHAKE_FLAG_FIXED_NEWSTYLE | HANDSHAKE_FLAG_NO_ZEROES
_ALWAYS: Final = (
    FLAG_HAS_FLAGS
    | FLAG_SEND_FLUSH
    | FLAG_SEND_FUA
    | FLAG_SEND_TRIM
    | FLAG_SEND_WRITE_ZEROES
    | FLAG_SEND_FAST_ZERO
    | FLAG_SEND_CACHE
    | FLAG_CAN_MULTI_CONN
)

FindMemory = Callable[[int, int], memoryview | None]


class State(enum.Enum):
    """Where the handshake stands."""

    FLAGS = enum.auto()  # the client's flags are awaited
    OPTIONS = enum.auto()
    OVER = enum.auto()  # a session was made, or the connection is to be closed


class Event(enum.Enum):
    """What moves it."""

    FLAGS_ACCEPTED = enum.auto()
    OPTION_ANSWERED = enum.auto()
    EXPORT_CHOSEN = enum.auto()
    ABORTED = enum.auto()


TRANSITIONS: Final = {
    (State.FLAGS, Event.FLAGS_ACCEPTED): State.OPTIONS,
    (State.OPTIONS, Event.OPTION_ANSWERED): State.OPTIONS,
    (State.OPTIONS, Event.EXPORT_CHOSEN): State.OVER,
    (State.OPTIONS, Event.ABORTED): State.OVER,
}


class ReplyStyle(enum.Enum):
    """How requests are answered in the transmission phase."""

    SIMPLE = enum.auto()
    STRUCTURED = enum.auto()
    EXTENDED = enum.auto()


class Context(NamedTuple):
    """A meta context that a client selected; `snapshot` is empty for base:allocation."""

    id: int
    snapshot: str


class Session(NamedTuple):
    """What was agreed."""

    volume: FrontVolume
    style: ReplyStyle
    contexts: tuple[Context, ...]  # what a client may ask the status of blocks for
    memory: memoryview | None = None  # of the client, where payloads may be


class Negotiation:
    """One client's handshake. Feed bytes to `receive`, send `take_output`, until `over`; then look at `session`.

    `find_memory` returns the memory behind a descriptor of the client's process, of this inode, or None if that is none
    for us.
    """

    def __init__(self, exports: Exports, find_memory: FindMemory = lambda _number, _inode: None) -> None:
        self._exports = exports
        self._find_memory = find_memory
        self._memory: memoryview | None = None
        self._state = State.FLAGS
        self._output = bytearray(GREETING.pack(NBD_MAGIC, OPTION_MAGIC, _HANDSHAKE_FLAGS))
        self._zeroes = True
        self._style = ReplyStyle.SIMPLE
        self._context_volume: str | None = None
        self._contexts: tuple[Context, ...] = ()
        self._option_count = 0
        self._byte_count = 0
        self._skip = 0
        self._skipped_option = 0
        self.session: Session | None = None
        self._answers: dict[int, Callable[[int, bytes], Event]] = {
            OPT_EXPORT_NAME: self._export_name,
            OPT_ABORT: self._abort,
            OPT_LIST: self._list,
            OPT_INFO: self._export_query,
            OPT_GO: self._export_query,
            OPT_STRUCTURED_REPLY: self._structured_reply,
            OPT_LIST_META_CONTEXT: self._meta_context,
            OPT_SET_META_CONTEXT: self._meta_context,
            OPT_EXTENDED_HEADERS: self._extended_headers,
            OPT_MEMORY: self._share_memory,
        }

    @property
    def over(self) -> bool:
        """Whether no more is to be fed: `session` is set, or the connection ends after the output was sent."""
        return self._state is State.OVER

    def take_output(self) -> bytes:
        """Return what is to be sent since the last call."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def receive(self, received: memoryview) -> int:
        """Take what is whole at the front of `received`; return how many bytes that was.

        It stops early when much output has gathered: take that, send it, and call again.

        Raises:
            ProtocolError: the client broke the rules; close the connection.
        """
        at = 0
        while self._state is not State.OVER and len(self._output) < NEGOTIATION_OUTPUT_MAX:
            taken = self._take(received[at:])
            if taken == 0:
                break
            at += taken
            self._byte_count += taken
            if self._byte_count > NEGOTIATION_SIZE_MAX:
                raise ProtocolError(f"more than {NEGOTIATION_SIZE_MAX} bytes of negotiation")
        return at

    def _take(self, received: memoryview) -> int:
        if self._skip:
            return self._take_skipped(len(received))
        if self._state is State.FLAGS:
            return self._take_flags(received)
        return self._take_option(received)

    def _take_flags(self, received: memoryview) -> int:
        if len(received) < CLIENT_FLAGS.size:
            return 0
        (flags,) = CLIENT_FLAGS.unpack_from(received)
        if flags & ~_HANDSHAKE_FLAGS:
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._zeroes = not flags & HANDSHAKE_FLAG_NO_ZEROES
        self._move(Event.FLAGS_ACCEPTED)
        return CLIENT_FLAGS.size

    def _take_option(self, received: memoryview) -> int:
        if len(received) < OPTION.size:
            return 0
        magic, option, length = _unpack_option(received)
        self._check_option(magic, option, length)
        if length > OPTION_SIZE_MAX:
            self._count_option()
            self._skip = length
            self._skipped_option = option
            return OPTION.size
        if len(received) < OPTION.size + length:
            return 0
        self._count_option()
        self._move(self._answer(option, bytes(received[OPTION.size : OPTION.size + length])))
        return OPTION.size + length

    def _take_skipped(self, available: int) -> int:
        taken = min(self._skip, available)
        self._skip -= taken
        if taken and self._skip == 0:
            reply_type = REP_ERR_TOO_BIG if self._skipped_option in self._answers else REP_ERR_UNSUP
            self._reply(self._skipped_option, reply_type, f"at most {OPTION_SIZE_MAX} bytes of data".encode())
        return taken

    def _check_option(self, magic: int, option: int, length: int) -> None:
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"option magic {magic:#x}")
        if length > OPTION_SKIP_MAX:
            raise ProtocolError(f"an option of {length} bytes; at most {OPTION_SKIP_MAX}")
        if option == OPT_EXPORT_NAME and length > STRING_SIZE_MAX:
            raise ProtocolError(f"an export name of {length} bytes; at most {STRING_SIZE_MAX}")

    def _count_option(self) -> None:
        self._option_count += 1
        if self._option_count > OPTIONS_MAX:
            raise ProtocolError(f"more than {OPTIONS_MAX} options")

    def _answer(self, option: int, payload: bytes) -> Event:
        answer = self._answers.get(option)
        if answer is None:
            return self._reply(option, REP_ERR_UNSUP, b"this option is not supported")
        try:
            return answer(option, payload)
        except BadOptionError as error:
            if option == OPT_EXPORT_NAME:
                raise ProtocolError(f"export name: {error}") from error
            return self._reply(option, error.reply_type, str(error).encode())

    def _move(self, event: Event) -> None:
        self._state = TRANSITIONS[self._state, event]

    def _reply(self, option: int, reply_type: int, payload: bytes = b"") -> Event:
        self._output.extend(encode_reply(option, reply_type, payload))
        return Event.OPTION_ANSWERED

    def _abort(self, option: int, payload: bytes) -> Event:
        self._reply(option, REP_ACK)
        return Event.ABORTED

    def _list(self, option: int, payload: bytes) -> Event:
        _expect_empty(payload)
        for name in self._exports.names():
            self._reply(option, REP_SERVER, encode_server(name))
        return self._reply(option, REP_ACK)

    def _structured_reply(self, option: int, payload: bytes) -> Event:
        _expect_empty(payload)
        if self._style is ReplyStyle.EXTENDED:
            return self._reply(option, REP_ERR_EXT_HEADER_REQD, b"extended headers were negotiated already")
        if self._style is ReplyStyle.STRUCTURED:
            raise BadOptionError("structured replies were negotiated already")
        self._style = ReplyStyle.STRUCTURED
        return self._reply(option, REP_ACK)

    def _extended_headers(self, option: int, payload: bytes) -> Event:
        _expect_empty(payload)
        if self._style is ReplyStyle.EXTENDED:
            raise BadOptionError("extended headers were negotiated already")
        self._style = ReplyStyle.EXTENDED
        return self._reply(option, REP_ACK)

    def _share_memory(self, option: int, payload: bytes) -> Event:
        if len(payload) != MEMORY.size or self._memory is not None:
            raise BadOptionError("one descriptor and its inode are expected, 12 bytes, once")
        self._memory = self._find_memory(*MEMORY.unpack(payload))
        if self._memory is None:
            return self._reply(option, REP_ERR_POLICY, b"no sealed memory of this user's own process")
        return self._reply(option, REP_ACK)

    def _export_name(self, option: int, payload: bytes) -> Event:
        volume = self._exports.find(decode_string(payload))
        if volume is None:
            raise ProtocolError("export name: no such export")
        if self._style is ReplyStyle.EXTENDED:
            raise ProtocolError("EXPORT_NAME after extended headers")
        self._output.extend(EXPORT_NAME_REPLY.pack(volume.size, self._flags(volume)))
        if self._zeroes:
            self._output.extend(EXPORT_NAME_ZEROES)
        return self._choose(volume)

    def _export_query(self, option: int, payload: bytes) -> Event:
        query = decode_export_query(payload)
        volume = self._exports.find(query.name)
        if volume is None:
            return self._reply(option, REP_ERR_UNKNOWN, b"no such export")
        self._reply(option, REP_INFO, EXPORT_INFORMATION.pack(INFO_EXPORT, volume.size, self._flags(volume)))
        sizes = BLOCK_SIZE_INFORMATION.pack(INFO_BLOCK_SIZE, BLOCK_SIZE_MIN, BLOCK_SIZE_PREFERRED, PAYLOAD_SIZE_MAX)
        self._reply(option, REP_INFO, sizes)
        if INFO_NAME in query.wanted:
            self._reply(option, REP_INFO, encode_text(INFO_NAME, volume.name))
        if INFO_DESCRIPTION in query.wanted:
            self._reply(option, REP_INFO, encode_text(INFO_DESCRIPTION, f"Forebay volume {volume.name}"))
        self._reply(option, REP_ACK)
        return self._choose(volume) if option == OPT_GO else Event.OPTION_ANSWERED

    def _meta_context(self, option: int, payload: bytes) -> Event:
        if option == OPT_SET_META_CONTEXT:
            self._context_volume = None
            self._contexts = ()
        if self._style is ReplyStyle.SIMPLE:
            raise BadOptionError("meta contexts need structured replies")
        query = decode_context_query(payload)
        if any(":" not in name for name in query.queries):
            raise BadOptionError("a query begins with a namespace and a colon")
        volume = self._exports.find(query.name)
        if volume is None:
            return self._reply(option, REP_ERR_UNKNOWN, b"no such export")
        names = _contexts_of(volume)
        if option == OPT_SET_META_CONTEXT:
            self._select(volume, [name for name in names if name in query.queries])
        else:
            for name in names:
                if not query.queries or _is_asked(name, query.queries):
                    self._reply(option, REP_META_CONTEXT, encode_context(0, name))
        return self._reply(option, REP_ACK)

    def _select(self, volume: FrontVolume, names: list[str]) -> None:
        if len(names) > CONTEXTS_MAX:
            raise BadOptionError(f"{len(names)} meta contexts; at most {CONTEXTS_MAX}", REP_ERR_TOO_BIG)
        self._context_volume = volume.name
        snapshots = ["" if name == BASE_ALLOCATION else name.removeprefix(DIRTY_BITMAP) for name in names]
        self._contexts = tuple(Context(index + 1, snapshot) for index, snapshot in enumerate(snapshots))
        for context, name in zip(self._contexts, names, strict=True):
            self._reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, encode_context(context.id, name))

    def _choose(self, volume: FrontVolume) -> Event:
        contexts = self._contexts if self._context_volume == volume.name else ()
        self.session = Session(volume, self._style, contexts, self._memory)
        return Event.EXPORT_CHOSEN

    def _flags(self, volume: FrontVolume) -> int:
        return transmission_flags(volume) | (FLAG_SEND_DF if self._style is not ReplyStyle.SIMPLE else 0)


def transmission_flags(volume: FrontVolume) -> int:
    """Return the flags that a client with simple replies is told of a volume."""
    return _ALWAYS | (FLAG_READ_ONLY if volume.read_only else 0)


def _contexts_of(volume: FrontVolume) -> list[str]:
    return [BASE_ALLOCATION, *(DIRTY_BITMAP + name for name in volume.tracked())]


def _is_asked(name: str, queries: Sequence[str]) -> bool:
    """Tell whether queries of a list name a context, or all of its kind."""
    wider = (BASE_NAMESPACE,) if name == BASE_ALLOCATION else (QEMU_NAMESPACE, DIRTY_BITMAP)
    return any(query in (name, *wider) for query in queries)


def _unpack_option(received: memoryview) -> tuple[int, int, int]:
    magic, option, length = OPTION.unpack_from(received)
    return magic, option, length


def _expect_empty(payload: bytes) -> None:
    if payload:
        raise BadOptionError(f"{len(payload)} bytes of data where none belong")
