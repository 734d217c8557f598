"""Batches of prompts, rollouts, and what is cut off them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from parts.chat_templates import ChatTemplate, encode_prompts, load_template
from parts.generation import generate_responses
from parts.models import load_tokenizer
from parts.ppo_data import Prompt, batches, cut_at_stop_string, with_random_qtypes
from parts.ppo_metrics import require_finite_step
from parts.sampling import Decoding, draw_key, look_up, ready_to_sample, row_draws, row_seed, sample

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


def test_random_query_types_are_dealt_out_by_seed():
    """As many of each as there are; nothing else of a row changes."""
    prompts = [
        Prompt(f"p{number}", [number], {"qtype": "OPENENDED" if number < 7 else "CONSTRAINED", "output": "x"}) for number in range(20)
    ]
    dealt = with_random_qtypes(prompts, 1)
    assert [prompt.qtype for prompt in dealt].count("OPENENDED") == 7 and [row.qtype for row in dealt] != [row.qtype for row in prompts]
    assert [(row.tokens, row.row["output"]) for row in dealt] == [(row.tokens, row.row["output"]) for row in prompts]
    assert dealt == with_random_qtypes(prompts, 1) and dealt != with_random_qtypes(prompts, 2)
    assert [prompt.qtype for prompt in prompts[:7]] == ["OPENENDED"] * 7


def test_ranks_share_out_the_same_order():
    alone = drawn(5, batch_size=4)
    ranks = [drawn(5, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    together = [number for step in range(5) for rank in (0, 1) for number in ranks[rank][2 * step : 2 * step + 2]]
    assert together == alone


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


@pytest.mark.parametrize(
    ("response", "kept"),
    [
        ("\n\n\n\nParis is the capital.", "\n\n\n\nParis is the capital."),
        ("\n\n--Paris\n\n--London", "\n\n--Paris"),
        ("  \n\n\n\n\nYes.### Instruction: No.", "  \n\n\n\n\nYes."),
    ],
)
def test_white_space_that_leads_a_response_is_no_stop_string(tiny_model, response, kept):
    """The tokens that PPO trains on hold the text that the reward sees: `strip_response` strips before it cuts."""
    tokenizer, template = load_tokenizer(str(tiny_model)), load_template("alpaca")
    cut = tokenizer.decode(cut_at_stop_string(tokenizer(response)["input_ids"], tokenizer, template))
    assert cut == kept and template.strip_response(cut) == template.strip_response(response)


def test_greedy_rollouts_are_those_of_transformers_at_any_batch_size(policy, tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    template = ChatTemplate("t", "{{ messages[0].content }}", ("x",), ("x",))
    prompts = encode_prompts(tokenizer, [template.render(text) for text in ("Rain", "Give the plural of goose.", "What is 2 + 3?")])
    expected = []
    for prompt in prompts:
        full = policy.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2)[0].tolist()
        new = full[len(prompt) :]
        expected.append(new[: new.index(2) + 1] if 2 in new else new)
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


def test_a_sample_depends_on_seed_and_row_alone(policy):
    """Not on the batch size, the order, or the other prompts."""
    prompts = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14], [15, 16]]
    tokenizer = type("", (), {"eos_token_id": 2})
    expected = generate_responses(policy, tokenizer, prompts, Decoding(12), 5, seed=3)
    for batch_size in (1, 2, 3):
        assert generate_responses(policy, tokenizer, prompts, Decoding(12), batch_size, seed=3) == expected
    some = [4, 1, 2]
    found = generate_responses(policy, tokenizer, [prompts[row] for row in some], Decoding(12), 2, seed=3, rows=some)
    assert found == [expected[row] for row in some]
    assert len({tuple(response) for response in expected}) == 5


def test_rows_that_end_leave_the_batch(policy):
    """With an end-of-sequence token that is drawn now and then, each row is as if it had been alone."""
    prompts = [[number, number + 1] for number in range(20, 36)]
    draws = row_draws(7, range(16), 24)
    alone = [sample(policy, [prompt], Decoding(24), draws[row : row + 1], ends=())[0] for row, prompt in enumerate(prompts)]
    eos = alone[3][5]
    expected = [response[: response.index(eos) + 1] if eos in response else response for response in alone]
    assert len({len(response) for response in expected}) > 2
    sizes = []
    handle = policy.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    assert sample(policy, prompts, Decoding(24), draws, ends={eos}) == expected
    handle.remove()
    assert sizes[0] == 16 and sizes[-1] < 16 and sizes == sorted(sizes, reverse=True)


def test_others_take_the_places_of_rows_that_have_ended(policy):
    """Prompts of many lengths, three at a time: each as if it had been alone, said as soon as it is over, and the batch stays full."""
    prompts = [[20 + number] * (1 + number % 6) for number in range(12)]
    draws = row_draws(7, range(12), 24)
    alone = [sample(policy, [prompt], Decoding(24), draws[row : row + 1], ends=())[0] for row, prompt in enumerate(prompts)]
    ends = {alone[3][5], alone[8][2], alone[0][7]}
    over = [next((place + 1 for place, token in enumerate(response) if token in ends), 24) for response in alone]
    assert len(set(over)) > 4
    sizes, told = [], []
    handle = policy.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True)
    found = sample(policy, prompts, Decoding(24), draws, ends, at_a_time=3, finished=lambda place, response: told.append((place, response)))
    handle.remove()
    assert found == [response[:length] for response, length in zip(alone, over)]
    assert sorted(told) == list(enumerate(found)) and [place for place, _ in told] != sorted(range(12))
    steps = [rows for rows, tokens in sizes if tokens == 1]
    assert max(steps) == 3 and len(steps) < sum(over) / 2


def test_the_same_prompt_is_read_once(policy):
    prompts, draws = [[5, 6, 7, 8]] * 6 + [[9, 10, 11, 12]] * 2, row_draws(7, range(8), 5)
    alone = [sample(policy, [prompt], Decoding(5), draws[row : row + 1], ends=())[0] for row, prompt in enumerate(prompts)]
    sizes = []
    handle = policy.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    assert sample(policy, prompts, Decoding(5), draws, ends=()) == alone
    handle.remove()
    assert sizes == [2, 8, 8, 8, 8]


def test_no_row_grows_beyond_the_models_positions():
    """GPT-2 has a weight a position: a row that is over, and whose place nobody takes yet, must not ask for one more."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=12, n_embd=8, n_layer=1, n_head=2)).eval()
    prompts = [[3, 4, 5, 6]] + [[7]] * 30
    draws = row_draws(7, range(31), 8)
    alone = [sample(model, [prompt], Decoding(8), draws[row : row + 1], ends=())[0] for row, prompt in enumerate(prompts)]
    ends = {alone[1][0]}
    expected = [response[: response.index(alone[1][0]) + 1] if alone[1][0] in response else response for response in alone]
    assert sample(model, prompts, Decoding(8), draws, ends, at_a_time=16) == expected


@pytest.mark.parametrize("tokens_at_a_time", [40, 100, 10**6])
def test_what_all_prompts_begin_with_is_read_once(tiny_model, monkeypatch, tokens_at_a_time):
    """And the rest in passes of a few tokens on a CPU, whose rows then lie in one batch: each response is that of its prompt alone."""
    monkeypatch.setattr("parts.cpu_speed.TOKENS", tokens_at_a_time)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    read = []
    model.get_input_embeddings().register_forward_hook(lambda layer, given, found: read.append(given[0].numel()))
    start = list(range(10, 40))
    prompts = [start + own for own in ([50, 51, 52, 53, 54, 55, 56], [60], [70, 71, 72], [70, 71], [80, 81], [70, 71])]
    draws = row_draws(3, range(6), 9)
    together = sample(model, prompts, Decoding(9), draws, ends={2})
    first = read.index(5 if 5 in read else 6)  # the first step after the prompts
    assert sum(read[:first]) < 30 + 5 * 7 + 1  # the start once, and at most the longest rest of the five different prompts
    assert together == [sample(model, [prompt], Decoding(9), draws[row : row + 1], ends={2})[0] for row, prompt in enumerate(prompts)]


def test_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.0, 0.3, 0.2]]))
    draws = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999999], dtype=torch.float64)
    assert Decoding(1).choose(logits.expand(6, 4), draws).tolist() == [0, 0, 2, 2, 3, 3]
    many = torch.rand(8, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()  # of more than one block
    many[:, 250:600], many[:, 999] = 0, 0  # a whole block, and parts of its neighbours and of the last one, that no number falls into
    numbers = torch.cat([torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64), torch.rand(6, dtype=torch.float64)])
    cumulative = many.double().cumsum(dim=-1)
    expected = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    assert look_up(many, numbers).tolist() == expected.tolist()
    assert Decoding(1, top_k=2).choose(logits.expand(6, 4), draws).tolist() == [0, 0, 0, 2, 2, 2]  # 0.625 and 0.375
    assert Decoding(1, top_p=0.6).choose(logits.expand(6, 4), draws).tolist() == [0, 0, 0, 2, 2, 2]
    assert Decoding(1, temperature=0).choose(logits.expand(6, 4), draws).tolist() == [0] * 6
    squared = Decoding(1, temperature=0.5).choose(logits.expand(6, 4), draws)  # 25, 9 and 4 of 38
    assert squared.tolist() == [0, 0, 0, 2, 2, 3]


def test_lora_is_merged_for_sampling_and_comes_out_untouched(tiny_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    ids = torch.tensor([[5, 6, 7]])
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        expected, calls = model(ids).logits, []
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
        for module in model.modules():
            if type(module).__name__ == "ModuleDict" and "default" in module:
                module["default"].register_forward_hook(lambda *args: calls.append(1))
        with ready_to_sample(model, 1):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
            assert not calls
        assert torch.equal(model(ids).logits, expected) and calls
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this PyTorch")
def test_linear_layers_through_onednn(monkeypatch):
    """The same product, gradient and packed product as PyTorch's, whatever CPU this is."""
    from parts.cpu_speed import OneDNNLinear, use_onednn

    monkeypatch.setattr("parts.cpu_speed.onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40).requires_grad_(False)
    ours = torch.nn.Linear(24, 40).requires_grad_(False)
    ours.load_state_dict(plain.state_dict())
    assert type(use_onednn(torch.nn.Sequential(ours))[0]) is OneDNNLinear
    x = torch.randn(3, 5, 24)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(one), plain(other))
    (ours(one) ** 2).sum().backward()
    (plain(other) ** 2).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    ours.pack(plain.weight * 2, rows=3)
    torch.testing.assert_close(ours(x), torch.nn.functional.linear(x, plain.weight * 2, plain.bias))
    ours.unpack()
    ours.weight.requires_grad_()  # a layer that is trained computes as ever
    ours(x).sum().backward()
    assert ours.weight.grad is not None


def test_draws_depend_on_seed_stream_row_and_sample():
    names = [f"design_{number % 7}_step_{number}" for number in range(300)]
    for name in names:
        assert not torch.equal(row_draws(7, [3], 8, name), row_draws(42, [3], 8, name))
    keys = {
        tuple(draw_key(seed, name, row, sample).tolist())
        for seed in (7, 42)
        for name in ["", *names]
        for row in (0, 1)
        for sample in (0, 1)
    }
    assert len(keys) == 2 * 301 * 2 * 2
    assert draw_key(42, "", 5).tolist() == [42, 5] and draw_key(42, "", 5).dtype == np.uint64
    assert draw_key(42, "full_step_4", 5, 1).tolist() == [0xEE721E7E0000002A, 0x0000000100000005]
    ours = row_draws(7, [0, 1], 8, "full_step_4")
    assert not torch.equal(ours[0], ours[1])
    assert not torch.equal(ours, row_draws(7, [0, 1], 8, "full_step_8"))
    assert not torch.equal(ours, row_draws(7, [0, 1], 8, "full_step_4", sample=1))
    assert torch.equal(row_draws(7, [1], 3), row_draws(7, [0, 1], 8)[1:, :3])
    assert row_draws(42, [5], 2)[0].tolist() == pytest.approx([0.299843896448, 0.538471096058], abs=1e-11)
    assert row_draws(42, [5], 2, "full_step_4", 1)[0].tolist() == pytest.approx([0.425117394682, 0.472505954325], abs=1e-11)
    seeds = {row_seed(seed, name, row) for seed in (7, 42) for name in names for row in (0, 1)}
    assert len(seeds) == 2 * 300 * 2 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_output_head_sees_contiguous_inputs(policy, tiny_model):
    """PyTorch's linear copies the weights once a row for others."""
    tokenizer = load_tokenizer(str(tiny_model))
    seen = []
    head = policy.get_output_embeddings()
    # Registered first, it would see what comes before our hook: a forward hook sees what the head computes with.
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, inputs[0].is_contiguous())))
    generate_responses(policy, tokenizer, [[5, 6, 7], [8, 9], [10]], Decoding(4), 3, seed=1)
    handle.remove()
    assert seen[0] == ((3, 1, 32), True) and all(contiguous for _, contiguous in seen)
    assert not head._forward_pre_hooks
