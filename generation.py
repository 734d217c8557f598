"""Prompts in, responses out: batched sampling with transformers, shared by PPO's evaluation and by `evaluation.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from records import loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn. `top_k` 0 means no limit; a temperature of 0 means greedy decoding."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def generate_kwargs(self, tokenizer: PreTrainedTokenizerBase) -> dict:
        """The settings as keyword arguments of `model.generate`."""
        common = {"max_new_tokens": self.max_new_tokens, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        if self.temperature == 0:
            return {**common, "do_sample": False}
        return {**common, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


def load_tokenizer(name_or_path: str, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer ready for batched generation: padding on the left, with a pad token.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with loading(name_or_path, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.inference_mode()
def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    seed: int,
    description: str | None = None,
) -> list[list[int]]:
    """Sample one response to each prompt.

    Args:
        model: a causal LM in eval mode, or TRL's wrapper with a value head.
        prompts: token ids; sorted by length here, so that a batch holds little padding.
        seed: of the draws; the global random state is left as it was.
        description: of the progress bar; no bar without it.

    Returns:
        Token ids of each response in the order of `prompts`, up to and with the first end-of-sequence token.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    responses: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), tqdm(total=len(prompts), desc=description, unit="row", disable=description is None) as bar:
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(prompts[row]) for row in rows)
            padding = [longest - len(prompts[row]) for row in rows]
            ids = torch.tensor([[tokenizer.pad_token_id] * pad + list(prompts[row]) for row, pad in zip(rows, padding)], device=device)
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=device)
            generated = model.generate(input_ids=ids, attention_mask=mask, **decoding.generate_kwargs(tokenizer))
            for row, sequence in zip(rows, generated[:, longest:].tolist()):
                responses[row] = until_eos(sequence, tokenizer.eos_token_id)
            bar.update(len(rows))
    return responses


def until_eos(sequence: Sequence[int], eos_token_id: int) -> list[int]:
    """The sequence up to and with its first end-of-sequence token."""
    sequence = list(sequence)
    return sequence[: sequence.index(eos_token_id) + 1] if eos_token_id in sequence else sequence
