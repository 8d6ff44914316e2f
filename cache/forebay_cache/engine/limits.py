"""Every bound of the cache engine, and how the bounds relate."""

from typing import Final

from forebay_core.units import LBA_BITS

VOLUME_KEY_BITS: Final = 64 - LBA_BITS
VOLUME_KEY_MAX: Final = (1 << VOLUME_KEY_BITS) - 1
"""Volumes are numbered per device from 1; a key of the map is `volume_key << 40 | lba`, and 0 is no key."""

PLACES_MAX: Final = (1 << 32) - 3
"""Places of one device: their numbers fit u32 beside two sentinels, which is 16 TiB of cache."""

SCALAR_KEYS_MAX: Final = 48
"""Up to this many keys the map goes one by one: an array operation costs a microsecond before its first element."""

LINK_ROUNDS_MAX: Final = 64
"""Rounds in which a bulk load links its places; a chain that is longer than that is finished one by one."""

LOAD_SLICE_PLACES: Final = 32768
"""Places that one step of a whole load links."""

RANGE_LOOKUPS_MAX: Final = 1024
"""Blocks of a trimmed extent that one step looks up. Measured 2026-11 on a shared EPYC: under 0.3 ms."""

RANGE_SCAN_PLACES_MAX: Final = 32768
"""Places that one step of a long trim compares instead. Measured likewise: 0.05 ms."""

RANGE_SCAN_RATIO: Final = 32
"""One lookup costs about as much as comparing this many places, so a longer extent is found by a scan."""

AGEING_SLICE_PLACES: Final = 65536
"""Counts that one call of the policy halves."""

AGEING_HITS_PER_PLACE: Final = 20
"""All counts are halved after this many hits per place of the device."""

COUNT_MAX: Final = 255
"""Largest use count of a place."""

WORTHY_SHARE: Final = 0.5
"""Share of all places that the policy finds worth keeping when their zone is reclaimed.

Measured 2026-11, Zipf(0.9) over 10 times the cache: hit ratio and blocks written per access are 0.623 and 0.55 at a
share of 0.3, 0.647 and 0.73 at 0.5, 0.655 and 0.89 at 0.6, 0.662 and 1.19 at 0.7, 0.670 and 4.4 at 0.9.
"""

assert SCALAR_KEYS_MAX < RANGE_LOOKUPS_MAX
assert PLACES_MAX < 0xFFFFFFFE
