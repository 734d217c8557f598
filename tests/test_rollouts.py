"""Batches of prompts, rollouts, and what is cut off them."""

from __future__ import annotations

import itertools

import pytest
import torch

from chat_templates import ChatTemplate, encode_prompts, load_template
from generation import Decoding, generate_responses, load_tokenizer, until_eos
from run_ppo import Prompt, batches, cut_at_stop_string, require_finite_step

PROMPTS = [Prompt(f"p{number}", [number], {}) for number in range(10)]


@pytest.fixture(scope="module")
def policy(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


def drawn(count: int, batch_size: int = 4, seed: int = 42, rank: int = 0, world_size: int = 1) -> list[int]:
    some = itertools.islice(batches(PROMPTS, batch_size, seed, rank, world_size), count)
    return [prompt.tokens[0] for batch in some for prompt in batch]


def test_every_epoch_holds_every_prompt_once_in_another_order():
    numbers = drawn(5)  # two epochs of ten
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]
    assert numbers == drawn(5)
    assert numbers != drawn(5, seed=43)


def test_ranks_share_out_the_same_order():
    alone = drawn(5, batch_size=4)
    ranks = [drawn(5, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    together = [number for step in range(5) for rank in (0, 1) for number in ranks[rank][2 * step : 2 * step + 2]]
    assert together == alone


def test_responses_end_with_their_first_eos():
    assert until_eos([5, 2, 7, 2], 2) == [5, 2]
    assert until_eos([5, 7], 2) == [5, 7]


@pytest.mark.parametrize("stop", ["### Instruction:", "\n\n--", "\n\n\n\n"])
def test_tokens_are_cut_where_the_stop_string_begins(tiny_model, stop):
    tokenizer = load_tokenizer(str(tiny_model))
    template = load_template("alpaca")
    ids = tokenizer(f"Rain drums softly{stop} and on it goes")["input_ids"]
    cut = cut_at_stop_string(ids, tokenizer, template)
    assert ids[: len(cut)] == cut
    assert tokenizer.decode(cut) == "Rain drums softly"
    plain = tokenizer("Rain drums softly, [INST] and all")["input_ids"]
    assert cut_at_stop_string(plain, tokenizer, template) == plain


def test_a_response_that_starts_with_a_stop_string_keeps_a_token(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    ids = tokenizer("### Instruction: again")["input_ids"]
    assert cut_at_stop_string(ids, tokenizer, load_template("alpaca")) == ids[:1]


def test_greedy_rollouts_are_those_of_transformers_at_any_batch_size(policy, tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    template = ChatTemplate("t", "{{ messages[0].content }}", ("x",), ("x",))
    prompts = encode_prompts(tokenizer, [template.render(text) for text in ("Rain", "Give the plural of goose.", "What is 2 + 3?")])
    expected = []
    for prompt in prompts:
        full = policy.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2)[0].tolist()
        expected.append(until_eos(full[len(prompt) :], 2))
    for batch_size in (1, 2, 3):
        assert generate_responses(policy, tokenizer, prompts, Decoding(8, temperature=0), batch_size, seed=0) == expected


def test_sampling_follows_its_seed_and_leaves_the_global_state(policy, tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = generate_responses(policy, tokenizer, [[5, 6], [7]], Decoding(8), 2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == generate_responses(policy, tokenizer, [[5, 6], [7]], Decoding(8), 2, seed=1)
    assert first != generate_responses(policy, tokenizer, [[5, 6], [7]], Decoding(8), 2, seed=2)


def test_a_step_that_is_not_finite_stops_the_run():
    good = {"objective/kl": 0.1, "ppo/loss/total": 1.0, "ppo/loss/policy": 0.5, "ppo/loss/value": 0.5}
    require_finite_step(good, 3)
    with pytest.raises(FloatingPointError, match="ppo/loss/value is nan at step 3; the last checkpoint is good"):
        require_finite_step({**good, "ppo/loss/value": float("nan")}, 3)


def test_the_policy_never_leaves_eval_mode_and_layers_checkpoint_only_with_gradients(tiny_model):
    from accelerate import Accelerator
    from transformers.modeling_layers import GradientCheckpointingLayer

    from run_ppo import PPOSettings, load_policy

    policy = load_policy(PPOSettings(model_name=str(tiny_model), lora_dropout=0.5, gradient_checkpointing=True), Accelerator(cpu=True))
    policy.train()
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    dropouts = [module for module in policy.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    assert len(layers) == 2 and len(dropouts) == 4 + 1  # LoRA on q and v in two layers, and the value head's
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            policy(input_ids=torch.tensor([[5, 6, 7]]))
        assert [layer.training for layer in layers] == [grad, grad]
        assert not any(module.training for module in dropouts)
