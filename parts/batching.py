"""Rows of unequal length in batches: which rows go together, and their padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence


def batches_by_length(
    lengths: Sequence[float],
    most_rows: float = math.inf,
    most_tokens: float = math.inf,
    cut_at: float = math.inf,
    longest_first: bool = False,
) -> list[list[int]]:
    """Places of `lengths` in batches of rows of about the same length, so that a batch holds little padding.

    Args:
        lengths: of the rows, in tokens.
        most_rows: in a batch.
        most_tokens: in a batch, padding included; a longer row is a batch of its own.
        cut_at: rows longer than this are cut to it before they are padded.
        longest_first: the longest rows come first, in place of the shortest.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place], reverse=longest_first):
        if batches and len(batches[-1]) < most_rows:
            longest = max(lengths[batches[-1][0]], lengths[place])
            if (len(batches[-1]) + 1) * min(longest, cut_at) <= most_tokens:
                batches[-1].append(place)
                continue
        batches.append([place])
    return batches


PASS = 32  # what a pass costs beyond its tokens, in tokens


def batches_by_start(rows: Sequence[Sequence[int]], most_rows: float = math.inf, most_tokens: float = math.inf) -> list[list[int]]:
    """Places of token ids in batches of the fewest tokens in all, where what all of a batch's rows begin with counts once.

    Rows in the order of their ids have the longest starts in common with their neighbours; where to cut this order is found by dynamic
    programming over its ends. A row's last token is never shared.

    Args:
        rows: token ids.
        most_rows, most_tokens: in a batch; a longer row is a batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda place: rows[place])
    common = [0, *(_common(rows[first], rows[second]) for first, second in pairwise(order))]
    least, begins = [0], []  # of the first 0, 1, ... rows: the fewest tokens, and where their last batch begins
    for end, place in enumerate(order, start=1):
        whole, shared, options = 0, len(rows[place]) - 1, []
        for begin in range(end - 1, -1, -1):
            own = rows[order[begin]]
            whole, shared = whole + len(own), min(shared, len(own) - 1, common[begin + 1] if begin + 1 < end else shared)
            tokens = whole - shared * (end - begin - 1)
            if begin < end - 1 and (end - begin > most_rows or tokens > most_tokens):
                break
            options.append((least[begin] + tokens + PASS, begin))
        best, begin = min(options)
        least.append(best)
        begins.append(begin)
    batches, end = [], len(rows)
    while end:
        batches.append(order[begins[end - 1] : end])
        end = begins[end - 1]
    return batches[::-1]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with."""
    return next((place for place, (one, two) in enumerate(zip(first, second)) if one != two), min(len(first), len(second)))


def shared_start(rows: Sequence[torch.Tensor], most: int) -> int:
    """How many tokens all rows begin with, at most `most`; none for a single row."""
    if len(rows) < 2:
        return 0
    most = min(most, *map(len, rows))
    same = (torch.stack([row[:most] for row in rows]) == rows[0][:most]).all(dim=0)
    return int(same.cumprod(dim=0).sum())


def pad(
    rows: Sequence[Sequence[int]], padding: int, side: Literal["left", "right"] = "right", device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of rows, [rows, longest row] each; the mask is 1 where there is a token, 0 where there is `padding`."""
    tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tokens, batch_first=True, padding_value=padding, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def unused_id(rows: Sequence[Sequence[int]], vocabulary: int) -> int:
    """The first id that no row holds, to pad them with where a model has no padding of its own."""
    used = set().union(*rows)
    return next(token for token in range(vocabulary) if token not in used)
