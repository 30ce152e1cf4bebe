"""Budgets, byte counts and chunks."""

import pytest

from tangents._core import memory


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2**31), ("500 MB", 500_000_000), ("1.5k", 1536), (7, 7), ("1e3", 1000), ("12b", 12)],
)
def test_parse(text, count):
    assert memory.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "2 parsecs", 0, -1, float("inf"), "-3MB"])
def test_refuses(text):
    with pytest.raises(ValueError, match="memory="):
        memory.parse_bytes(text)
    with pytest.raises(TypeError, match="pass bytes or text"):
        memory.parse_bytes([1])


def test_chunks_cover_everything_once():
    for total in range(7):
        for size in range(1, 8):
            parts = list(memory.chunks(total, size))
            assert [i for part in parts for i in range(total)[part]] == list(range(total))
            assert all(part.stop - part.start <= size for part in parts)


def test_chunk_size_stays_within_budget():
    assert memory.chunk_size(100, 10, 55) == 5
    assert memory.chunk_size(3, 10, 1000) == 3
    assert memory.chunk_size(3, 10, 1) == 1  # the smallest chunk there is
    assert memory.chunk_size(0, 10, 100) == 0


def test_default_budget_is_a_share_of_what_is_free():
    assert 2**24 < memory.resolve_budget(None) <= memory.free_bytes()
    assert memory.resolve_budget("1MiB") == 2**20
