"""`forebay status`: how the cache daemon and the store are."""

import argparse
import asyncio
import os
from collections.abc import Coroutine
from typing import TypeVar

from forebay_core.errors import ForebayError, WrongUsageError
from forebay_core.units import BLOCK_SIZE, format_rate, format_size
from forebay_tools.arguments import (
    RUN_DIR_VARIABLE,
    STORE_VARIABLE,
    Commands,
    add_command,
    add_json,
    add_run_dir,
    add_store,
)
from forebay_tools.commands.limit import limit_json
from forebay_tools.connect import cache_client, store_client
from forebay_tools.printing import Json, say, say_fields, say_json, say_table
from forebay_tools.rows import clean_json, scrub_json, show_time
from forebay_wire.messages import (
    CacheStatus,
    CleanStatus,
    GetCacheStatus,
    GetStoreStatus,
    LimitStatus,
    PolicyStatus,
    ScrubStatus,
    StoreStatus,
    VolumeStatus,
)

HEAD = ("ATTACHED", "SIZE", "CACHED", "DIRTY", "HITS", "OF ALL HITS", "CLIENTS", "WHERE")

Status = TypeVar("Status", CacheStatus, StoreStatus)


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "status", run, "tell how the cache daemon, its volumes and the store are")
    add_json(parser)
    add_run_dir(parser)
    add_store(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask whom the flags or the environment name, and print what they say; fail if one of them is away."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    ask_cache = arguments.run_dir is not None or RUN_DIR_VARIABLE in os.environ
    ask_store = arguments.store is not None or STORE_VARIABLE in os.environ
    if not ask_cache and not ask_store:
        raise WrongUsageError(
            f"whose status? use --run-dir DIR or --store HOST:PORT, or set {RUN_DIR_VARIABLE} or {STORE_VARIABLE}"
        )
    away: list[ForebayError] = []
    cache = await _unless_away(_cache_status(arguments), away) if ask_cache else None
    store = await _unless_away(_store_status(arguments), away) if ask_store else None
    if cache is not None or store is not None:
        _say(cache, store, as_json=arguments.json)
    if away:
        raise ForebayError("; ".join(map(str, away)))
    return 0


async def _unless_away(asking: Coroutine[None, None, Status], away: list[ForebayError]) -> Status | None:
    """Return the answer, or None and note why there is none."""
    try:
        return await asking
    except WrongUsageError:
        raise
    except ForebayError as error:
        away.append(error)
        return None


def _say(cache: CacheStatus | None, store: StoreStatus | None, *, as_json: bool) -> None:
    if as_json:
        say_json(
            {
                "cache": cache_json(cache) if cache is not None else None,
                "store": store_json(store) if store is not None else None,
            }
        )
        return
    if cache is not None:
        _say_cache(cache)
    if cache is not None and store is not None:
        say("")
    if store is not None:
        say_fields(_store_fields(store))


async def _cache_status(arguments: argparse.Namespace) -> CacheStatus:
    async with cache_client(arguments) as client:
        answer, _ = await client.ask(GetCacheStatus(), CacheStatus)
    return answer


async def _store_status(arguments: argparse.Namespace) -> StoreStatus:
    async with store_client(arguments) as client:
        answer, _ = await client.ask(GetStoreStatus(), StoreStatus)
    return answer


def cache_json(status: CacheStatus) -> dict[str, Json]:
    """Return what --json prints of a cache daemon: sizes in bytes, counters since its start."""
    return {
        "device": status.device,
        "device_size": status.device_size,
        "capacity_bytes": status.capacity_bytes,
        "cached_bytes": status.cached_bytes,
        "dirty_bytes": status.dirty_bytes,
        "free_zones": status.free_zones,
        "hit_blocks": status.hit_blocks,
        "miss_blocks": status.miss_blocks,
        "hit_ratio": _ratio(status.hit_blocks, status.hit_blocks + status.miss_blocks),
        "written_blocks": status.written_blocks,
        "destaged_plain_bytes": status.destaged_plain_bytes,
        "destaged_stored_bytes": status.destaged_stored_bytes,
        "compression_ratio": _ratio(status.destaged_plain_bytes, status.destaged_stored_bytes),
        "log_bytes": status.log_bytes,
        "store": status.store,
        "store_connected": status.store_connected,
        "limit": limit_json(status.limit),
        "policy": _policy_json(status.policy, status.capacity_bytes),
        "error": status.error or None,
        "volumes": [_volume_json(volume, status.hit_blocks) for volume in status.volumes],
    }


def _policy_json(policy: PolicyStatus, capacity_bytes: int) -> dict[str, Json]:
    return {
        "worthy_blocks_max": policy.worthy_blocks_max,
        "worthy_blocks": policy.worthy_blocks,
        "window_blocks_max": policy.window_blocks_max,
        "window_blocks": policy.window_blocks,
        "window_share": _ratio(policy.window_blocks_max, policy.worthy_blocks_max),
        "margin_from": policy.margin_from,
        "accesses": policy.accesses,
        "fetched_blocks": policy.fetched_blocks,
        "admitted_blocks": policy.admitted_blocks,
        "refused_blocks": policy.refused_blocks,
        "entered_blocks": policy.entered_blocks,
        "ssd_writes_per_access": _ratio(policy.entered_blocks, policy.accesses),
        "moved_blocks": policy.moved_blocks,
        "memory_bytes": policy.memory_bytes,
        "memory_bytes_per_block": _ratio(policy.memory_bytes, capacity_bytes // BLOCK_SIZE),
    }


def store_json(status: StoreStatus) -> dict[str, Json]:
    """Return what --json prints of a store."""
    return {
        "volumes": status.volumes,
        "segments": status.segments,
        "segment_bytes": status.segment_bytes,
        "free_bytes": status.free_bytes,
        "incarnation": status.incarnation,
        "reads": status.reads,
        "cuts": status.cuts,
        "live_bytes": status.live_bytes,
        "clean": clean_json(status.clean),
        "scrub": scrub_json(status.scrub),
        "error": status.error or None,
    }


def _volume_json(volume: VolumeStatus, hits_of_all: int) -> dict[str, Json]:
    return {
        "name": volume.name,
        "size": volume.size,
        "uri": volume.uri,
        "front": volume.front,
        "path": volume.path or None,
        "link": volume.link or None,
        "read_only": volume.read_only,
        "epoch": volume.epoch,
        "sequence": volume.sequence,
        "acknowledged_version": volume.acknowledged_version,
        "dirty_bytes": volume.dirty_bytes,
        "cached_bytes": volume.cached_bytes,
        "hit_blocks": volume.hit_blocks,
        "miss_blocks": volume.miss_blocks,
        "hit_ratio": _ratio(volume.hit_blocks, volume.hit_blocks + volume.miss_blocks),
        "hit_share": _ratio(volume.hit_blocks, hits_of_all),
        "connections": volume.connections,
        "pending_snapshots": list(volume.pending_snapshots),
        "origin": volume.origin or None,
        "limit": limit_json(volume.limit),
        "write_delay_us": volume.write_delay_us,
        "error": volume.error or None,
    }


def _say_cache(status: CacheStatus) -> None:
    fields = {
        "device": f"{status.device}, {format_size(status.device_size)}",
        "cached": f"{format_size(status.cached_bytes)} of {format_size(status.capacity_bytes)}, "
        f"{format_size(status.dirty_bytes)} of it dirty, {status.free_zones} zones free",
        "hits": _hits(status.hit_blocks, status.miss_blocks),
        "policy": _policy(status.policy, status.capacity_bytes),
        "admission": _admission(status.policy),
        "destaged": f"{format_size(status.destaged_plain_bytes)} as {format_size(status.destaged_stored_bytes)}",
        "store": f"{status.store}, {'connected' if status.store_connected else 'out of reach'}",
    }
    if status.limit.average:
        fields["limit"] = _limit(status.limit)
    if status.error:
        fields["error"] = status.error
    say_fields(fields)
    if status.volumes:
        say("")
        say_table(HEAD, [_volume_cells(volume, status.hit_blocks) for volume in status.volumes])
    for volume in status.volumes:
        if volume.limit.average:
            say(f"{volume.name}: destaged with {_limit(volume.limit)}")
        if volume.write_delay_us:
            say(f"{volume.name}: the buffer is nearly full; each written block waits {volume.write_delay_us} us")
        if volume.pending_snapshots:
            say(f"{volume.name}: snapshots on their way to the store: {', '.join(volume.pending_snapshots)}")
        if volume.error:
            say(f"{volume.name}: {volume.error}")


def _store_fields(status: StoreStatus) -> dict[str, str]:
    fields = {
        "volumes": str(status.volumes),
        "segments": f"{status.segments}, {format_size(status.segment_bytes)}, "
        f"{format_size(status.live_bytes)} of it live",
        "disk free": format_size(status.free_bytes),
        "incarnation": str(status.incarnation),
        "reads": str(status.reads),
        "cuts": str(status.cuts),
        "cleaning": _cleaning(status.clean),
        "scrub": _scrub(status.scrub),
    }
    if status.error:
        fields["error"] = status.error
    return fields


def _cleaning(status: CleanStatus) -> str:
    now = "under way" if status.running else "at rest"
    error = f"; the last pass ended early: {status.error}" if status.error else ""
    return f"{now}, {format_size(status.bytes_freed)} freed, {format_size(status.bytes_copied)} copied{error}"


def _scrub(status: ScrubStatus) -> str:
    damaged = f"; {status.damaged} damaged extents: forebay store scrub lists them" if status.damaged else ""
    if status.running:
        return f"{format_size(status.checked_size)} of {format_size(status.total_size)} verified{damaged}"
    return f"last finished {show_time(status.finished_ns)}{damaged}" if status.finished_ns else f"never{damaged}"


def _volume_cells(volume: VolumeStatus, hits_of_all: int) -> tuple[str, ...]:
    return (
        volume.name + (" (read-only)" if volume.read_only else ""),
        format_size(volume.size),
        format_size(volume.cached_bytes),
        format_size(volume.dirty_bytes),
        _hits(volume.hit_blocks, volume.miss_blocks),
        _hits(volume.hit_blocks, hits_of_all - volume.hit_blocks),
        str(volume.connections),
        volume.link or volume.path or volume.uri,
    )


def _hits(hit_blocks: int, miss_blocks: int) -> str:
    ratio = _ratio(hit_blocks, hit_blocks + miss_blocks)
    return f"{ratio:.1%}" if ratio is not None else "-"


def _policy(policy: PolicyStatus, capacity_bytes: int) -> str:
    share = _ratio(policy.window_blocks_max, policy.worthy_blocks_max) or 0
    bytes_per_block = policy.memory_bytes / max(1, capacity_bytes // BLOCK_SIZE)
    return (
        f"{policy.worthy_blocks} of {policy.worthy_blocks_max} blocks worth keeping; window {share:.0%}, "
        f"{policy.window_blocks} of {policy.window_blocks_max} blocks; margin from {policy.margin_from} uses on; "
        f"{bytes_per_block:.1f} bytes of memory per block"
    )


def _admission(policy: PolicyStatus) -> str:
    written = _ratio(policy.entered_blocks, policy.accesses)
    return (
        f"{policy.fetched_blocks} blocks fetched, {policy.admitted_blocks} of them kept, {policy.refused_blocks} not; "
        f"{'-' if written is None else f'{written:.3f}'} blocks written to the SSD per access, "
        f"{policy.moved_blocks} moved"
    )


def _limit(limit: LimitStatus) -> str:
    rates = format_rate(limit.allowed), format_rate(limit.average), format_rate(limit.peak)
    return "up to {} just now, {} on average, {} at most".format(*rates)


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
