"""Every bound of the NBD front, and how the bounds relate.

Memory of all connections together is at most CONNECTIONS_MAX times (one receive buffer + FLOOR), plus the shared
budget; each part is only touched as bytes arrive or answers are made.
"""

from typing import Final

from forebay_cache.format.nbd_options import PAYLOAD_SIZE_MAX, STRING_SIZE_MAX
from forebay_core.units import KIB, MIB

OPTION_SIZE_MAX: Final = 64 * KIB
"""Bytes of one option's data that are looked at; a longer one is skipped and refused."""

OPTION_SKIP_MAX: Final = 1 * MIB
"""Bytes of one option's data that are skipped; a longer one ends the connection."""

OPTIONS_MAX: Final = 2048
"""Options of one negotiation: a client may ask for each of a thousand exports twice."""

NEGOTIATION_SIZE_MAX: Final = 4 * MIB
"""Bytes of one negotiation."""

NEGOTIATION_OUTPUT_MAX: Final = 256 * KIB
"""Unsent bytes of answers at which no more options are taken; one option may go beyond it."""

RECEIVE_SIZE: Final = 256 * KIB
"""Bytes of the buffer into which a connection receives."""

LARGE_RECEIVE_SIZE: Final = 1 * MIB + 4 * KIB
"""Bytes of the buffer for one larger write; beyond it a buffer of just its size is made."""

BATCH_MAX: Final = 128
"""Requests taken at once before others get their turn: about 0.4 ms."""

SIZE_SHIFT: Final = 13
"""A read, or a write from a client's memory, counts as one more of them for each 8 KiB: one of 1 MiB takes 0.3 ms."""

IN_FLIGHT_MAX: Final = 1024
"""Requests of one connection that wait for the volume."""

OUT_BUFFERS_MAX: Final = 1024
"""Gathered buffers of unsent replies at which no more requests are taken; IOV_MAX, one sendmsg."""

FLOOR: Final = 1 * MIB
"""Bytes each connection may hold without asking: small requests never starve."""

CONNECTION_BYTES_MAX: Final = 2 * PAYLOAD_SIZE_MAX + 1 * MIB
"""Bytes one connection may hold: reads in flight or unsent, buffers with writes in flight."""

BUDGET_SIZE: Final = 256 * MIB
"""Bytes that all connections together may hold above their floors."""

STATUS_DESCRIPTORS_MAX: Final = 4096
"""Extents in one answer to BLOCK_STATUS, of each context."""

CONTEXTS_MAX: Final = 16
"""Meta contexts that one client may select: each is asked for at every BLOCK_STATUS."""

CONNECTIONS_MAX: Final = 1024
NEGOTIATING_MAX: Final = 64
"""Connections in negotiation; the oldest gives way to a new one."""

ACCEPTS_PER_TURN: Final = 32
HANDSHAKE_TIMEOUT_S: Final = 10.0
LINGER_TIMEOUT_S: Final = 10.0
"""How long a client that said goodbye may leave replies unread."""

STALL_TIMEOUT_S: Final = 30.0
"""How long a client may hold budget that others wait for and move too little of what it must send or read."""

PROGRESS_SIZE_MIN: Final = 64 * KIB
"""Bytes that are the least a client moves in STALL_TIMEOUT_S while others wait for the budget that it holds."""

STALL_PERIODS_MAX: Final = 8
"""Times STALL_TIMEOUT_S for the whole of what it holds: a write of 32 MiB at 140 KB/s is the slowest that lives."""

CLOSE_GRACE_S: Final = 30.0
"""How long a detach waits for what is in flight before answering it with ESHUTDOWN."""

assert STRING_SIZE_MAX < OPTION_SIZE_MAX <= OPTION_SKIP_MAX < NEGOTIATION_SIZE_MAX
assert OPTION_SIZE_MAX < RECEIVE_SIZE <= FLOOR <= LARGE_RECEIVE_SIZE <= PAYLOAD_SIZE_MAX
assert 2 * PAYLOAD_SIZE_MAX < CONNECTION_BYTES_MAX < BUDGET_SIZE
assert PROGRESS_SIZE_MIN * STALL_PERIODS_MAX <= FLOOR
assert BATCH_MAX <= IN_FLIGHT_MAX
