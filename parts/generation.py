"""Prompts in, responses out: batched sampling with a causal LM, shared by PPO's rollouts and by `evaluation.py`."""

from __future__ import annotations

import inspect
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from parts.adapters import gives_base_back, is_plain, put_on
from parts.batching import batches_by_length, pad
from parts.cpu_speed import most_rows, one_token_at_a_time, use_onednn
from parts.errors import InputError
from parts.files import read_json
from parts.models import load_causal_lm, loading

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase

    from parts.chat_templates import ChatTemplate


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn. `top_k` 0 means no limit; a temperature of 0 means greedy decoding."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a number that the same flag would not take."""
        for name, whole, allowed, expected in (
            ("max_new_tokens", True, lambda value: value >= 1, "a whole number, at least 1"),
            ("temperature", False, lambda value: 0 <= value < math.inf, "a number, at least 0"),
            ("top_p", False, lambda value: 0 < value <= 1, "a number above 0, at most 1"),
            ("top_k", True, lambda value: value >= 0, "a whole number, at least 0"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not allowed(value):
                raise ValueError(f"{name} is {value!r}, expected {expected}")

    def choose(self, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """The next token of each row, [rows], from its logits [rows, vocabulary] and one number in [0, 1) a row.

        The number is looked up in the cumulative distribution: one draw a row, where sampling by exponentials takes one a token.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float() / self.temperature
        if self.top_k:
            logits = TopKLogitsWarper(self.top_k)(None, logits)
        if self.top_p < 1:
            logits = TopPLogitsWarper(self.top_p)(None, logits)
        cumulative = torch.softmax(logits, dim=-1).double().cumsum(dim=-1)
        target = draws.to(cumulative)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def draw_key(seed: int, stream: str, row: int, sample: int = 0) -> np.ndarray:
    """The key of a sample's draws, for NumPy's Philox: two unsigned 64-bit integers.

    They are [CRC-32 of the stream's name, seed] and [sample, row], 32 bits each; no stream's name counts as 0.

    Args:
        seed: 0 to 2**32 - 1.
        stream: what has draws of its own, a checkpoint's name for example; empty: the draws that all have in common.
        row: of the prompt, 0 to 2**32 - 1.
        sample: which of the prompt's samples.
    """
    # Python integers of 2**63 and more would become floats, which lose the seed.
    return np.array([zlib.crc32(stream.encode()) << 32 | seed, sample << 32 | row], dtype=np.uint64)


def row_draws(seed: int, rows: Sequence[int], max_new_tokens: int, stream: str = "", sample: int | Sequence[int] = 0) -> torch.Tensor:
    """[rows, max_new_tokens] numbers in [0, 1). Each row's depend on its number and on seed, stream and sample (`draw_key`) alone.

    `sample` is one number for all rows, or one each.
    """
    keys = zip(rows, np.broadcast_to(sample, len(rows)).tolist())
    generators = [np.random.Generator(np.random.Philox(key=draw_key(seed, stream, row, number))) for row, number in keys]
    return torch.tensor(np.stack([generator.random(max_new_tokens) for generator in generators]))


def row_seed(seed: int, stream: str, row: int, sample: int = 0) -> int:
    """One number of 63 bits in place of a row's draws, for an engine that draws by itself from a seed."""
    return int(np.random.Philox(key=draw_key(seed, stream, row, sample)).random_raw()) >> 1


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, template: ChatTemplate | None = None
) -> frozenset[int]:
    """The tokens at which a response is over: the tokenizer's own, the model's, and stop strings that are special tokens.

    Args:
        generation: the model's generation settings, whose `eos_token_id` is one or a list.
        template: its stop strings that are special tokens would never be found in a text, which leaves special tokens out.
    """
    named = getattr(generation, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, (list, tuple)) else [named])}
    if template is not None:
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        ends |= {special.get(stop) for stop in template.stop_strings} - {tokenizer.unk_token_id}
    return frozenset(ends - {None})


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    draws: torch.Tensor,
    ends: Collection[int],
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """One response to each prompt, all of them in one batch; rows that have ended leave it.

    A model whose layers keep more than keys and values would count padding among what it has read: its prompts go in batches of one length.

    Args:
        model: a causal LM in eval mode.
        prompts: token ids, at least one each.
        draws: [prompts, max_new_tokens] numbers in [0, 1), one for each token that may be drawn.
        ends: the tokens at which a response is over.
        rows: the prompts' numbers in messages, from 0.

    Returns:
        Token ids of each response, up to and with the first of `ends`.

    Raises:
        FloatingPointError: the logits of a row are not finite.
    """
    device = next(model.parameters()).device
    names = list(range(len(prompts))) if rows is None else rows
    cache = _roomy_cache(model, max(map(len, prompts)) + decoding.max_new_tokens)
    recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    lengths = sorted({len(prompt) for prompt in prompts})
    if recurrent and len(lengths) > 1:
        responses: list[list[int]] = [[] for _ in prompts]
        for length in lengths:
            part = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
            found = sample(model, [prompts[place] for place in part], decoding, draws[part], ends, [names[place] for place in part])
            for place, response in zip(part, found):
                responses[place] = response
        return responses

    takes = _forward_arguments(model)
    ids, mask = pad(prompts, prompts[0][0], "left", device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    responses = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompts still in the batch; -1 for one that has ended and not left yet
    for step in range(decoding.max_new_tokens):
        given = {"past_key_values": cache, "cache_params": cache, "position_ids": positions, "logits_to_keep": 1}
        given |= {} if recurrent else {"attention_mask": mask}
        output = model(input_ids=ids, use_cache=True, **{name: value for name, value in given.items() if name in takes})
        logits = output.logits[:, -1]
        chosen = decoding.choose(logits, draws[[max(row, 0) for row in rows], step])
        for place, (token, largest) in enumerate(zip(chosen.tolist(), logits.amax(dim=-1).tolist())):
            if rows[place] >= 0:
                if not math.isfinite(largest):
                    raise FloatingPointError(
                        f"row {names[rows[place]] + 1}: the logits of token {step + 1} are {largest}, expected numbers"
                    )
                responses[rows[place]].append(token)
                if token in ends:
                    rows[place] = -1
        ended = rows.count(-1)
        if ended == len(rows):
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if ended * 8 >= len(rows):  # moving the others costs a copy of the cache
            stay = torch.tensor([place for place, row in enumerate(rows) if row >= 0], device=device)
            cache.reorder_cache(stay)
            ids, positions, mask = ids[stay], positions[stay], mask[stay]
            rows = [row for row in rows if row >= 0]
    return responses


def _forward_arguments(model: PreTrainedModel) -> Collection[str]:
    """The names that a model's forward pass takes, PEFT's wrapper aside."""
    return inspect.signature(_base_of(model).forward).parameters


def _base_of(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def check_sampling(model: PreTrainedModel) -> None:
    """Compare what `sample` computes, with padding, cache and rows that leave, with the model's own pass over each row alone.

    Raises:
        InputError: the distributions of the next token differ by more than rounding, or the model cannot be sampled this way.
    """
    first = torch.randint(model.get_input_embeddings().weight.shape[0], (24,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts, forced = [first[:6], first[6:9], first[9:12], first[12:18]], [first[18:21], first[21:22] * 3, first[22:24] * 2, first[18:21]]
    seen: list[torch.Tensor] = []

    class Forced(Decoding):
        """Tokens that are given beforehand in place of draws."""

        def choose(self, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
            seen.extend(zip(draws.tolist(), logits.float().softmax(dim=-1)))
            return tokens[draws.long()].to(logits.device)

    steps = 3
    tokens = torch.tensor([row[:steps] for row in forced]).flatten()
    places = torch.arange(len(tokens)).reshape(len(prompts), steps)
    name = model.config.name_or_path or type(_base_of(model)).__name__
    try:
        own = {}
        for row, (prompt, answer) in enumerate(zip(prompts, forced)):
            ids = torch.tensor([prompt + answer[: steps - 1]], device=next(model.parameters()).device)
            own |= dict(zip(places[row].tolist(), model(input_ids=ids, use_cache=False).logits[0, -steps:].float().softmax(dim=-1)))
        with ready_to_sample(model, len(prompts)):
            sample(model, prompts, Forced(steps), places, {forced[1][0]})
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise InputError(f"{name}: cannot be sampled with a cache ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    difference = max((own[place] - found).abs().sum().item() / 2 for place, found in seen)
    if not difference <= (3e-4 if next(model.parameters()).dtype == torch.float32 else 0.2):
        raise InputError(
            f"{name}: sampling with a cache gives other probabilities than the model's own pass (by {difference:.2g}), expected a model that samples alike"
        )


def _roomy_cache(model: PreTrainedModel, length: int) -> Cache:
    """A cache for `length` tokens. Where transformers' own layers copy themselves to append each token, these have room for all."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        room: tuple[torch.Tensor, torch.Tensor]

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
            start = self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0
            if start == 0:
                self.lazy_initialization(key_states, value_states)
                self.room = tuple(
                    states.new_empty(*states.shape[:-2], max(length, states.shape[-2]), states.shape[-1])
                    for states in (key_states, value_states)
                )
            end = start + key_states.shape[-2]
            for room, states in zip(self.room, (key_states, value_states)):
                room[..., start:end, :] = states
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

        def reorder_cache(self, indices: torch.Tensor) -> None:
            end = self.keys.shape[-2]
            self.room = tuple(room[indices] for room in self.room)
            self.keys, self.values = (room[..., :end, :] for room in self.room)

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextmanager
def ready_to_sample(model: PreTrainedModel, batch_size: int) -> Iterator[None]:
    """While the block runs, the model is in the form in which a token costs least.

    LoRA is added to copies of the weights. The weights themselves come back untouched (adding and subtracting would round them a little
    further each time). Only where they are fp32: in half precision the sum would round a small adapter away. The output head gets its
    input contiguous. An adapter that is more than LoRA's two matrices stays as PEFT has it.
    """
    from peft.tuners.lora import Linear as LoraLinear

    if not all(is_plain(config.to_dict()) for config in getattr(model, "peft_config", {}).values()):
        yield  # what is more than two matrices may sit on any weight, or on one twice
        return
    lora = [layer for layer in model.modules() if isinstance(layer, LoraLinear) and not layer.disable_adapters]
    lora = [layer for layer in lora if layer.get_base_layer().weight.dtype == torch.float32]
    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    lora = [layer for layer in lora if holders[id(layer.get_base_layer().weight)] == 1]  # others would get the sum too
    weights = {layer.get_base_layer(): layer.get_base_layer().weight.data for layer in lora}
    # The last position alone is a slice, for which PyTorch's linear copies the head's weights once a row.
    contiguous = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        with torch.no_grad():
            for layer in lora:
                base = layer.get_base_layer()
                base.weight.data = base.weight.data + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
                layer._disable_adapters = True
        with one_token_at_a_time(model, batch_size):
            yield
    finally:
        contiguous.remove()
        for layer in lora:
            layer._disable_adapters = False
        for base, weight in weights.items():
            base.weight.data = weight


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
        prompts: token ids; sorted by length here, so that a batch holds little padding.
        batch_size: most prompts at a time.
        seed: of the draws; the global random state is left as it was.
        description: of the progress bar; no bar without it.
        rows: the prompts' row numbers, where they are a part of some larger file; 0, 1, ... by default.
        finished: called with each prompt's place and response as soon as its batch is done.
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
    responses: list[list[int]] = [[] for _ in prompts]
    started, tokens = time.perf_counter(), 0
    with tqdm(total=len(prompts), desc=description, unit="row", disable=description is None) as bar, ready_to_sample(model, batch_size):
        for places in batches_by_length(list(map(len, prompts)), batch_size, longest_first=True):
            numbers = [rows[place] for place in places]
            draws = row_draws(seed, numbers, decoding.max_new_tokens, stream, [samples[place] for place in places])
            found = sample(model, [prompts[place] for place in places], decoding, draws, ends, numbers)
            for place, response in zip(places, found):
                responses[place] = response
                tokens += len(response)
                if finished is not None:
                    finished(place, response)
            bar.update(len(places))
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tok/s")
    return responses


# ---------------------------------------------------------------------------------------------------------------- engines


class HFEngine:
    """Rollouts of adapters on one base model by transformers; the base is loaded once.

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
        self._model: PreTrainedModel | None = self._load(device, cache_dir)
        self._checked = False  # once for all adapters of LoRA's two matrices

    def _load(self, device: str, cache_dir: str | None) -> PreTrainedModel:
        model = load_causal_lm(self.name_or_path, getattr(torch, self.dtype), cache_dir)
        return use_onednn(model.to(device).eval().requires_grad_(False))

    @property
    def model(self) -> PreTrainedModel:
        """The base, loaded again where an adapter did not leave it as it was."""
        if self._model is None:
            self._model = self._load(**self._place)
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

        It is the base model's with `adapter`, or that of the base model itself where there is none.
        """
        how = (decoding, self.batch_size, seed, description, rows, finished, stream, samples, ends)
        if adapter is None:
            check_sampling(self.model)
            generate_responses(self.model, self.tokenizer, prompts, *how)
            return
        model, plain = put_on(self.model, adapter, self.name_or_path), gives_base_back(adapter)
        try:
            if not (plain and self._checked):
                check_sampling(model)
                self._checked |= plain
            generate_responses(model, self.tokenizer, prompts, *how)
        finally:
            self._model = model.unload() if plain else None


class VLLMEngine:
    """Rollouts of adapters on one base model by vLLM (`requirements/vllm.txt`): one engine, one LoRA per checkpoint.

    On a GPU a sample depends on seed and row here too, though vLLM draws it otherwise than `HFEngine` does. Its CPU build has no draws by
    row: there a whole call repeats, and a resumed one need not.
    """

    name = "vllm"

    def __init__(self, base: str, tokenizer: PreTrainedTokenizerBase, adapters: Sequence[str], max_length: int, dtype: str = "") -> None:
        from transformers import AutoConfig

        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError(f"--engine vllm: {error}; expected an environment made with requirements/vllm.txt") from None
        ranks = [read_json(Path(adapter) / "adapter_config.json")["r"] for adapter in adapters]
        rank = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= max(ranks, default=0))
        with loading(base, "a model for vLLM"):
            positions = getattr(AutoConfig.from_pretrained(base, trust_remote_code=False), "max_position_embeddings", max_length)
            length = min(max_length, positions)
            self.engine = LLM(model=base, dtype=dtype or "auto", enable_lora=bool(ranks), max_lora_rank=rank, max_model_len=length)
        self.tokenizer = tokenizer
        self.numbers = {adapter: number for number, adapter in enumerate(adapters, start=1)}

    @property
    def dtype(self) -> str:
        return str(self.engine.llm_engine.model_config.dtype).removeprefix("torch.")

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
        """As `HFEngine.generate`; vLLM batches by itself and shows its own progress bar."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform

        request = None
        if adapter is not None:
            request = LoRARequest(f"adapter{self.numbers[adapter]}", self.numbers[adapter], str(Path(adapter).resolve()))
        settings = [
            SamplingParams(
                max_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k or -1,
                seed=None if current_platform.is_cpu() else row_seed(seed, stream, row, sample),
                stop_token_ids=sorted(ends or [self.tokenizer.eos_token_id]),
                skip_special_tokens=False,
            )
            for row, sample in zip(rows, samples or [0] * len(rows))
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        for place, output in enumerate(self.engine.generate(inputs, settings, lora_request=request, use_tqdm=description is not None)):
            finished(place, list(output.outputs[0].token_ids))
