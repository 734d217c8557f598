"""Batches of rows of about the same length, and their padding."""

from __future__ import annotations

import pytest

from parts.batching import batches_by_length, batches_by_start, pad


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [[1, 4, 3, 0, 2]]),
        ({"most_rows": 2}, [[1, 4], [3, 0], [2]]),
        ({"most_tokens": 59}, [[1, 4], [3], [0], [2]]),
        ({"most_tokens": 60}, [[1, 4, 3], [0], [2]]),  # the row of 90 is over the limit by itself
        ({"most_tokens": 60, "cut_at": 12}, [[1, 4, 3, 0, 2]]),
        ({"most_rows": 2, "longest_first": True}, [[2, 0], [3, 1], [4]]),
        ({"most_tokens": 60, "longest_first": True}, [[2], [0, 3], [1, 4]]),
    ],
    ids=str,
)
def test_batches(limits, expected):
    assert batches_by_length([30, 10, 90, 20, 10], **limits) == expected
    assert batches_by_length([], **limits) == []


def test_rows_that_begin_alike_are_together():
    long, other = list(range(100)), list(range(200, 300))
    rows = [[*long, 1], [*other, 1], [*long, 2, 3], [*other, 1], [*long, 4]]
    assert batches_by_start(rows) == [[0, 2, 4], [1, 3]]
    assert batches_by_start(rows, most_rows=2) == [[0], [2, 4], [1, 3]]
    assert batches_by_start(rows, most_tokens=104) == [[0, 2, 4], [1, 3]]
    assert batches_by_start(rows, most_tokens=103) == [[0], [2, 4], [1, 3]]
    assert batches_by_start(rows, most_tokens=50) == [[0], [2], [4], [1], [3]]
    assert batches_by_start([[7, 8], [7, 9], [5, 6]]) == [[2, 0, 1]]  # a pass of its own costs more than 32 tokens
    assert batches_by_start([[7], [7], [7, 8]]) == [[0, 1, 2]]
    assert batches_by_start([]) == []


def test_padding_on_either_side():
    ids, mask = pad([[5], [6, 7, 8], (9, 9)], 1)
    assert ids.tolist() == [[5, 1, 1], [6, 7, 8], [9, 9, 1]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    ids, mask = pad([[5], [6, 7, 8]], 0, "left", "cpu")
    assert (ids.tolist(), mask.tolist()) == ([[0, 0, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]])
