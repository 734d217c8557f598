"""Rows of unequal length as one sequence: no padding, and what all of them begin with only once. For a CPU.

    packed = pack(rows, shared_start(rows, most=29))
    with attention_within(model, packed): model(input_ids=packed.input_ids, position_ids=packed.position_ids)

A token sees the tokens of its own row alone, at the positions that they have there, so every row's numbers are those it has by itself.
Whether that holds for a model is tried on it (`can_pack`): it must take its positions from outside and its attention through
transformers' interface, and nothing else may look at other tokens.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from parts import cpu_speed
from parts.batching import shared_start

ATTENTION = "within_rows"  # the name of `_attention` among transformers' kinds of attention
MOST_TOKENS = 512  # in a row: attention keeps a table of [heads, own tokens, tokens] for the backward pass
# What configurations call the most tokens that a token sees.
_LIMITS = ("sliding_window", "attention_window_size", "window_size", "attention_chunk_size")


@dataclass(frozen=True)
class Packed:
    """Rows in one sequence: first the tokens that they share, then what is each row's own.

    Args:
        input_ids, position_ids: [1, tokens].
        shared: how many tokens come first.
        ends: [rows] where each row's own tokens end.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    shared: int
    ends: tuple[int, ...]

    @functools.cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Begin and end of each stretch of tokens, and how many shared ones its tokens see before it."""
        starts = (self.shared, *self.ends[:-1])
        rows = [(start, end, self.shared) for start, end in zip(starts, self.ends)]
        return [(0, self.shared, 0), *rows] if self.shared else rows


def pack(rows: Sequence[torch.Tensor], shared: int) -> Packed:
    """Rows [time] that share their first `shared` tokens, all of them longer than that."""
    own = [row[shared:] for row in rows]
    positions = [torch.arange(shared, len(row)) for row in rows]
    ids = torch.cat([rows[0][:shared], *own])[None]
    ends = torch.tensor([shared, *map(len, own)]).cumsum(dim=0)[1:].tolist()
    return Packed(ids, torch.cat([torch.arange(shared), *positions])[None].to(ids.device), shared, tuple(ends))


@dataclass(frozen=True)
class Rollouts:
    """Queries with their responses, as passes over some of the rows want them."""

    tokens: list[torch.Tensor]
    query_lengths: list[int]
    response_lengths: list[int]

    def inputs(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """What `predict_or_forward` takes for these rows."""
        device = self.tokens[0].device
        starts = [self.query_lengths[row] - 1 for row in rows]
        lengths = [self.response_lengths[row] for row in rows]
        return {
            "input_ids": pad_sequence([self.tokens[row] for row in rows], batch_first=True),
            "rows": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device),
            "columns": torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths)]).to(device),
        }

    def packed(self, rows: Sequence[int]) -> tuple[Packed, dict[str, torch.Tensor]]:
        """The rows as one sequence, and `inputs` in it. What they share ends before any row's first response token is predicted."""
        tokens = [self.tokens[row] for row in rows]
        packed = pack(tokens, shared_start(tokens, min(self.query_lengths[row] for row in rows) - 1))
        ends = [(end - 1, self.response_lengths[row]) for row, end in zip(rows, packed.ends)]
        columns = torch.cat([torch.arange(end - length, end) for end, length in ends]).to(packed.input_ids.device)
        return packed, {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids,
            "rows": torch.zeros_like(columns),
            "columns": columns,
        }

    def padded(self, rows: Sequence[int], values: torch.Tensor) -> torch.Tensor:
        """[tokens] values of the response tokens of these rows as [rows, longest response of the batch], 0 before each response.

        Responses end together, so that nothing follows one: advantages are summed from the end, and TRL whitens padding too.
        """
        width = max(self.response_lengths)
        lengths = torch.tensor([self.response_lengths[row] for row in rows])
        places = (torch.arange(width)[None] >= width - lengths[:, None]).nonzero(as_tuple=True)
        return values.new_zeros(len(rows), width).index_put(tuple(place.to(values.device) for place in places), values)


class _WithinRows(torch.autograd.Function):
    """Causal attention of every row by plain products: [heads, tokens, size] queries, keys and values to [tokens, heads, size]."""

    @staticmethod
    def forward(ctx, query, key, value, spans, masks, scaling):
        groups, tables = key.shape[0], []
        found = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        for (start, end, before), mask in zip(spans, masks):
            asked = query[:, start:end].reshape(groups, -1, query.shape[2])
            keys, values = _seen(key, start, end, before), _seen(value, start, end, before)
            scores = torch.baddbmm(mask.repeat(asked.shape[1] // (end - start), 1), asked, keys.transpose(1, 2), alpha=scaling)
            tables.append(scores.float().softmax(dim=-1).to(scores.dtype))  # in half precision as such it takes longer
            found[start:end] = torch.bmm(tables[-1], values).view(len(query), end - start, -1).transpose(0, 1)
        ctx.spans, ctx.scaling = spans, scaling
        ctx.save_for_backward(query, key, value, *tables)
        return found

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *tables = ctx.saved_tensors
        by_query, by_key, by_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        groups, shared = key.shape[0], max(before for _, _, before in ctx.spans)
        # Every row adds to the shared tokens' gradients: in fp32, as one product over all rows would.
        by_shared = [table.new_zeros(groups, shared, table.shape[2], dtype=torch.float32) for table in (key, value)]
        for (start, end, before), table in reversed(list(zip(ctx.spans, tables))):
            by_found = gradient[start:end].transpose(0, 1).reshape(groups, -1, value.shape[2])
            asked = query[:, start:end].reshape(groups, -1, query.shape[2])
            keys, values = _seen(key, start, end, before), _seen(value, start, end, before)
            by_score = torch._softmax_backward_data(torch.bmm(by_found, values.transpose(1, 2)), table, -1, table.dtype)
            by_score *= ctx.scaling
            by_query[:, start:end] = torch.bmm(by_score, keys).view(len(query), end - start, -1)
            parts = torch.bmm(by_score.transpose(1, 2), asked), torch.bmm(table.transpose(1, 2), by_found)
            for whole, first, part in zip((by_key, by_value), by_shared, parts):
                if before or start:
                    first += part[:, :before]
                    whole[:, start:end] = part[:, before:]
                elif shared:  # the shared tokens themselves, which come last here
                    whole[:, :end] = part + first
                else:
                    whole[:, :end] = part
        return by_query, by_key, by_value, None, None, None


def _seen(table: torch.Tensor, start: int, end: int, before: int) -> torch.Tensor:
    return torch.cat([table[:, :before], table[:, start:end]], dim=1) if before else table[:, start:end]


def _attention(packed: Packed, masks: list[torch.Tensor], module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """transformers' attention interface. Raises ValueError for what is more than causal attention."""
    strange = [name for name, value in options.items() if value is not None and name not in cpu_speed.NO_MATTER]
    if strange or dropout or attention_mask is not None or not getattr(module, "is_causal", True) or len(query) != 1:
        raise ValueError(f"attention with {', '.join(strange) or 'a mask, dropout or several rows'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _WithinRows.apply(query[0], key[0], value[0], packed.spans, masks, scaling)[None], None


@contextmanager
def attention_within(model: nn.Module, packed: Packed) -> Iterator[None]:
    """While the block runs, attention of a model that `can_pack` is within the rows of `packed`, in the backward pass too."""
    from transformers import AttentionInterface

    dtype = next(model.parameters()).dtype
    masks = [
        torch.full((end - start, before + end - start), -torch.inf, dtype=dtype).triu_(1 + before) for start, end, before in packed.spans
    ]
    AttentionInterface.register(ATTENTION, functools.partial(_attention, packed, masks))
    with cpu_speed.attention_by(model, ATTENTION):
        yield


@contextmanager
def without_padding(backbone: nn.Module, rows: Sequence[Sequence[int]]) -> Iterator[None]:
    """While the block runs, `backbone`, which `can_pack`, takes these rows of token ids as one sequence, however they are padded on the right.

    The states that it returns are [rows, longest row, hidden], 0 in the padding.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    tokens = [torch.tensor(row) for row in rows]
    packed = pack(tokens, shared_start(tokens, min(map(len, tokens)) - 1))
    forward, own = backbone.forward, vars(backbone).get("forward")

    def of_packed(*args: object, **options: object) -> BaseModelOutputWithPast:
        states = forward(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).last_hidden_state[0]
        starts = (packed.shared, *packed.ends[:-1])
        alone = [torch.cat([states[: packed.shared], states[start:end]]) for start, end in zip(starts, packed.ends)]
        return BaseModelOutputWithPast(last_hidden_state=pad_sequence(alone, batch_first=True))

    try:
        backbone.forward = of_packed
        with attention_within(backbone, packed):
            yield
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own


def longest(model: nn.Module) -> int:
    """How long the longest row may be that is packed: attention must reach back over all of it."""
    limits = [getattr(config, name, None) for config in cpu_speed.configs_of(model, "sdpa") for name in _LIMITS]
    return min([MOST_TOKENS, *(limit for limit in limits if isinstance(limit, int))])


@torch.no_grad()
def can_pack(backbone: nn.Module) -> bool:
    """Whether a model on a CPU gives packed rows the hidden states that they have alone, tried on three rows.

    No row may notice by a single bit that another's tokens change.
    """
    weight = next(backbone.parameters())
    if not (cpu_speed.ENABLED and weight.device.type == "cpu" and "position_ids" in inspect.signature(backbone.forward).parameters):
        return False
    draw = torch.Generator().manual_seed(0)
    first, *own = (torch.randint(4, len(backbone.get_input_embeddings().weight), (length,), generator=draw) for length in (7, 5, 9, 8, 9))
    if longest(backbone) < len(first) + 9:
        return False
    before, after = ([torch.cat([first, row]) for row in (own[0], middle, own[2])] for middle in (own[1], own[3]))

    def hidden(rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        packed = pack(rows, len(first))
        with attention_within(backbone, packed):
            states = backbone(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).last_hidden_state[0]
        return states.split([len(first), *(len(row) - len(first) for row in rows)])

    try:
        found, others = hidden(before), hidden(after)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # the model wants something else
        return False
    alone = [backbone(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in before]
    same = all(torch.equal(found[place], others[place]) for place in (0, 1, 3)) and not torch.equal(found[2], others[2])
    expected = torch.cat([alone[0][: len(first)], *(states[len(first) :] for states in alone)]).float()
    error = (torch.cat(found).float() - expected).norm() / expected.norm()
    return same and bool(error < (1e-4 if weight.dtype == torch.float32 else 0.03))
