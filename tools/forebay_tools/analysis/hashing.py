"""The hash by which blocks are sampled, over arrays of keys; `sample_runs` of the policy is its twin for runs."""

from typing import Final

import numpy as np
import numpy.typing as npt

from forebay_cache.engine.policy_core import MISS_GROUPS
from forebay_cache.engine.policy_lists import SAMPLE_FACTOR, SAMPLE_SEED
from forebay_cache.format.sample_file import PASSES
from forebay_tools.analysis.accesses import U64Array

HASHES: Final = 1 << 64


def sample_hashes(keys: U64Array) -> U64Array:
    """Return what is compared with the limit of a sample, for each key."""
    hashes: U64Array = _mixed(keys) * np.uint64(SAMPLE_FACTOR)
    return hashes


def groups(keys: U64Array) -> npt.NDArray[np.int64]:
    """Return the group in which a replay with the seed of samples counts the misses of each key."""
    return (_mixed(keys) % np.uint64(MISS_GROUPS)).astype(np.int64)


def _mixed(keys: U64Array) -> U64Array:
    mixed = keys & np.uint64(PASSES - 1) ^ np.uint64(SAMPLE_SEED)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ mixed >> np.uint64(33)) * np.uint64(factor)
    return mixed ^ mixed >> np.uint64(33)
