"""Batches of rows of about the same length, and their padding."""

from __future__ import annotations

import pytest

from parts.batching import batches_by_length, pad


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


def test_padding_on_either_side():
    ids, mask = pad([[5], [6, 7, 8], (9, 9)], 1)
    assert ids.tolist() == [[5, 1, 1], [6, 7, 8], [9, 9, 1]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    ids, mask = pad([[5], [6, 7, 8]], 0, "left", "cpu")
    assert (ids.tolist(), mask.tolist()) == ([[0, 0, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]])
