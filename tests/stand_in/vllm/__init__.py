"""What our code uses of vLLM, played by transformers and PEFT: for tests where vLLM is not installed. It draws from each request's seed."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

SamplingParams = SimpleNamespace


class LLM:
    def __init__(self, model: str, dtype: str, enable_lora: bool, max_lora_rank: int, max_model_len: int, **options: object) -> None:
        self.how = {"dtype": dtype, "enable_lora": enable_lora, "max_lora_rank": max_lora_rank, "max_model_len": max_model_len, **options}
        self.model, self.loaded = model, {}
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))

    def generate(self, inputs: list[dict], settings: list[SamplingParams], lora_request: object, use_tqdm: bool) -> list[SimpleNamespace]:
        number = lora_request.number if lora_request else 0
        if number not in self.loaded:  # as vLLM: what a number stands for is read once
            base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            self.loaded[number] = PeftModel.from_pretrained(base, lora_request.path) if lora_request else base
        drawn = [draw(self.loaded[number].eval(), given["prompt_token_ids"], how) for given, how in zip(inputs, settings)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)]) for ids, logprobs in drawn]


@torch.no_grad()
def draw(model: torch.nn.Module, prompt: list[int], how: SamplingParams) -> tuple[list[int], list[dict]]:
    """A response, and for each of its tokens {token: its log-probability}."""
    chance, ids, logprobs = torch.Generator().manual_seed(how.seed), [], []
    while len(ids) < how.max_tokens and not set(ids[-1:]) & set(how.stop_token_ids):
        found = model(torch.tensor([[*prompt, *ids]])).logits[0, -1].log_softmax(-1)
        token = int(torch.multinomial(found.exp(), 1, generator=chance))
        ids.append(token)
        logprobs.append({token: SimpleNamespace(logprob=found[token].item())})
    return ids, logprobs
