"""Prompts in, responses out: rollouts of a model, or of adapters on it, by transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from parts.adapters import gives_base_back, put_on
from parts.cpu_speed import fewer_kernels, most_rows, use_onednn
from parts.models import load_causal_lm
from parts.sampling import Decoding, check_sampling, end_tokens, ready_to_sample, row_draws, sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch_size: int,
    seed: int,
    description: str | None = None,
    rows: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], None] | None = None,
    stream: str = "",
    samples: Sequence[int] | None = None,
    ends: Collection[int] | None = None,
) -> list[list[int]]:
    """Sample one response to each prompt. It depends on seed, stream and the numbers of row and sample, not on the batch it is drawn in.

    Args:
        model: a causal LM in eval mode.
        prompts: token ids.
        batch_size: most prompts at a time.
        seed: of the draws; the global random state is left as it was.
        description: of the progress bar; no bar without it.
        rows: the prompts' row numbers, where they are a part of some larger file; 0, 1, ... by default.
        finished: called with each prompt's place and response as soon as it is over.
        stream: what has draws of its own (`draw_key`).
        samples: which of its row's samples each response is, where a row is drawn for more than once; 0 by default.
        ends: the tokens at which a response is over; by default the tokenizer's and the model's.

    Returns:
        Token ids of each response in the order of `prompts`, up to and with the first end token.
    """
    ends = end_tokens(tokenizer, model.generation_config) if ends is None else ends
    rows = list(range(len(prompts))) if rows is None else rows
    samples = [0] * len(prompts) if samples is None else samples
    batch_size = most_rows(batch_size, next(model.parameters()).device)
    draws = row_draws(seed, rows, decoding.max_new_tokens, stream, samples)
    started, tokens = time.perf_counter(), 0
    with tqdm(total=len(prompts), desc=description, unit="row", disable=description is None) as bar, ready_to_sample(model, batch_size):

        def over(place: int, response: list[int]) -> None:
            nonlocal tokens
            tokens += len(response)
            if finished is not None:
                finished(place, response)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tok/s", refresh=False)
            bar.update()

        return sample(model, prompts, decoding, draws, ends, batch_size, rows, over)


# ---------------------------------------------------------------------------------------------------------------- engines


class HFEngine:
    """Rollouts of adapters on one base model by transformers; the base is loaded once, and only where it is needed.

    Args:
        base: the base model, hub name or folder.
        tokenizer: for generation.
        device: where the model runs.
        batch_size: prompts at a time.
        dtype: "float32" or "bfloat16"; empty means bfloat16 on a GPU and float32 on a CPU.
    """

    name = "hf"

    def __init__(
        self, base: str, tokenizer: PreTrainedTokenizerBase, device: str, batch_size: int, cache_dir: str | None = None, dtype: str = ""
    ) -> None:
        self.name_or_path = base
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
        self._place = {"device": device, "cache_dir": cache_dir}
        if (place := torch.device(device)).type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)  # PEFT loads adapters onto the current GPU
        self._model: PreTrainedModel | None = None
        self._checked = False  # once for all adapters of LoRA's two matrices

    def _load(self, name_or_path: str, device: str, cache_dir: str | None) -> PreTrainedModel:
        model = load_causal_lm(name_or_path, getattr(torch, self.dtype), cache_dir)
        return fewer_kernels(use_onednn(model.to(device).eval().requires_grad_(False)))

    @property
    def model(self) -> PreTrainedModel:
        """The base, loaded at its first use, and again where an adapter did not leave it as it was."""
        if self._model is None:
            self._model = self._load(self.name_or_path, **self._place)
        return self._model

    def generate(
        self,
        adapter: str | None,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        seed: int,
        rows: Sequence[int],
        finished: Callable[[int, list[int]], None],
        description: str | None = None,
        stream: str = "",
        samples: Sequence[int] | None = None,
        ends: Collection[int] | None = None,
    ) -> None:
        """One response to each prompt, handed to `finished(place, token ids)` as it is done.

        It is the base model's with `adapter`, that of the base model itself where there is none, or that of a whole model in its place.
        """
        how = (decoding, self.batch_size, seed, description, rows, finished, stream, samples, ends)
        if adapter is None or not (Path(adapter) / "adapter_config.json").is_file():
            if adapter is not None:
                self._model = None  # two models need not fit
            model = self.model if adapter is None else self._load(adapter, **self._place)
            check_sampling(model)
            generate_responses(model, self.tokenizer, prompts, *how)
            return
        model, plain = fewer_kernels(put_on(self.model, adapter, self.name_or_path)), gives_base_back(adapter)
        try:
            if not (plain and self._checked):
                check_sampling(model)
                self._checked |= plain
            generate_responses(model, self.tokenizer, prompts, *how)
        finally:
            self._model = model.unload() if plain else None
