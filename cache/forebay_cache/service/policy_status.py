"""What `forebay status` tells of the policy."""

from forebay_cache.engine.cache import CacheEngine
from forebay_cache.engine.policy_core import PLANS
from forebay_wire.messages import PolicyStatus


def policy_status(engine: CacheEngine) -> PolicyStatus:
    """Return what the policy follows and what it did since the daemon's start."""
    policy = engine.policy
    figures = policy.figures()
    return PolicyStatus(
        worthy_blocks_max=policy.capacity,
        worthy_blocks=figures["count"],
        window_blocks_max=figures["window_max"],
        window_blocks=figures["window_count"],
        margin_from=PLANS[figures["plan"]].margin_from,
        accesses=figures["accesses"],
        fetched_blocks=engine.fetches.fetched_blocks,
        admitted_blocks=policy.admitted_blocks,
        refused_blocks=policy.refused_blocks,
        entered_blocks=figures["writes"],
        moved_blocks=engine.reclaim.moving.moved_blocks,
        memory_bytes=policy.memory_bytes,
    )
