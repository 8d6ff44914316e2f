"""What of a head is hidden: rows of changes that are too large for one transaction, and what shows in their place.

A trim or a rollback shows at once, whatever lies below it. What it hides leaves the head in steps
(`forebay_store.engine.sweeping`), and until then who looks at the head looks through here.

Invariants:
    a volume has rows exactly if it is `sweeping`; all are of its newest change of the head, and never overlap.
    what shows is the same before, between and after the steps.
"""

from collections.abc import Iterator

from forebay_store.engine.ports import IndexReader, IndexWriter
from forebay_store.format.rows import Table
from forebay_store.format.sweep_rows import SWEEP_PREFIX, Sweep, decode_sweep, encode_sweep, sweep_key


def first_sweep(reader: IndexReader, volume: bytes = b"") -> Sweep | None:
    """Return the first sweep of a volume, or of any; None if there is none."""
    row = next(iter(reader.scan(Table.META, SWEEP_PREFIX + volume)), None)
    return decode_sweep(*row) if row is not None and row[0].startswith(SWEEP_PREFIX + volume) else None


def sweeps_in(reader: IndexReader, volume: bytes, start: int, end: int) -> Iterator[Sweep]:
    """Yield the sweeps of a volume that share a block with [start, end), in their order."""
    before = reader.before(Table.META, sweep_key(volume, start))
    if before is not None and before[0].startswith(SWEEP_PREFIX):
        reaching = decode_sweep(*before)
        if reaching.volume == volume and reaching.end > start:
            yield reaching
    for key, value in reader.scan(Table.META, sweep_key(volume, start)):
        if not key.startswith(SWEEP_PREFIX):
            return
        found = decode_sweep(key, value)
        if found.volume != volume or found.start >= end:
            return
        yield found


def put_sweep(writer: IndexWriter, sweep: Sweep) -> None:
    """Hide blocks, joined with what the same change hides around them; what hides more counts where they meet."""
    for other in list(sweeps_in(writer, sweep.volume, sweep.start, sweep.end)):
        writer.delete(Table.META, sweep_key(other.volume, other.start))
        if other.hides_own == sweep.hides_own:
            sweep = sweep._replace(start=min(sweep.start, other.start), end=max(sweep.end, other.end))
            continue
        assert sweep.hides_own  # An end is cut off last.
        for start, end in ((other.start, sweep.start), (sweep.end, other.end)):
            if start < end:
                writer.put(Table.META, *encode_sweep(other._replace(start=start, end=end)))
    writer.put(Table.META, *encode_sweep(sweep))


def shorten(writer: IndexWriter, sweep: Sweep, start: int) -> None:
    """The blocks before `start` are swept."""
    writer.delete(Table.META, sweep_key(sweep.volume, sweep.start))
    if start < sweep.end:
        writer.put(Table.META, *encode_sweep(sweep._replace(start=start)))


def forget_sweeps(writer: IndexWriter, volume: bytes) -> None:
    """The volume is gone."""
    while (sweep := first_sweep(writer, volume)) is not None:
        shorten(writer, sweep, sweep.end)
