"""Every bound of the store, and how the bounds relate."""

from typing import Final

from forebay_core.frame import FRAME_BLOCKS_MAX
from forebay_core.units import BLOCK_SIZE, GIB, MIB
from forebay_wire.limits import HOLES_PER_PART_MAX, PARTS_PER_CUT_MAX, PAYLOAD_SIZE_MAX, SERVER_BYTES_IN_FLIGHT_MAX

SEGMENT_SIZE_MAX: Final = 32 * MIB
"""Bytes of one segment; the largest record fits with room for its headers."""

INCARNATION_MAX: Final = (1 << 20) - 1
"""Starts of a store; an entry of the index has 20 bits for it."""

SEGMENT_NUMBER_MAX: Final = (1 << 32) - 1
"""Segments of one start; an entry of the index has 32 bits for it."""

VOLUME_NUMBER_MAX: Final = (1 << 24) - 2
"""Volumes that a store may ever make: a key of the head has 24 bits for it."""

SEGMENT_RECORDS_MAX: Final = 16384
"""Records in one segment: bounds what replay builds at a time."""

PENDING_BYTES_MAX: Final = SERVER_BYTES_IN_FLIGHT_MAX + 4 * SEGMENT_SIZE_MAX
"""Bytes of records that wait for a segment; requests beyond it are refused and may be repeated. The wire stops
reading before that, unless very many connections send one large part each."""

PENDING_RECORDS_MAX: Final = 65536
"""Records that wait for a segment."""

WAITING_PER_VOLUME_MAX: Final = 64
"""Changes of one volume that wait for their turn."""

PART_ENTRIES_MAX: Final = 4096
"""Extents of frames in one part. An honest part has at most one for each block: 1024 from a cache, 2048 from an import;
frames of a few bytes would make 180,000 of one payload."""

CUT_ENTRIES_MAX: Final = PARTS_PER_CUT_MAX * 512 + 4 * HOLES_PER_PART_MAX
"""Extents of one cut, holes included: as many as a cache may gather while the store is away (33.5 million blocks, one
in each extent). A commit is one transaction of the index, and the changes of other volumes wait for it."""

UNAPPLIED_SEGMENTS_MAX: Final = 16
"""Durable segments that the index may lag behind while the store runs."""

ATTEMPTS_PER_VOLUME_MAX: Final = 8
"""Unfinished cuts of one volume; beyond it the oldest is forgotten."""

STAGED_BYTES_MAX: Final = 1024 * GIB
"""Stored bytes of all unfinished cuts of one volume."""

STAGED_PARTS_MAX: Final = 2 * PARTS_PER_CUT_MAX
"""Parts of all unfinished cuts of one volume."""

ROWS_PER_PAGE_MAX: Final = 1024
"""Volumes in one answer to ListVolumes, snapshots in one to ListSnapshots."""

SCAN_ENTRIES_MAX: Final = 65536
"""Entries of the head that one page of Changed or MapExtents looks at."""

PURGE_ENTRIES_MAX: Final = 4096
"""Entries of a deleted volume or snapshot that one record removes, or moves to an older snapshot."""

TRIM_ENTRIES_MAX: Final = 4096
"""Entries of the head that one change trims at once; the rest is hidden, and swept in steps."""

SWEEP_ENTRIES_MAX: Final = 4096
"""Entries of the head that one such step changes."""

DISPLACED_PER_ROW_MAX: Final = 240
"""Entries of the history in one row of `displaced`: with it a row stays within a page of LMDB."""

CLONE_NAMES_MAX: Final = 64
"""Clones that the row of a snapshot names."""

CLONE_DEPTH_MAX: Final = 32
"""Snapshots through which a clone may read: each costs a read of the index where nothing above it has a block."""

SNAPSHOTS_PER_VOLUME_MAX: Final = 65536
"""Snapshots of one volume that are taken at the store. One that closes a cut is never refused."""

FLATTEN_BLOCKS_MAX: Final = 512
"""Blocks that one step of flattening copies: 2 MiB."""

FLATTEN_RETRY_S: Final = 30.0
FLATTEN_RETRY_S_MAX: Final = 3600.0
"""When clones whose origin could not be read are tried again: later each time, up to an hour."""

CHUNK_SIZE: Final = MIB
"""Bytes of index rows in one chunk of a checkpoint, before they are compressed; one row may be larger."""

CHECKPOINT_BATCH_SIZE: Final = 4 * MIB
"""Bytes of a checkpoint that are put into the log at once; the next ones follow when they are durable."""

CHUNK_PLAIN_MAX: Final = 8 * MIB
"""Bytes of one row of the index at most: a staged part has the longest, its holes and the extents of its frames."""

MOVES_MAX: Final = 16384
"""Extents in one record of the cleaner."""

COPY_BLOCKS_MAX: Final = 8192
"""Blocks that one step of the cleaner holds in memory, opened."""

COPY_SIZE: Final = 8 * MIB
"""Bytes that one step of the cleaner copies, about."""

DELETED_NAMES_MAX: Final = 4096
"""Segments that one step of the cleaner deletes."""

OPEN_FILES_MAX: Final = 128
"""Segments kept open for reading."""

FILES_RESERVED: Final = 128
"""Open files beyond segments and connections: the index, a segment being written, what Python and a lookup need."""

READ_GAP_MAX: Final = 16384
"""Bytes between two wanted frames that are read along rather than read around."""

INDEX_SIZE_START: Final = 1024 * GIB
"""Address space of the index at first; the file is as large as what is in it."""

REPORTS_PER_MESSAGE_MAX: Final = 1024
"""Volumes of which one cache may report at once; a device knows fewer."""

REPORTS_MAX: Final = 65536
"""Volumes of which the last report is kept, 200 bytes each; the one heard of longest ago is forgotten."""

REPORTS_PAUSE_S: Final = 5.0
"""How long the file of the reports is left alone after it was written, though there is news."""

REPORTS_REFRESH_S: Final = 60.0
"""And when caches only say again what they said before: a time on the disk that is this old does no harm."""

DAMAGE_ROWS_MAX: Final = 4096
"""Damaged extents that are listed; there may be more."""

DAMAGE_TEXT_MAX: Final = 512
"""Bytes of a name or a text in that list."""

DAMAGE_PER_PAGE_MAX: Final = 1024
"""Damaged extents in one answer."""

SCRUB_ROWS_PER_LOOK: Final = 4096
SCRUB_YIELD_S: Final = 0.004
"""Rows of the index that the scrub looks at before it gives way, and for how long: as long as it took."""

SCRUB_PAUSE_S: Final = 60.0
"""How long the scrub waits before it looks again whether it is due, and at most between two writes of its file."""

CLEAN_PAUSE_S: Final = 1.0
"""How long the cleaner waits between looks."""

RESERVE_SIZE_MAX: Final = 64 * MIB
"""Bytes of the disk that data does not get, so that trims, deletions and the cleaner can free some; more if a
checkpoint is larger."""

RESERVE_SHARE: Final = 1 / 16
"""The same as a share of the disk, where that is less."""

COPY_ROOM_SHARE: Final = 1 / 4
"""Share of the free bytes that one step of the cleaner may use."""

CLEAN_YIELD: Final = 8.0
"""So many times less than its rate the cleaner copies while clients read or write, since they share one interpreter.
Reads of 16 KiB beside it ran at 0.76 of their rate with 4, at 0.91 with 8 (2 cores, November 2026)."""

CLEAN_LOOK_SIZE: Final = 4 * MIB
"""Bytes that clients send after which the cleaner looks at once, at least."""

CLEAN_LOOK_SHARE: Final = 1 / 64
"""The same as a share of the live bytes."""

PURGE_PAUSE_S: Final = 0.05
"""How long a pass that was asked for waits before it looks again whether what was deleted is out of the index."""

CLEAN_IDLE_S: Final = 10.0
"""When clients have changed nothing for so long the cleaner cleans thoroughly."""

CLEAN_RETRY_S: Final = 10.0
"""How long it waits after an error."""

SPACE_RATIO_PRESSED: Final = 1.35
"""Bytes on the disk over live ones: above it the cleaner waits less than its rate asks for."""

SPACE_RATIO_FREE: Final = 1.4
"""From here on it does not wait at all."""

assert PAYLOAD_SIZE_MAX + HOLES_PER_PART_MAX * 12 + MIB <= SEGMENT_SIZE_MAX
assert 2 * SEGMENT_SIZE_MAX <= PENDING_BYTES_MAX
assert SEGMENT_RECORDS_MAX <= PENDING_RECORDS_MAX
assert SEGMENT_SIZE_MAX < 1 << 32
assert HOLES_PER_PART_MAX + PART_ENTRIES_MAX <= CUT_ENTRIES_MAX
assert HOLES_PER_PART_MAX * 12 + PART_ENTRIES_MAX * 24 + MIB <= CHUNK_PLAIN_MAX <= SEGMENT_SIZE_MAX // 2
assert 2 * COPY_SIZE <= SEGMENT_SIZE_MAX
assert COPY_BLOCKS_MAX < MOVES_MAX
assert REPORTS_PER_MESSAGE_MAX <= REPORTS_MAX
assert 1 < SPACE_RATIO_PRESSED < SPACE_RATIO_FREE
assert CHECKPOINT_BATCH_SIZE + CHUNK_PLAIN_MAX <= SEGMENT_SIZE_MAX // 2
assert REPORTS_PAUSE_S < REPORTS_REFRESH_S
assert BLOCK_SIZE * FRAME_BLOCKS_MAX < PAYLOAD_SIZE_MAX
