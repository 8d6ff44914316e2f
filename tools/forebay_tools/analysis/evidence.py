"""What an answer about cache sizes rests on: traces, or the sample of a running cache daemon."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from forebay_cache.engine.policy import PolicySettings
from forebay_cache.engine.policy_core import MarkerFast
from forebay_cache.engine.streams import BYPASS_BLOCKS, READ_AHEAD_BLOCKS
from forebay_cache.format.sample_file import PASSES
from forebay_core.errors import ForebayError
from forebay_core.units import BLOCK_SIZE, LBA_BITS
from forebay_tools.analysis.accesses import Batch
from forebay_tools.analysis.advice import Load
from forebay_tools.analysis.curve import Curve, volume_slot
from forebay_tools.analysis.hashing import HASHES, sample_hashes
from forebay_tools.analysis.survey import Sampler, Survey
from forebay_tools.analysis.traces import read_trace
from forebay_tools.progress import Progress
from forebay_wire.messages import Sample

_BATCH_KEYS = 8192


class Use(NamedTuple):
    """What one volume uses. `key` is that of its blocks."""

    key: int
    name: str
    working_set_blocks: int
    access_share: float


class Share(NamedTuple):
    """What a cache of some size gives to one volume: hits per access of it, and its share of all hits."""

    hit_ratio: float
    hit_share: float


class Evidence(NamedTuple):
    """A curve and what it was made of; `today_blocks` is the size of the cache that was asked, None for traces."""

    curve: Curve
    load: Load
    sampled_blocks: int
    volumes: list[Use]
    today_blocks: int | None = None

    def shares(self, size_blocks: int) -> list[Share]:
        """Return the shares of the volumes, in their order."""
        misses = self.curve.volume_misses(size_blocks)
        expected = self.load.accesses * self.curve.rate
        ratios = [
            max(0.0, 1 - misses[volume_slot(use.key)] / max(1.0, use.access_share * expected)) for use in self.volumes
        ]
        total = sum(use.access_share * ratio for use, ratio in zip(self.volumes, ratios, strict=True)) or 1.0
        return [Share(ratio, use.access_share * ratio / total) for use, ratio in zip(self.volumes, ratios, strict=True)]


class Looks(Protocol):
    """Whatever a trace is shown to."""

    def add(self, batch: Batch) -> None:
        """Look at a batch."""


class _Feeding:
    """Shows the sampled blocks of batches to a curve, and which of them pass by in a long stream."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve
        self._marker = MarkerFast(BYPASS_BLOCKS, READ_AHEAD_BLOCKS)
        self._sampler = Sampler()
        self._limit = int(curve.rate * HASHES)

    def add(self, batch: Batch) -> None:
        """Look at a batch."""
        if self._curve.rate == 1.0:
            self._curve.show_requests(batch)
            return
        marked = np.frombuffer(self._marker.mark(batch.keys, batch.counts, batch.writes), np.uint64)
        parts, blocks = self._sampler.take(batch._replace(keys=marked), self._limit)
        for keys in parts:
            self._curve.show(keys, accesses=blocks)
            blocks = 0


def of_traces(traces: Sequence[Path], samples: int) -> Evidence:
    """Read traces, twice; so many blocks are sampled.

    Raises:
        ForebayError: one of them can't be read, or is none.
    """
    survey = Survey()
    names = show_traces(traces, survey, "looking")
    load, curve, volumes = _surveyed(survey, names, samples)
    del survey  # its memory is the replay's
    show_traces(traces, _Feeding(curve), "analyzing")
    return Evidence(curve, load, round(load.distinct_blocks * curve.rate), volumes)


def _surveyed(survey: Survey, names: dict[int, str], samples: int) -> tuple[Load, Curve, list[Use]]:
    """Return what a survey tells, and the curve to feed."""
    uses, sets = survey.uses(), survey.working_sets()
    volumes = [
        Use(key, names.get(key, f"volume {key}"), sets.get(key, 0), accesses / max(1, survey.accesses))
        for key, accesses in sorted(survey.volume_accesses.items())
    ]
    load = Load(survey.accesses, survey.distinct_blocks, survey.last_ms, len(volumes))
    rate = min(uses.rate, samples / load.distinct_blocks)
    return load, Curve(load.distinct_blocks, rate, PolicySettings(), uses), volumes


def of_sample(sample: Sample, payload: memoryview) -> Evidence:
    """Replay what a cache daemon sampled.

    Raises:
        ForebayError: it has seen no access yet.
    """
    keys = np.frombuffer(payload, "<u8").astype(np.uint64)
    keys = keys[sample_hashes(keys) < np.uint64(sample.limit)]
    if not keys.size:
        raise ForebayError("the cache daemon has seen no access yet; ask again when its volumes were used for a while")
    rate = min(1.0, sample.limit / HASHES)
    blocks, counts = np.unique(keys & np.uint64(PASSES - 1), return_counts=True)
    settings = PolicySettings(sample.write_price_ppm / 1e6, sample.window_max_ppm / 1e6)
    curve = Curve(max(1, round(blocks.size / rate)), rate, settings)
    progress = Progress("analyzing", keys.nbytes, sys.stderr, lines=False)
    try:
        for at in range(0, keys.size, _BATCH_KEYS):
            curve.show(keys[at : at + _BATCH_KEYS], accesses=0)
            progress.reach(8 * at)
    finally:
        progress.close()
    accesses = max(sample.accesses, round(keys.size / rate) if rate == 1 else 1)
    curve.show(keys[:0], accesses=accesses)
    names = {volume.key: volume.name if volume.attached else f"{volume.name} (detached)" for volume in sample.volumes}
    owners = blocks >> np.uint64(LBA_BITS)
    volumes = []
    for key in np.unique(owners).tolist():
        own = counts[owners == key]
        share = float(own.sum()) / keys.size
        volumes.append(Use(key, names.get(key, f"volume {key}"), round(own.size / rate), share))
    load = Load(accesses, max(1, round(blocks.size / rate)), sample.span_ns // 1_000_000, len(volumes))
    return Evidence(curve, load, int(blocks.size), volumes, sample.capacity_bytes // BLOCK_SIZE)


def show_traces(traces: Sequence[Path], looks: Looks, label: str) -> dict[int, str]:
    """Show all traces, one after the other; return the names of the volumes by key."""
    names: dict[int, str] = {}
    total = sum(path.stat().st_size for path in traces)
    progress = Progress(label, total, sys.stderr, lines=False)
    before = 0
    try:
        for path in traces:
            for part in read_trace(path):
                looks.add(part.batch)
                names.update(part.volumes)
                progress.reach(min(total, before + part.done))
            before += path.stat().st_size
    finally:
        progress.close()
    return names
