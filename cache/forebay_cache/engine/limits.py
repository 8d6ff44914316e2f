"""Every bound of the cache engine, and how the bounds relate."""

from typing import Final

from forebay_cache.format.checkpoint import END_COUNT_MAX, HOLES_MIN, VOLUME_COUNT_MAX
from forebay_cache.format.superblock import PLACE_COUNT_MAX
from forebay_wire.limits import HOLES_PER_PART_MAX, PARTS_PER_CUT_MAX, PAYLOAD_SIZE_MAX, REQUESTS_IN_FLIGHT_MAX

PLACES_MAX: Final = (1 << 32) - 3
"""Places of one device: their numbers fit u32 beside two sentinels, which is 16 TiB of cache."""

SCALAR_KEYS_MAX: Final = 48
"""Up to this many keys the map goes one by one: an array operation costs a microsecond before its first element."""

LINK_ROUNDS_MAX: Final = 64
"""Rounds in which a bulk load links its places; a chain that is longer than that is finished one by one."""

LOAD_SLICE_PLACES: Final = 32768
"""Places that one step of a whole load links."""

CHECKPOINT_CHUNKS_PER_STEP: Final = 8
"""Chunks that one step of a checkpoint copies and writes: 800 KB."""

RESTORE_PLACES: Final = 4096
"""Places that a start looks at together for dirty blocks."""

SEARCH_READS_MAX: Final = 8
SEARCH_WANTS_MAX: Final = 16
"""Key reads in flight, and reads of guests looked for at a time, while a block is searched in what is not loaded."""

SEARCHED_PER_LOADED: Final = 16
"""Chunks of which only the keys were searched for each one that is loaded before the next search: comparing costs a
16th of loading, so loading goes on at half its speed or more however many guests read."""

RANGE_LOOKUPS_MAX: Final = 1024
"""Blocks of a trimmed extent that one step looks up. Measured 2026-11 on a shared EPYC: 0.15 to 0.45 ms."""

RANGE_SCAN_RATIO: Final = 32
"""One lookup costs about as much as comparing this many places, so a longer extent is found by a scan: 32768 places in
one step. Measured likewise: 0.05 ms."""

SWEEPS_MAX: Final = 16
"""Long trims and drops whose blocks are still in the map; more of them wait. Each costs a look-up about 0.2 us."""

PREFETCH_STEPS_PER_TURN: Final = 16
"""Messages' worth of blocks that a prefetch looks at before others have their turn: 0.5 ms when all are cached."""

COUNT_MAX: Final = 15
"""Largest use count of a block."""

COUNTERS_PER_BLOCK: Final = 24
"""Counters of 4 bits that the frequency sketch has for each block that is worth keeping. With 8 the mean hit ratio over
seven traces is 0.005 lower; with 16 a scan of ten times the cache takes 11 % of the frequent blocks instead of at most
1.6 %, because cold ones look used (2026-11)."""

AGEING_ACCESSES: Final = 10
"""All counts are halved after this many accesses for each block that is worth keeping. With 20 the mean hit ratio over
seven traces is 0.002 higher, but a new working set is at 0.83 of its steady hit ratio after ten times the cache instead
of 0.9 (2026-11)."""

SWEEP_STEP: Final = 4
"""Words of the sketch and states of places that one access halves while all age."""

SETTLE_STEPS_MAX: Final = 4
"""Blocks that one access moves between the lists of the policy."""

VICTIMS_SKIPPED_MAX: Final = 8
"""Blocks of volumes below their floor that are passed over for one victim."""

FAVOURED_COUNT: Final = 2
"""Uses from which on a block of a volume below its floor needs not be more frequent than the victim."""

VOLUME_SLOTS: Final = 4096
"""Volumes whose blocks the policy counts apart; keys that share a slot share a floor."""

ADMISSION_ATTACK_COUNT: Final = 6
ADMISSION_ATTACK_MASK: Final = 127
"""One of 128 blocks that were used that often is let in against a more frequent one, so that nobody gains from
knowing the hash."""

MINIATURE_BLOCKS: Final = 4000
"""Blocks of each miniature that tries a plan of the policy."""

SCORES_PER_CAPACITY: Final = 10
SCORE_DECAY: Final = 0.9
SCORE_LEAD: Final = 0.002
"""Plans are scored after each tenth of the capacity in accesses, as a moving average; a better one must lead by that.

Measured 2026-11 on seven traces at five sizes: a quarter of the capacity and 0.8 give 0.002 less.
"""

RING_PER_CAPACITY: Final = 100
RING_BLOCKS_MAX: Final = 4096
"""Fetched blocks that wait in memory before they are written, or not: a hundredth of the cache, at most 16 MiB. Most
second uses come within it: it saves half of all writes at the same hit ratio (2026-11, four disk traces)."""

HELD_NS_MAX: Final = 10_000_000_000
"""They wait no longer than that, so a kill makes the cache no colder than it was 10 s before."""

DECIDED_PER_TICK_MAX: Final = 128
"""Blocks that one tick decides about because they have waited so long: half a millisecond."""

AHEAD_BLOCKS_MAX: Final = 8192
"""Blocks read ahead of all streams that wait in memory to be asked for: 32 MiB."""

AHEAD_STEP_BLOCKS: Final = 64
"""Blocks that one step of reading ahead asks for: 256 KiB. Its answer is held in one step as well."""

STREAMS_MAX: Final = 16
"""Sequential streams that are told apart in one volume."""

STREAM_STEP_MIN: Final = 16
"""Blocks that are read ahead first: 64 KiB."""

STREAM_SLACK_BLOCKS: Final = 256
"""How far a read of a stream may be from where it should begin: guests have several under way, and hit in between."""

STREAM_TURNS: Final = 64
"""A stream that had none of the volume's last so many reads gets no share of what is read ahead."""

SAMPLED_MAX: Final = 8192
"""Keys that the policy gathers for the analysis between two ticks; more are left out."""

SAMPLE_SEGMENT_KEYS: Final = 8192
SAMPLE_SEGMENTS_MAX: Final = 32
"""The sample of accesses: at most so many segments of so many keys, 2 MiB."""

SAMPLE_SPARE: Final = 4
"""Segments that may come while room is made for them."""

SAMPLE_SIZE_MAX: Final = (SAMPLE_SEGMENTS_MAX + SAMPLE_SPARE + 1) * SAMPLE_SEGMENT_KEYS * 8
"""Bytes of keys that one answer about it holds."""

SAMPLE_STEPS_PER_TICK: Final = 2
"""Segments that one tick looks at while room is made in the sample. Measured 2026-11 on a shared EPYC: 0.03 ms each."""

SAMPLE_BLOCKS_MIN: Final = 8192
"""Different blocks that a sample keeps, about: with fewer the hit ratios that it tells are less exact, so that old
accesses are given up instead."""

RECORDINGS_MAX: Final = 4
RECORDING_ROWS_MAX: Final = 1 << 17
RECORDING_SIZE_MAX: Final = RECORDING_ROWS_MAX * 16
"""Recordings of requests at a time, and rows of each that wait to be taken: 2 MiB, half a second of all that comes."""

WORTHY_SHARE: Final = 0.5
"""Share of all places that the policy finds worth keeping when their zone is reclaimed.

Measured 2026-11, Zipf(0.9) over 10 times the cache: hit ratio and blocks written per access are 0.623 and 0.55 at a
share of 0.3, 0.647 and 0.73 at 0.5, 0.655 and 0.89 at 0.6, 0.662 and 1.19 at 0.7, 0.670 and 4.4 at 0.9.
"""

BATCHES_IN_FLIGHT_MAX: Final = 2
"""Batches given to the device at a time: one being written, one behind it; others gather meanwhile, so they grow."""

BATCH_RECORDS_MAX: Final = 3
"""Records of one batch: 1.5 MiB, so that a write of 1 MiB is one command. A copy to the page cache, 0.25 ms at most."""

RUN_BLOCKS_MIN: Final = 16
"""Blocks of one write from which on it is logged and applied with arrays instead of block by block."""

ZONES_RESERVED: Final = 3
"""Free zones that guests and fills may not take: moves, seals and state records need them."""

ZONES_FOR_MOVES: Final = 2
"""Free zones that state records may not open either: with one of them whole a victim can be moved, as its last blocks
may need the other. Without them nothing would ever free a zone again."""

ZONES_SPARE_MIN: Final = 5
ZONES_SPARE_MAX: Final = 64
ZONES_PER_SPARE: Final = 16
"""Free zones that reclaim keeps ahead of the writers: a 16th of the device within these bounds. A zone is free only
after a sync, and with 20 MiB ahead (1 GiB device, 2026-11) random writers stood still while one was under way."""

RETIRED_ZONES_RATIO: Final = 8
"""At most one zone of so many is left unused because a block of it can't be read."""

VICTIM_CANDIDATES: Final = 8
"""Zones that are looked at for one victim; one look costs about 20 us."""

VICTIM_GAIN_RATIO: Final = 16
"""A victim must free one of so many of its blocks, else reclaim would move full zones for ever while the store is away.
Dirty blocks fill at most nine tenths of the device, so there are better ones."""

MOVE_GAP_MAX: Final = 16
MOVE_SPAN_MAX: Final = 64
"""Blocks that are to be moved and lie no further apart are read together, up to 256 KiB, if they are not in memory: a
read by the ring costs the loop about 10 us, copying a block that nobody wants 0.4 us."""

PART_BLOCKS: Final = 1024
"""Blocks of one part of a cut: 4 MiB of plain data in one message."""

OPEN_CUT_BLOCKS_MAX: Final = PARTS_PER_CUT_MAX * PART_BLOCKS // 2
"""Blocks of one volume that may become dirty while nothing can be sent: they become one cut of limited parts."""

DIRTY_RUN_BLOCKS: Final = 8192
"""Dirty blocks that are sorted together. Measured 2026-11 on a shared EPYC: 0.2 ms."""

MERGED_PER_RUN_MIN: Final = 32
"""Blocks of each such run that one merge looks at: with hundreds of runs half of them can be taken each time."""

SNAPSHOTS_PENDING_MAX: Final = 64
ENDS_PENDING_MAX: Final = 128
"""Snapshots of one volume, and snapshots and resizes of all together, that may wait to be in the store. A restart may
find some more, those that were stored just before."""

RECOUNT_NS: Final = 1_000_000_000
"""How often a buffer that seems full is searched for blocks that were trimmed while they were dirty."""

PARTS_IN_FLIGHT_MAX: Final = 3
"""Parts being built or staged, of all volumes."""

SLICES_IN_FLIGHT_MAX: Final = 16
"""Slices of limited volumes being staged: each at most a MiB, and a 100th of the peak."""

READY_BLOCKS_MAX: Final = 16384
"""Blocks of limited volumes that are being built or wait built: 64 MiB of memory, whatever the number of volumes."""

HOLES_PER_PART: Final = 32768
HOLES_KEPT_MAX: Final = 65536
"""Holes that one volume may know; beyond it trims wait until a cut is acknowledged and clean ones are forgotten."""

HOLES_PER_TICK_MAX: Final = 16384
"""Room in a checkpoint that is kept for holes that come without being let in: those that writes under way cut in two,
and those that fetches bring between two counts, 50 ms apart."""

QUEUED_BLOCKS_FILL_MAX: Final = 4096
"""Blocks waiting in the log beyond which what was fetched is not kept."""

ALLOCATION_BLOCKS_MAX: Final = 16384
"""Blocks that one answer about allocation looks at."""

CHECKPOINT_LOG_BYTES_MAX: Final = 1 << 30
CHECKPOINT_RECORDS_MAX: Final = 32768
"""Log written since a checkpoint that makes the next one due: what a restart has to replay."""

VOLUMES_MAX: Final = 1000
"""Volumes that one device knows, attached or cached; the one that was closed longest ago is forgotten for a new one."""

ORIGINS_LOGGED_MAX: Final = 1024
"""Extents of one answer about a clone's map that are logged at once; longer ones are only in the next checkpoint."""

TEMPORARY_SHARE: Final = 16
"""Attached snapshots that no clone needs keep together at most one block in so many of the cache."""

TEMPORARY_BLOCKS_MIN: Final = 256
"""What they may keep of a small cache."""

assert SAMPLE_SIZE_MAX <= PAYLOAD_SIZE_MAX
assert RECORDING_SIZE_MAX <= PAYLOAD_SIZE_MAX
assert SAMPLED_MAX <= SAMPLE_SEGMENT_KEYS * SAMPLE_SPARE
assert 4 * SAMPLE_BLOCKS_MIN <= SAMPLE_SEGMENTS_MAX * SAMPLE_SEGMENT_KEYS
assert ZONES_FOR_MOVES < ZONES_RESERVED
assert ZONES_RESERVED < ZONES_SPARE_MIN <= ZONES_SPARE_MAX
assert HOLES_PER_PART + PART_BLOCKS <= HOLES_PER_PART_MAX
assert READY_BLOCKS_MAX >= 2 * PART_BLOCKS
assert PARTS_IN_FLIGHT_MAX + SLICES_IN_FLIGHT_MAX < REQUESTS_IN_FLIGHT_MAX
assert VOLUMES_MAX <= VOLUME_COUNT_MAX
assert MOVE_GAP_MAX < MOVE_SPAN_MAX
assert SCALAR_KEYS_MAX < RANGE_LOOKUPS_MAX
assert PLACE_COUNT_MAX == PLACES_MAX < 0xFFFFFFFE
assert HOLES_KEPT_MAX <= HOLES_MIN
assert SNAPSHOTS_PENDING_MAX <= ENDS_PENDING_MAX <= END_COUNT_MAX // 2
