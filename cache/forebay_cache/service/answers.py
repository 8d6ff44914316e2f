"""Answers to commands that only look."""

from collections.abc import Sequence

from forebay_cache.engine.cache import CacheEngine
from forebay_core.units import BLOCK_SIZE, Buffer
from forebay_wire.messages import Sample, SampledVolume


def answer_sample(engine: CacheEngine) -> tuple[Sample, Sequence[Buffer]]:
    """Tell which blocks were used lately, of those that are sampled, and how large the cache is."""
    engine.observe()
    sample, policy = engine.sample, engine.settings.policy
    volumes = sorted(engine.volumes.values(), key=lambda volume: volume.key)
    answer = Sample(
        limit=sample.limit,
        accesses=sample.accesses,
        span_ns=sample.span_ns,
        capacity_bytes=engine.map.place_count * BLOCK_SIZE,
        write_price_ppm=round(policy.write_price * 1e6),
        window_max_ppm=round(policy.window_max * 1e6),
        volumes=tuple(SampledVolume(volume.key, volume.name, volume.attached) for volume in volumes),
    )
    return answer, [part.astype("<u8", copy=False).data.cast("B") for part in sample.parts()]
