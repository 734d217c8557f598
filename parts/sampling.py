"""Batched sampling with a causal LM: what draws responses for PPO, for `evaluation.py` and for annotations.

    with ready_to_sample(model, 32):
        responses = sample(model, prompts, Decoding(96), row_draws(seed, rows, 96), end_tokens(tokenizer, model.generation_config), 32)

A response depends on its prompt and its draws, not on the batch around it: rows that end leave, and others take their places.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from parts.adapters import is_plain
from parts.cpu_speed import attention_to_one, one_token_at_a_time
from parts.errors import InputError
from parts.kv_batches import Batch, base_of, can_be_fixed, keeps_states, roomy_cache

BLOCK = 256  # tokens whose probabilities are summed first, where one is drawn

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

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
        logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k:
            logits = TopKLogitsWarper(self.top_k)(None, logits)
        if self.top_p < 1:
            logits = TopPLogitsWarper(self.top_p)(None, logits)
        return look_up(torch.softmax(logits, dim=-1), draws)


def look_up(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Where each row's number in [0, 1) falls in the cumulative distribution, [rows], in double precision.

    First in the sums of `BLOCK` tokens, then inside one block: a vocabulary's worth of doubles a row would take longer than the softmax.

    Args:
        probabilities: [rows, vocabulary].
        draws: [rows].
    """
    vocabulary = probabilities.shape[1]
    whole = vocabulary // BLOCK * BLOCK
    sums = probabilities[:, :whole].unflatten(1, (vocabulary // BLOCK, BLOCK)).sum(dim=-1, dtype=torch.float64)
    if whole < vocabulary:
        sums = torch.cat([sums, probabilities[:, whole:].sum(dim=-1, keepdim=True, dtype=torch.float64)], dim=1)
    cumulative = sums.cumsum(dim=-1)
    target = draws.to(cumulative)[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    places = (block * BLOCK + torch.arange(BLOCK, device=block.device)).clamp(max=vocabulary - 1)
    inside = probabilities.gather(1, places).double().cumsum(dim=-1)
    token = block * BLOCK + torch.searchsorted(inside, target - before, right=True)
    return token.squeeze(1).clamp(max=vocabulary - 1)


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
    return torch.tensor(np.array([generator.random(max_new_tokens) for generator in generators]).reshape(len(rows), max_new_tokens))


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
    at_a_time: int = 0,
    rows: Sequence[int] | None = None,
    finished: Callable[[int, list[int]], None] | None = None,
    together: bool = True,
) -> list[list[int]]:
    """One response to each prompt. The longest prompts come first; rows that have ended leave, and others take their places.

    A model whose layers keep more than all keys and values finishes a batch before the next; where they keep states, its prompts are of one
    length.

    Args:
        model: a causal LM in eval mode.
        prompts: token ids, at least one each.
        draws: [prompts, max_new_tokens] numbers in [0, 1), one for each token that may be drawn.
        ends: the tokens at which a response is over.
        at_a_time: most rows in a batch; 0 means all of them.
        rows: the prompts' numbers in messages, from 0.
        finished: called with each prompt's place and response as soon as it is over.
        together: as `Batch` reads prompts, and on a CPU attention by plain products; in half precision the other way rounds otherwise,
            and so draws others.

    Returns:
        Token ids of each response, up to and with the first of `ends`.

    Raises:
        FloatingPointError: the logits of a row are not finite.
    """
    waiting = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), *prompts[place]))  # the same prompts side by side
    responses: list[list[int]] = [[] for _ in prompts]
    recurrent = keeps_states(roomy_cache(model))
    device = next(model.parameters()).device
    numbers, first = draws.to(device).flatten(), torch.arange(0, draws.numel(), draws.shape[1], device=device)  # no step waits for a copy

    def enter(most: int) -> list[int]:
        length = len(prompts[waiting[0]])
        entering = [place for place in waiting[:most] if not recurrent or len(prompts[place]) == length]
        del waiting[: len(entering)]
        return entering

    def choose(places: Sequence[int], logits: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """The next token of each place, [places], and the places, -1 for those whose responses are over.

        `at` says where among the numbers each place's next one is, and moves on.
        """
        tokens = decoding.choose(logits, numbers[at])
        at += 1
        largest = logits.amax(dim=-1)
        left = []
        told = torch.where(largest.abs() < math.inf, tokens, -1).tolist()  # a step's only wait for a GPU
        for slot, (place, token) in enumerate(zip(places, told)):
            if place >= 0:
                response = responses[place]
                if token < 0:
                    row = (place if rows is None else rows[place]) + 1
                    found = f"the logits of token {len(response) + 1} are {largest[slot].item()}"
                    raise FloatingPointError(f"row {row}: {found}, expected numbers")
                response.append(token)
                if token in ends or len(response) == decoding.max_new_tokens:
                    if finished is not None:
                        finished(place, response)
                    place = -1
            left.append(place)
        return tokens, left

    with attention_to_one(model) if together else nullcontext():
        while waiting:
            places = enter(at_a_time or len(waiting))
            batch, at = Batch(model, [prompts[place] for place in places], together), first[places]
            tokens, places = choose(places, batch.logits, at)
            while any(place >= 0 for place in places):
                ended = [slot for slot, place in enumerate(places) if place < 0]
                if waiting and batch.can_refill and len(ended) * 8 >= len(places):  # a few at a time: one prompt costs as much to read
                    entering = enter(len(ended))
                    slots, others = torch.tensor(ended[: len(entering)], device=device), first[entering]
                    tokens[slots], entered = choose(entering, batch.refill(slots, [prompts[place] for place in entering]), others)
                    at[slots] = others
                    for slot, place in zip(ended, entered):
                        places[slot] = place
                elif len(ended) >= len(places) * batch.worth_leaving:
                    stay = torch.tensor([slot for slot, place in enumerate(places) if place >= 0], device=device)
                    batch.keep(stay)
                    tokens, at, places = tokens[stay], at[stay], [place for place in places if place >= 0]
                else:
                    if ended:
                        slots = torch.tensor(ended, device=device)
                        batch.forget(slots)
                        at[slots] = 0
                    batch.read(tokens)
                    tokens, places = choose(places, batch.logits, at)
            del batch  # before the next one's keys and values
    return responses


@torch.no_grad()
def check_sampling(model: PreTrainedModel, together: bool = True) -> None:
    """Compare what `sample` computes, with padding, cache and rows that leave and enter, with the model's own pass over each row alone.

    Args:
        together: as `sample` will be called.

    Raises:
        InputError: the distributions of the next token differ by more than rounding, or the model cannot be sampled this way.
    """
    first = torch.randint(model.get_input_embeddings().weight.shape[0], (44,), generator=torch.Generator().manual_seed(0)).tolist()
    start, first = first[24:], first[:24]  # of all prompts, which is read once where it can be
    own, forced = [first[:6], first[6:9], first[9:12], first[12:18]], [first[18:21], first[21:22] * 3, first[22:24] * 2, first[18:21]]
    seen: list[torch.Tensor] = []

    class Forced(Decoding):
        """Tokens that are given beforehand in place of draws."""

        def choose(self, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
            seen.extend(zip(draws.tolist(), logits.float().softmax(dim=-1)))
            return tokens[draws.long().cpu()].to(logits.device)

    device, prompts = next(model.parameters()).device, [start + rest for rest in own]
    name = model.config.name_or_path or type(base_of(model)).__name__
    try:
        steps = 5 if can_be_fixed(model) else 3  # a graph repeats from the third pass on
        forced = [(row * 2)[:steps] for row in forced]
        tokens = torch.tensor(forced).flatten()
        places = torch.arange(len(tokens)).reshape(len(prompts), steps)
        alone = {}
        for row, (prompt, answer) in enumerate(zip(prompts, forced)):
            ids = torch.tensor([prompt + answer[:-1]], device=device)
            alone |= dict(zip(places[row].tolist(), model(input_ids=ids, use_cache=False).logits[0, -steps:].float().softmax(dim=-1)))
        with ready_to_sample(model, len(prompts)):
            sample(model, prompts, Forced(steps), places, {forced[1][0]}, at_a_time=3, together=together)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise InputError(f"{name}: cannot be sampled with a cache ({type(error).__name__}: {str(error).splitlines()[0]})") from None
    difference = max((alone[place] - found).abs().sum().item() / 2 for place, found in seen)
    if not difference <= (3e-4 if next(model.parameters()).dtype == torch.float32 else 0.2):
        raise InputError(
            f"{name}: sampling with a cache gives other probabilities than the model's own pass (by {difference:.2g}), expected a model that samples alike"
        )


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
    ways = {layer: vars(layer).get("forward") for layer in lora}  # our own, where there is one
    # The last position alone is a slice, for which PyTorch's linear copies the head's weights once a row.
    contiguous = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        with torch.no_grad():
            for layer in lora:
                base = layer.get_base_layer()
                base.weight.data = base.weight.data + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
                layer.forward = base.__call__  # PEFT's own way round its adapters costs as much as a small product
        with one_token_at_a_time(model, batch_size):
            yield
    finally:
        contiguous.remove()
        for layer, way in ways.items():
            vars(layer).pop("forward", None)
            vars(layer).update({"forward": way} if way else {})
        for base, weight in weights.items():
            base.weight.data = weight
