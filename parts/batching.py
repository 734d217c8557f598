"""Rows of unequal length in batches: which rows go together, and their padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def pad(
    rows: Sequence[Sequence[int]], padding: int, side: Literal["left", "right"] = "right", device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of rows, [rows, longest row] each; the mask is 1 where there is a token, 0 where there is `padding`."""
    tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tokens, batch_first=True, padding_value=padding, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)
