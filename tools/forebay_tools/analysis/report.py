"""The answer about cache sizes, for people and as JSON (`docs/cache-size.md` has its schema)."""

from typing import NamedTuple

from forebay_core.units import BLOCK_SIZE, format_size
from forebay_tools.analysis import advice
from forebay_tools.analysis.curve import Point
from forebay_tools.analysis.evidence import Evidence, Share, Use
from forebay_tools.analysis.text_plot import draw_text
from forebay_tools.printing import Json, note, say, say_table


class Answer(NamedTuple):
    """What was found; `today_blocks` is 0 if it is not known, `vms` how many more volumes are asked about."""

    evidence: Evidence
    points: list[Point]
    best: Point
    today_blocks: int
    vms: int

    def at(self, size_blocks: float) -> Point:
        """Return what the curve says of a size."""
        return advice.interpolate(self.points, size_blocks)

    def marks(self) -> list[tuple[str, int]]:
        """Return the sizes that pictures mark."""
        today = [("today", self.today_blocks)] if self.today_blocks else []
        return [("recommended", self.best.size_blocks), *today]

    def doubts(self) -> list[str]:
        """Return why the evidence is thin, if it is."""
        return advice.doubts(self.evidence.load, self.evidence.sampled_blocks)


def answer_json(answer: Answer) -> dict[str, Json]:
    """Return the document of --json."""
    load, best = answer.evidence.load, answer.best
    shares = answer.evidence.shares(best.size_blocks)
    vms = {"vms": answer.vms, "size_blocks": advice.with_more(best, load, answer.vms)}
    return {
        "accesses": load.accesses,
        "distinct_blocks": load.distinct_blocks,
        "duration_ms": load.duration_ms,
        "sample_rate": answer.evidence.curve.rate,
        "sampled_blocks": answer.evidence.sampled_blocks,
        "curve": [_point_json(point) for point in answer.points],
        "recommended": _point_json(best),
        "half": _point_json(answer.at(best.size_blocks / 2)),
        "double": _point_json(answer.at(best.size_blocks * 2)),
        "today": _point_json(answer.at(answer.today_blocks)) if answer.today_blocks else None,
        "written_bytes_per_day": advice.written_per_day(best, load),
        "more_vms": vms if answer.vms else None,
        "volumes": [_volume_json(use, share) for use, share in zip(answer.evidence.volumes, shares, strict=True)],
        "doubts": answer.doubts(),
    }


def say_answer(answer: Answer) -> None:
    """Print the plot, the sizes and the volumes."""
    load, best = answer.evidence.load, answer.best
    for line in draw_text(answer.points, [(label[0].upper(), size) for label, size in answer.marks()]):
        say(line)
    today = ", T today" if answer.today_blocks else ""
    use = f"{load.accesses} accesses to {format_size(load.distinct_blocks * BLOCK_SIZE)}"
    say(f"{use}; * forebay, . LRU, R recommended{today}\n")
    rows = [("half", best.size_blocks / 2), ("recommended", best.size_blocks), ("double", best.size_blocks * 2)]
    if answer.today_blocks:
        rows.append(("today", answer.today_blocks))
    say_table(
        ("", "SIZE", "HIT RATIO", "LRU", "WRITTEN PER DAY"),
        [_size_cells(label, size, answer.at(size), load) for label, size in rows],
    )
    say("")
    shares = answer.evidence.shares(best.size_blocks)
    say_table(
        ("VOLUME", "WORKING SET", "OF ALL ACCESSES", "HIT RATIO", "OF ALL HITS"),
        [_volume_cells(use, share) for use, share in zip(answer.evidence.volumes, shares, strict=True)],
    )
    if answer.vms:
        size = advice.with_more(best, load, answer.vms) * BLOCK_SIZE
        say(f"\n{answer.vms} more volumes like these: {format_size(size)}")
    for doubt in answer.doubts():
        note(f"thin evidence: {doubt}")


def _point_json(point: Point) -> Json:
    return {**point._asdict(), "size_bytes": point.size_blocks * BLOCK_SIZE}


def _volume_json(use: Use, share: Share) -> Json:
    return {
        "name": use.name,
        "working_set_blocks": use.working_set_blocks,
        "access_share": use.access_share,
        "hit_ratio": share.hit_ratio,
        "hit_share": share.hit_share,
    }


def _size_cells(label: str, size: float, point: Point, load: advice.Load) -> tuple[str, ...]:
    day = advice.written_per_day(point, load)
    return (
        label,
        format_size(round(size) * BLOCK_SIZE),
        f"{point.hit_ratio:.3f} +- {point.band:.3f}",
        f"{point.lru_hit_ratio:.3f}",
        "-" if day is None else f"{format_size(int(day))}, {day / max(1, size * BLOCK_SIZE):.2f} fills",
    )


def _volume_cells(use: Use, share: Share) -> tuple[str, ...]:
    return (
        use.name,
        format_size(use.working_set_blocks * BLOCK_SIZE),
        f"{use.access_share:.1%}",
        f"{share.hit_ratio:.3f}",
        f"{share.hit_share:.1%}",
    )
