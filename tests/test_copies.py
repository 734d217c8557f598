"""No linear layer gets an input for which PyTorch copies the layer's weights once a row, as it does for slices of three dimensions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_ppo_trainer import make_trainer, rollouts
from torch import nn

from parts.gold_models import load_gold_reward_model
from parts.ppo_trainer import FastPPOTrainer
from parts.relevance import RelevanceModel
from parts.sampling import Decoding, ready_to_sample, row_draws, sample


def test_a_sampled_batch_holds_the_heads_weights_once():
    """The largest tensor is the 16 rows' probabilities in whole blocks, 5 MB in double; the head's weights once a row are 41 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=40_000, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(config).eval().requires_grad_(False).bfloat16()  # PyTorch copies frozen weights, in half precision
    prompts, draws = [[5 + row, 6, 7] for row in range(16)], row_draws(7, range(16), 3)
    with ready_to_sample(model, 16), torch.profiler.profile(profile_memory=True) as profile:
        sample(model, prompts, Decoding(3), draws, ends=())
    largest = max(profile.events(), key=lambda event: event.self_cpu_memory_usage)
    assert largest.self_cpu_memory_usage == 39_936 * 16 * 8, largest.name


def policy_and_value_head(tiny_model, tiny_gold):
    trainer = make_trainer(FastPPOTrainer, tiny_model)
    queries, responses, scores = rollouts(0)
    trainer.generate(queries, batch_size=4, max_new_tokens=4, top_k=0)
    np.random.seed(0)
    trainer.step(queries, responses, scores)


def gold(tiny_model, tiny_gold):
    load_gold_reward_model(str(tiny_gold), device="cpu").get_reward({"query": ["A", "A longer one"] * 2, "response": ["B", "C", "D", "E"]})


def encoder(tiny_model, tiny_gold):
    RelevanceModel(str(REPOSITORY / "models" / "all-MiniLM-L6-v2"), device="cpu").embed(["Rain", "A longer text about rain."])


@pytest.mark.parametrize("work", [policy_and_value_head, gold, encoder])
def test_linear_layers_see_contiguous_inputs(work, tiny_model, tiny_gold):
    seen = []

    def look(module, inputs, output):
        if isinstance(module, nn.Linear):
            seen.append((inputs[0].dim() < 3 or inputs[0].is_contiguous(), tuple(module.weight.shape), tuple(inputs[0].shape)))

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        work(tiny_model, tiny_gold)
    finally:
        handle.remove()
    assert len(seen) > 10 and [where for contiguous, *where in seen if not contiguous] == []
