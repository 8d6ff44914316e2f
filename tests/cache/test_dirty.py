"""Dirty blocks are listed in runs, and come out sorted, each once, however many runs there are."""

import numpy as np
import pytest

from forebay_cache.engine import dirty
from forebay_cache.engine.dirty import DirtyBlocks, MergedRuns


@pytest.mark.parametrize("count", [1, 7, 64, 5000])
def test_merging_gives_each_block_once_in_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty, "DIRTY_RUN_BLOCKS", 50)
    rng = np.random.default_rng(count)
    blocks = DirtyBlocks()
    listed: list[int] = []
    for _ in range(300):
        lbas = rng.integers(0, 4000, rng.integers(0, 30)).astype(np.uint64)
        blocks.add(lbas)
        listed += lbas.tolist()
    assert set(blocks) == set(listed)
    assert blocks.all().tolist() == sorted(set(listed))
    runs = blocks.take()
    assert not len(blocks) and len(runs) > 20
    merged, found = MergedRuns(runs), []
    while merged.left:
        some = merged.take(count).tolist()
        assert len(some) == count or not merged.left
        found += some
    assert found == sorted(set(listed))


def test_what_is_listed_can_be_replaced() -> None:
    blocks = DirtyBlocks()
    blocks.add(np.arange(5, dtype=np.uint64))
    blocks.replace(np.array([2, 9], np.uint64))
    assert list(blocks) == [2, 9]
    blocks.replace(np.array([], np.uint64))
    assert not len(blocks) and not blocks.take()
    assert not MergedRuns([]).left
