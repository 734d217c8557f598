"""What a causal LM has read of several rows: keys and values that grow, of rows that leave and enter. `sampling.sample` draws with it.

batch = Batch(model, prompts)           # batch.logits: of each row's next token
batch.read(tokens)                      # one more token of each row
batch.keep(rows), batch.refill(slots, prompts)
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from parts import cuda_graphs
from parts.batching import PASS, batches_by_length, pad, shared_start
from parts.cpu_speed import most_tokens
from parts.cuda_graphs import FixedPass

if TYPE_CHECKING:
    from transformers import Cache

SPARE = 64  # tokens that a cache grows by, where it is full


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for tokens to come, where transformers' own layer copies itself for each; other rows can take its slots."""

    room: tuple[torch.Tensor, torch.Tensor]
    column: torch.Tensor | None = None  # of the room where the next token goes, while shapes are fixed

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if self.column is not None:
            for room, states in zip(self.room, (key_states, value_states)):
                room.index_copy_(2, self.column, states)
            return self.room
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self.room[0].shape[2]:
            self.room = tuple(room.new_empty(*room.shape[:2], end + SPARE, room.shape[3]) for room in self.room)
            self.room[0][:, :, :start], self.room[1][:, :, :start] = self.keys, self.values
        keys, values = self.room
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        if self.column is not None:
            raise RuntimeError("it asks how many tokens were read, which a graph would not ask again")
        return super().get_seq_length()

    def fix(self, unused: int, end: int, column: torch.Tensor) -> None:
        """Keep room for `end` tokens without the first `unused`; a token goes to `column`, and all of the room is shown."""
        shown = [states[:, :, unused:] for states in (self.keys, self.values)]
        # What no token was written to is masked, and must be a number.
        self.room = tuple(nn.functional.pad(states, (0, 0, 0, end - states.shape[2])) for states in shown)
        self._show(end)
        self.column = column

    def loosen(self, width: int) -> None:
        """Show the `width` tokens that were read, and grow again."""
        self.column = None
        self._show(width)

    def _show(self, end: int) -> None:
        self.keys, self.values = (room[:, :, :end] for room in self.room)

    def reorder_cache(self, indices: torch.Tensor) -> None:
        self.room = tuple(room[indices] for room in self.room)
        self._show(self.keys.shape[2])

    def put(self, slots: torch.Tensor, other: _RoomyLayer, end: int) -> None:
        """The rows of `other` in place of those in `slots`, up to the column `end`."""
        for room, states in zip(self.room, (other.keys, other.values)):
            room[slots, :, end - states.shape[2] : end] = states

    def join(self, others: Sequence[_RoomyLayer], places: Sequence[torch.Tensor], width: int) -> None:
        """Become the rows of `others` in these places, each on the right; what is before them is 0, which no mask lets count."""
        states = [(other.keys, other.values) for other in others]
        rows = sum(map(len, places))
        self.room = tuple(room.new_zeros(rows, room.shape[1], width + SPARE, room.shape[3]) for room in self.room)
        self._show(width)
        for slots, both in zip(places, states):
            for room, own in zip(self.room, both):
                room[slots, :, width - own.shape[2] : width] = own

    def trim(self, unused: int) -> None:
        """Forget the first `unused` tokens."""
        self.room = tuple(room[:, :, unused:] for room in self.room)
        self._show(self.keys.shape[2] - unused)


def roomy_cache(model: PreTrainedModel) -> Cache:
    """An empty cache. Layers that keep all keys and values, and nothing else, are roomy ones."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Batch:
    """What a model has read of several rows. They end together: tokens are padded on the left.

    Args:
        prompts: token ids, at least one each.
        together: read what all prompts begin with once, and on a CPU the rest a few of about one length at a time; else all of them whole.
    """

    logits: torch.Tensor  # [rows, vocabulary] of the rows' next tokens
    _fixed: FixedPass | None = None

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], together: bool = True) -> None:
        self.together = together
        self.model, self.takes = model, inspect.signature(base_of(model).forward).parameters
        self.device = next(model.parameters()).device
        self.cache = roomy_cache(model)
        self.recurrent = keeps_states(self.cache)
        different = list(dict.fromkeys(map(tuple, prompts)))  # the same prompt is read once
        self._read_prompts(different)
        if len(different) < len(prompts):
            number = {prompt: slot for slot, prompt in enumerate(different)}
            self.keep(torch.tensor([number[tuple(prompt)] for prompt in prompts], device=self.device))
        self._can_be_fixed = can_be_fixed(model)

    def _read_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        start, groups, parts = self._common_start(prompts), [list(range(len(prompts)))], []
        own = [prompt[start:] for prompt in prompts]
        most = most_tokens(math.inf, self.device)
        if self.together and self.can_refill and most < math.inf:
            parted = batches_by_length(list(map(len, own)), most_tokens=most, longest_first=True)
            groups = parted if len(parted) > 1 else groups  # in the order of the prompts
        common = torch.ones(1, start, dtype=torch.long, device=self.device)
        if start:
            self.mask = common
            self._read(torch.tensor([prompts[0][:start]], device=self.device), torch.arange(start, device=self.device)[None])
        begun = self.cache
        for group in groups:
            self.cache = begun if len(groups) == 1 else copy.deepcopy(begun)
            if start:
                self.cache.reorder_cache(torch.zeros(len(group), dtype=torch.long, device=self.device))
            ids, mask = pad([own[place] for place in group], prompts[0][0], "left", self.device)
            self.mask = torch.cat([common.expand(len(group), -1), mask], dim=1)
            self._read(ids, (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:])
            parts.append((self.mask, self.cache, self.logits, self.positions))
        if len(groups) > 1:
            self._join(groups, parts)

    def _join(self, groups: Sequence[Sequence[int]], parts: Sequence[tuple[torch.Tensor, Cache, torch.Tensor, torch.Tensor]]) -> None:
        """Masks, caches, logits and positions of several batches as those of one, whose rows end together; `groups` are their places."""
        masks, caches, logits, positions = zip(*parts)
        places = [torch.tensor(group, device=self.device) for group in groups]
        order, width = torch.cat(places).argsort(), max(mask.shape[1] for mask in masks)
        self.mask = torch.cat([nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])[order]
        self.logits, self.positions, self.cache = torch.cat(logits)[order], torch.cat(positions)[order], caches[-1]
        for layer, *others in zip(self.cache.layers, *(cache.layers for cache in caches)):
            layer.join(others, places, width)

    def _common_start(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens all prompts begin with, where reading them once saves more than another pass costs.

        Padding comes after them then: of models that take no positions some count it, ALiBi's for example.
        """
        if not (self.together and self.can_refill and "position_ids" in self.takes):
            return 0
        start = shared_start([torch.tensor(prompt) for prompt in prompts], min(map(len, prompts)) - 1)
        return start if start * (len(prompts) - 1) > PASS else 0

    @property
    def can_refill(self) -> bool:
        """Whether rows can take the places of others: only where all that is kept of a row is keys and values of all its tokens."""
        return all(isinstance(layer, _RoomyLayer) for layer in self.cache.layers)

    @property
    def width(self) -> int:
        """How many tokens the longest row has, padding included."""
        return self.mask.shape[1] if self._fixed is None else self._fixed.width

    @property
    def worth_leaving(self) -> float:
        """What share of the rows must have ended for the others to move together: each time a graph is captured again.

        That takes as long as some tokens, and few rows less make none of them faster: a token reads all weights.
        """
        return 1 / 8 if self._fixed is None else 1 / 2 if len(self.mask) > cuda_graphs.FEW_ROWS else 1

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        mask = None if self.recurrent else self.mask
        self.logits, self.positions = last_logits(self.model, self.takes, self.cache, ids, positions, mask), positions[:, -1:] + 1

    def read(self, tokens: torch.Tensor) -> None:
        """One more token of each row, [rows]. The logits of the last call may be overwritten."""
        if self._can_be_fixed:
            try:
                self._read_fixed(tokens)
                return
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._loosen()
                self._can_be_fixed = False
                cuda_graphs.leave_out(base_of(self.model), error)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._read(tokens[:, None], self.positions)

    def _read_fixed(self, tokens: torch.Tensor) -> None:
        if self._fixed is not None and self._fixed.is_full:
            self._loosen()
        if self._fixed is None:
            read = functools.partial(last_logits, self.model, self.takes, self.cache)
            self._fixed = FixedPass(read, self.cache, self.mask, self.positions)
            self.mask, self.positions = self._fixed.mask, self._fixed.positions
        self.logits = self._fixed(tokens)

    def _loosen(self) -> None:
        """Mask, keys and values of what was read alone, which can grow and move."""
        if self._fixed is not None:
            self.mask = self.mask[:, : self.width].long()
            for layer in self.cache.layers:
                layer.loosen(self.width)
            self._fixed = None

    def keep(self, rows: torch.Tensor) -> None:
        """These rows alone, in this order; one may come twice."""
        self._loosen()
        self.cache.reorder_cache(rows)
        self.mask, self.positions, self.logits = self.mask[rows], self.positions[rows], self.logits[rows]

    def forget(self, slots: torch.Tensor) -> None:
        """Let the rows in `slots` go on as new ones, so that none grows beyond the positions that the model has."""
        self.mask[slots, : self.width - 1], self.positions[slots] = 0, 0

    def refill(self, slots: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Other prompts, none longer than the longest row, in place of the rows in `slots`; the logits [slots, vocabulary] of what follows."""
        others = Batch(self.model, prompts, self.together)
        width = self.width - others.width
        self.mask[slots, :width], self.mask[slots, width : self.width] = 0, others.mask.to(self.mask)
        self.positions[slots] = others.positions
        for layer, other in zip(self.cache.layers, others.cache.layers):
            layer.put(slots, other, self.width)
        if self._fixed is None:
            unused = int(self.mask.any(dim=0).int().argmax())
            self.mask = self.mask[:, unused:]
            for layer in self.cache.layers:
                layer.trim(unused)
        return others.logits


def last_logits(
    model: PreTrainedModel, takes: Collection[str], cache: Cache, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Logits [rows, vocabulary] of what follows `ids`, of what a model `takes`."""
    given = {"past_key_values": cache, "cache_params": cache, "position_ids": positions, "attention_mask": mask, "logits_to_keep": 1}
    given = {name: value for name, value in given.items() if name in takes and value is not None}
    return model(input_ids=ids, use_cache=True, **given).logits[:, -1]


def can_be_fixed(model: PreTrainedModel) -> bool:
    """Whether to read tokens in passes of fixed shapes: on a GPU, by a model that keeps all keys and values and is told positions."""
    base = base_of(model)
    if not cuda_graphs.can_be_graphed(base, next(model.parameters()).device):
        return False
    roomy = all(isinstance(layer, _RoomyLayer) for layer in roomy_cache(model).layers)
    return roomy and "position_ids" in inspect.signature(base.forward).parameters


def keeps_states(cache: Cache) -> bool:
    """Whether a layer keeps a state that reads on, in which padding would count, and not keys and values alone."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
