"""The prompts of PPO: rows into tokens, tokens into batches; and where a response to one ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parts.chat_templates import encode_rows
from parts.data_checks import check_rows, too_long
from parts.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from parts.chat_templates import ChatTemplate


@dataclass(frozen=True)
class Prompt:
    """A row ready for rollouts. The raw instruction stays beside the tokens, so nothing has to be parsed back."""

    instruction: str
    tokens: list[int]
    row: dict

    @property
    def qtype(self) -> str | None:
        return self.row.get("qtype")


def read_prompts(
    path: str,
    fields: Mapping[str, tuple[str, ...] | None],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    max_length: int,
    drop_long: bool = False,
    against: Sequence[str] = (),
) -> list[Prompt]:
    """Read rows, render and tokenize their prompts. A line warns of repeated prompts and of those that are also in a file of `against`.

    Args:
        fields: what each row must have besides `input`, as `check_rows` takes it.
        max_length: prompts must have fewer tokens than this.
        drop_long: leave rows with longer prompts out.

    Raises:
        InputError: an unusable row, a prompt that is too long, or no prompt that is short enough.
    """
    rows = check_rows(path, {"input": None, **fields}, against)
    prompts = []
    encoded = encode_rows(tokenizer, template, rows, "input", str(path))
    for number, (row, tokens) in enumerate(zip(rows, encoded), start=1):
        problem = too_long(len(tokens), max_length)
        if problem is None:
            prompts.append(Prompt(row["input"], tokens, row))
        elif not drop_long:
            raise InputError(f"{path}: row {number}: {problem} (--long_prompts=drop leaves such rows out)")
    if not prompts:
        raise InputError(f"{path}: every prompt has {max_length} tokens or more, expected shorter ones")
    if len(prompts) < len(rows):
        print(f"{path}: {len(rows) - len(prompts)} of {len(rows)} rows dropped, their prompts have {max_length} tokens or more")
    return prompts


def with_random_qtypes(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The same prompts with their query types in another order, that of `seed`: as many of each."""
    order = np.random.default_rng([seed, 0x7175]).permutation(len(prompts))  # another stream than the batches'
    return [replace(prompt, row={**prompt.row, "qtype": prompts[place].qtype}) for prompt, place in zip(prompts, order)]


def batches(prompts: list[Prompt], batch_size: int, seed: int, rank: int, world_size: int) -> Iterator[list[Prompt]]:
    """Endless batches: every epoch is a new permutation, every prompt comes once an epoch, ranks get disjoint slices.

    The prompt at a position depends on seed and position alone. (A loader inside `accelerator.prepare` would make the last
    batch of each epoch take an optimizer step per mini batch, whatever gradient_accumulation_steps says.)
    """
    order, epoch, start = None, -1, rank * batch_size
    while True:
        batch = []
        for position in range(start, start + batch_size):
            if position // len(prompts) != epoch:
                epoch = position // len(prompts)
                order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
            batch.append(prompts[order[position % len(prompts)]])
        yield batch
        start += batch_size * world_size


def cut_at_stop_string(response: list[int], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[int]:
    """The response's tokens up to its first stop string, at least one; unchanged where the text holds none.

    Tokens are dropped, never encoded again: PPO needs the log-probabilities of tokens that the policy drew.
    """
    text = tokenizer.decode(response, skip_special_tokens=True)
    lead = len(text) - len(text.lstrip("\n "))  # a stop string begins no response: `ChatTemplate.strip_response`
    starts = [start for stop in template.stop_strings if (start := text.find(stop, lead)) >= 0]
    if not starts:
        return response
    low, high = 1, len(response)
    while low < high:  # the fewest tokens whose text reaches the stop string
        middle = (low + high) // 2
        if len(tokenizer.decode(response[:middle], skip_special_tokens=True)) >= min(starts):
            high = middle
        else:
            low = middle + 1
    return response[:low]
