"""Which NBD requests are refused, and with what words. Nothing here allocates or calls a volume."""

from typing import Final, NamedTuple

from forebay_cache.format.nbd import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    NbdError,
)
from forebay_cache.format.nbd_options import PAYLOAD_SIZE_MAX
from forebay_core.units import BLOCK_SIZE

_CHANGES: Final = frozenset((CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES))
_FLAGS: Final = {  # FUA is allowed everywhere: existing clients set it on any command
    CMD_READ: CMD_FLAG_FUA | CMD_FLAG_DF,
    CMD_WRITE: CMD_FLAG_FUA,
    CMD_FLUSH: CMD_FLAG_FUA,
    CMD_TRIM: CMD_FLAG_FUA,
    CMD_CACHE: CMD_FLAG_FUA,
    CMD_WRITE_ZEROES: CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
}


class Request(NamedTuple):
    """A request's header without its magic."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Refused(NamedTuple):
    """Why a request is not done."""

    error: NbdError
    text: str


def check_request(
    request: Request, *, size: int, read_only: bool, extended: bool, fragments: bool, status: bool
) -> Refused | None:
    """Return why a request is refused, or None.

    `size` is the volume's, in bytes; `fragments` says that replies may be split (so DF means something), `status`
    that the client selected a meta context.
    """
    flags, command, _cookie, offset, length = request
    if command not in _FLAGS:
        return Refused(NbdError.EINVAL, f"unknown command {command}")
    if command == CMD_WRITE and extended:
        flags &= ~CMD_FLAG_PAYLOAD_LEN
    if flags & ~_FLAGS[command] or (flags & CMD_FLAG_DF and not fragments):
        return Refused(NbdError.EINVAL, f"flags {flags:#x} don't go with command {command}")
    if command in _CHANGES and read_only:
        return Refused(NbdError.EPERM, "the volume is read-only")
    if command == CMD_FLUSH:
        return None
    if offset + length > size:
        error = NbdError.ENOSPC if command in (CMD_WRITE, CMD_WRITE_ZEROES) else NbdError.EINVAL
        return Refused(error, f"beyond the end of the volume, {size} bytes")
    return _check_length(request, status)


def _check_length(request: Request, status: bool) -> Refused | None:
    flags, command, _cookie, offset, length = request
    if command == CMD_READ and length > PAYLOAD_SIZE_MAX:
        error = NbdError.EOVERFLOW if flags & CMD_FLAG_DF else NbdError.EINVAL
        return Refused(error, f"a read of {length} bytes; at most {PAYLOAD_SIZE_MAX}")
    if command == CMD_BLOCK_STATUS and not status:
        return Refused(NbdError.EINVAL, "no meta context was selected")
    if command == CMD_BLOCK_STATUS and length == 0:
        return Refused(NbdError.EINVAL, "the status of no bytes")
    if flags & CMD_FLAG_FAST_ZERO and length and not _holds_whole_block(offset, length):
        return Refused(NbdError.ENOTSUP, "zeroing parts of blocks is not faster than writing them")
    return None


def _holds_whole_block(offset: int, length: int) -> bool:
    first = -(-offset // BLOCK_SIZE)
    return (first + 1) * BLOCK_SIZE <= offset + length
