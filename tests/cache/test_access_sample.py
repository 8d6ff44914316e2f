"""The always-on sample: bounded, spatial, true to the order; its file is whole, or it is not used."""

import asyncio
import logging
from pathlib import Path

import numpy as np
import pytest
from engine_rig import Rig

import layout_tables
from forebay_cache.engine.limits import SAMPLE_BLOCKS_MIN, SAMPLE_SIZE_MAX, SAMPLED_MAX
from forebay_cache.engine.policy_lists import sample_hash
from forebay_cache.engine.sample import HASHES, AccessSample
from forebay_cache.format import sample_file
from forebay_cache.format.sample_file import SavedSample, decode_sample, encode_sample
from forebay_cache.service.sample_file import SampleFile
from forebay_core.errors import CorruptionError

VOLUME = 1 << 40


def sampled(keys: np.ndarray, limit: int) -> list[int]:
    return [key for key in keys.tolist() if sample_hash(key) < limit]


class Host:
    """What the daemon does at each tick, with a policy that samples as it should."""

    def __init__(self) -> None:
        self.sample = AccessSample()
        self.used: list[np.ndarray] = []
        self.accesses = 0
        self._limit = 0

    def use(self, keys: np.ndarray) -> None:
        for at in range(0, keys.size, 4096):
            part = keys[at : at + 4096]
            self.used.append(part)
            self.accesses += part.size
            found = np.array(sampled(part, self._limit), np.uint64)[:SAMPLED_MAX]
            self._limit = self.sample.limit
            self.sample.add(found, accesses=self.accesses, span_ns=1000)

    def kept(self) -> list[int]:
        return sampled(np.concatenate(self.sample.parts()), self.sample.limit)

    def expected(self) -> list[int]:
        return sampled(np.concatenate(self.used[1:]), self.sample.limit)


@pytest.fixture
def host() -> Host:
    host = Host()
    host.use(np.zeros(1, np.uint64))  # sets the first limit, as the first tick does
    return host


def test_a_small_host_is_sampled_whole(host: Host) -> None:
    host.use(np.arange(9000, dtype=np.uint64) % np.uint64(3000) + np.uint64(VOLUME))
    assert host.sample.limit == HASHES - 1
    assert host.kept() == host.expected()
    assert host.sample.accesses == host.accesses


def test_with_more_blocks_the_limit_falls_and_the_rest_tells_of_the_whole_time(host: Host) -> None:
    rng = np.random.default_rng(1)
    for _ in range(12):
        host.use(rng.integers(VOLUME, VOLUME + 200_000, 100_000).astype(np.uint64))
        assert sum(part.nbytes for part in host.sample.parts()) <= SAMPLE_SIZE_MAX
    assert host.sample.limit <= HASHES // 8
    assert host.kept() == host.expected()
    assert len(set(host.kept())) >= SAMPLE_BLOCKS_MIN * 0.9
    assert host.sample.accesses == host.accesses
    assert host.sample.span_ns == 1000 * (len(host.used))


def test_with_few_blocks_the_oldest_accesses_go(host: Host) -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        host.use(rng.integers(VOLUME, VOLUME + 5000, 100_000).astype(np.uint64))
    kept, expected = host.kept(), host.expected()
    assert host.sample.limit == HASHES - 1
    assert kept == expected[-len(kept) :] and 200_000 < len(kept) < 320_000
    assert host.sample.accesses == pytest.approx(len(kept), rel=0.05)


def test_one_block_that_fills_every_tick_does_not_make_it_grow(host: Host) -> None:
    host.use(np.arange(200_000, dtype=np.uint64))
    for _ in range(100):
        host.accesses += SAMPLED_MAX
        host.sample.add(np.full(SAMPLED_MAX, VOLUME, np.uint64), accesses=host.accesses, span_ns=1)
        assert sum(part.nbytes for part in host.sample.parts()) <= SAMPLE_SIZE_MAX


def test_what_was_left_out_does_not_count(host: Host) -> None:
    before = host.sample.accesses
    keys = np.arange(SAMPLED_MAX, dtype=np.uint64)
    host.sample.add(keys, accesses=host.accesses + 1_000_000, span_ns=0)
    assert host.sample.accesses - before == SAMPLED_MAX


def test_a_forgotten_volume_leaves_the_sample_and_views_stay_as_they_are(host: Host) -> None:
    keys = np.array([VOLUME, 2 * VOLUME, VOLUME + 1], np.uint64)
    host.use(keys)
    views = host.sample.parts()
    host.sample.forget(1)
    assert np.concatenate(host.sample.parts()).tolist() == [2 * VOLUME]
    assert np.concatenate(views).tolist() == keys.tolist()


# --- the file ---------------------------------------------------------------------------------------------------

SAVED = SavedSample(
    b"D" * 16, 1 << 60, 77, 5, {1: b"a" * 16, 9: b"b" * 16}, [np.array([VOLUME, 9 * VOLUME], np.uint64)]
)


def test_the_tables_are_the_structs() -> None:
    layout_tables.assert_matches(sample_file, "Header", sample_file.HEADER)
    layout_tables.assert_matches(sample_file, "Volume", sample_file.VOLUME)


def test_the_file_is_what_it_always_was() -> None:
    assert b"".join(encode_sample(SAVED)).hex() == (
        "464253414d504c31" + "44" * 16 + "0000000000000010" + "4d00000000000000" + "0500000000000000"
        "0200000000000000" + "0200000000000000" + "d5ec8f7c1ea94668"
        "0100000000000000" + "61" * 16 + "0900000000000000" + "62" * 16 + "0000000000010000" + "0000000000090000"
    )


def test_a_file_gives_back_what_was_put_in_and_any_flipped_bit_is_noticed() -> None:
    content = b"".join(encode_sample(SAVED))
    found = decode_sample(content, place="file")
    assert found._replace(parts=()) == SAVED._replace(parts=())
    assert np.concatenate(found.parts).tolist() == [VOLUME, 9 * VOLUME]
    for bit in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            decode_sample(bytes(flipped), place="file")
    for size in range(len(content)):
        with pytest.raises(CorruptionError):
            decode_sample(content[:size], place="file")


def test_the_sample_outlives_the_daemon(tmp_path: Path) -> None:
    rig = Rig(1)
    volume = rig.volume
    rig.engine.observe(span_ns=2)
    for key in (volume.key << 40 | 7, 99 << 40):
        rig.engine.policy.missed(key, 1)
    rig.engine.observe(span_ns=7)
    file = SampleFile(rig.engine, tmp_path, b"D" * 16)
    asyncio.run(file.close(save=True))
    other = Rig(1)
    assert other.volume.id == volume.id
    SampleFile(other.engine, tmp_path, b"D" * 16).load()
    assert np.concatenate(other.engine.sample.parts()).tolist() == [volume.key << 40 | 7]
    assert (other.engine.sample.accesses, other.engine.sample.span_ns) == (2, rig.engine.sample.span_ns)


@pytest.mark.parametrize(
    ("content", "said"), [(b"FBSAMPL1" + bytes(80), "corrupt"), (b"", "corrupt"), (None, "another")]
)
def test_a_file_that_is_damaged_or_foreign_costs_a_line(
    content: bytes | None, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sample").write_bytes(b"".join(encode_sample(SAVED)) if content is None else content)
    rig = Rig(1)
    with caplog.at_level(logging.WARNING):
        SampleFile(rig.engine, tmp_path, b"E" * 16).load()
    assert len(caplog.records) == 1
    assert said in caplog.text and "begins anew" in caplog.text
    assert not rig.engine.sample.parts()
