"""Every bound of the protocol, and how the bounds relate."""

from typing import Final

from forebay_core.frame import FRAME_SIZE_MAX
from forebay_core.units import KIB, MIB

BODY_SIZE_MAX: Final = 1 * MIB
"""Bytes of one message's MessagePack part."""

PAYLOAD_SIZE_MAX: Final = 16 * MIB
"""Bytes of raw payload behind one message."""

READ_BLOCKS_MAX: Final = 240
"""Blocks one Read may ask for: the answer fits one payload even when each block lies in a frame of its own."""

EXTENTS_MAX: Final = READ_BLOCKS_MAX
"""Extents in one Read."""

HOLES_PER_PART_MAX: Final = 65536
"""Hole extents in one StagePart."""

PIECES_MAX: Final = 16384
"""Pieces in one answer; longer answers go on in the next page."""

PARTS_PER_CUT_MAX: Final = 65536
REQUESTS_IN_FLIGHT_MAX: Final = 64
"""Requests of one connection that the server works on; it stops reading beyond it."""

BYTES_IN_FLIGHT_MAX: Final = 4 * PAYLOAD_SIZE_MAX
"""Bytes of one connection's requests (of a large one from its header on), of answers being made and of unsent ones. At
it the server stops reading, and an answer is not made before it fits."""

CONNECTIONS_MAX: Final = 1024
HANDSHAKE_TIMEOUT_S: Final = 10.0
PROGRESS_TIMEOUT_S: Final = 30.0
PROGRESS_SIZE_MIN: Final = 64 * KIB
"""Bytes that a message of more than READ_BUFFER_SIZE must bring in that time, else the connection ends: it holds memory
of its full size meanwhile."""

KEY_SIZE_MIN: Final = 16
KEY_SIZE_MAX: Final = 4096

assert READ_BLOCKS_MAX * FRAME_SIZE_MAX <= PAYLOAD_SIZE_MAX
assert HOLES_PER_PART_MAX * 12 < BODY_SIZE_MAX
assert PIECES_MAX * 28 < BODY_SIZE_MAX
assert EXTENTS_MAX * 12 < BODY_SIZE_MAX

SERVER_BYTES_IN_FLIGHT_MAX: Final = 16 * BYTES_IN_FLIGHT_MAX
"""The same over all connections of a server; beyond it a connection has one request and one answer at a time."""

HANDSHAKES_MAX: Final = 256
"""Connections that have not authenticated yet; one more drops the oldest of them."""

CONNECTIONS_MIN: Final = 16
"""A server that may have fewer connections than this, for want of files, does not start."""

READ_BUFFER_SIZE: Final = 128 * KIB
"""Receive buffer of an authenticated connection. A message that fills it gets memory of its own, of its full size."""

RECEIVE_SIZE_MAX: Final = 1 * MIB
"""Bytes taken from a socket in one step of the event loop."""

BUFFERS_PER_SEND_MAX: Final = 512
"""Buffers in one gathered write; Linux allows 1024."""

FAILED_TEXT_MAX: Final = 1000
"""Characters of the text in a Failed."""

LISTEN_BACKLOG: Final = 128
ACCEPT_RETRY_S: Final = 1.0
"""Pause after accept failed for want of file descriptors or memory."""

CLOSE_GRACE_S: Final = 5.0
"""How long a closing server waits for requests in flight and for their answers to be read."""

SOCKET_BUFFER_SIZE: Final = 1 * MIB
"""Wish for the buffers of Unix sockets; TCP sizes its own."""

KEEPALIVE_IDLE_S: Final = 5
KEEPALIVE_INTERVAL_S: Final = 3
KEEPALIVE_PROBES: Final = 3
PEER_DEAD_AFTER_MS: Final = 15_000
"""Sent bytes that nobody acknowledges or takes for so long end a TCP connection (TCP_USER_TIMEOUT)."""

assert BODY_SIZE_MAX + PAYLOAD_SIZE_MAX <= BYTES_IN_FLIGHT_MAX <= SERVER_BYTES_IN_FLIGHT_MAX
assert BUFFERS_PER_SEND_MAX <= 1024
assert CONNECTIONS_MAX >= CONNECTIONS_MIN
assert KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_PROBES <= PEER_DEAD_AFTER_MS / 1000
