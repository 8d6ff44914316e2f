"""Every bound of the protocol, and how the bounds relate."""

from typing import Final

from forebay_core.frame import FRAME_SIZE_MAX
from forebay_core.units import MIB

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
"""Payload bytes of one connection's requests and unsent answers; the server stops reading beyond it."""

CONNECTIONS_MAX: Final = 1024
HANDSHAKE_TIMEOUT_S: Final = 10.0
KEY_SIZE_MIN: Final = 16
KEY_SIZE_MAX: Final = 4096

assert READ_BLOCKS_MAX * FRAME_SIZE_MAX <= PAYLOAD_SIZE_MAX
assert HOLES_PER_PART_MAX * 12 < BODY_SIZE_MAX
assert PIECES_MAX * 28 < BODY_SIZE_MAX
assert EXTENTS_MAX * 12 < BODY_SIZE_MAX
