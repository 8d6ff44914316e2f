"""Errors that users and peers can meet; each carries the exit code of the command that ends with it.

Three kinds: a bug is an `AssertionError`; an operating error is a `ForebayError`; corruption is a `CorruptionError`,
which names the place and both values and is never answered with data.
"""

from typing import Final

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2


class ForebayError(Exception):
    """An operating error. The text is one line that says what failed and what to do."""

    exit_code = EXIT_FAILED


class WrongUsageError(ForebayError):
    """The user's words are off: an unknown key, a bad value. The text names key, value and what is allowed."""

    exit_code = EXIT_USAGE


class CorruptionError(ForebayError):
    """Bytes that are not what was written.

    `place` says where (device or segment and offset), `what` which part, `expected` and `found` the two values.
    """

    def __init__(self, *, place: str, what: str, expected: object, found: object) -> None:
        super().__init__(f"corrupt {what} in {place}: expected {_show(expected)}, found {_show(found)}")
        self.place = place
        self.what = what
        self.expected = expected
        self.found = found


class UnreadableError(CorruptionError):
    """Bytes that a disk doesn't give back: damage to just those."""

    def __init__(self, *, place: str, reason: str) -> None:
        super().__init__(place=place, what="bytes", expected="to be read", found=reason)
        self.args = (f"{place}: can't be read ({reason})",)


class InUseError(ForebayError):
    """Another process holds the device or data folder."""


class StoreUnreachableError(ForebayError):
    """No store answers; the cache waits, a command gives up."""


class ProtocolError(ForebayError):
    """The peer broke the rules of the wire; the connection is closed."""


class AuthenticationError(ForebayError):
    """The peer's key is not ours."""


class NoSpaceError(ForebayError):
    """The disk below is full; nothing was lost, the request may be repeated."""


class RefusedError(ForebayError):
    """The store understood and says no. `code` is one of the codes in forebay_wire.messages."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def _show(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
