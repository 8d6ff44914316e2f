"""What every message is: see `messages`."""

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=False):
    """Base of all messages."""
