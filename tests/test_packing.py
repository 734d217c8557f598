"""Rows in one sequence have the numbers that they have alone; what a model cannot pack is told at the start."""

from __future__ import annotations

import copy

import pytest
import torch
from test_families import VOCABULARY, build, policy
from torch import nn

from parts import cpu_speed
from parts.batching import pad, shared_start
from parts.packing import _WithinRows, attention_within, can_pack, longest, pack, without_padding

ROWS = [torch.tensor([7, 8, 9, 1, 2]), torch.tensor([7, 8, 9, 5]), torch.tensor([7, 8, 4, 1, 2, 3])]


def test_rows_behind_what_they_share():
    assert [shared_start(ROWS, most) for most in (9, 1)] == [2, 1]
    assert shared_start(ROWS[:2], 9) == 3
    assert shared_start(ROWS[:1], 9) == 0
    packed = pack(ROWS, 2)
    assert packed.input_ids.tolist() == [[7, 8, 9, 1, 2, 9, 5, 4, 1, 2, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 2, 3, 4, 5]]
    assert packed.spans == [(0, 2, 0), (2, 5, 2), (5, 7, 2), (7, 11, 2)]
    assert pack(ROWS, 0).spans == [(0, 5, 0), (5, 9, 0), (9, 15, 0)]


@pytest.mark.parametrize("shared", [0, 2])
def test_attention_is_pytorchs_over_each_row(shared):
    """With four heads on two of keys, and its gradient by queries, keys and values; the shared tokens' is the sum over rows."""
    packed, draw = pack(ROWS, shared), torch.Generator().manual_seed(0)
    tables = [torch.randn(heads, packed.ends[-1], size, generator=draw, dtype=torch.float64) for heads, size in ((4, 8), (2, 8), (2, 6))]
    weights = torch.randn(packed.ends[-1], 4, 6, generator=draw, dtype=torch.float64)
    masks = [torch.full((end - start, before + end - start), -torch.inf).double().triu_(1 + before) for start, end, before in packed.spans]
    ours, theirs = ([table.clone().requires_grad_() for table in tables] for _ in range(2))
    found = _WithinRows.apply(*ours, packed.spans, masks, 0.3)
    (found * weights).sum().backward()
    expected = torch.empty_like(found)
    for start, end, before in packed.spans:
        seen = [*range(before), *range(start, end)]
        query, key, value = (table[:, seen][None] for table in theirs)
        row = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)[0]
        expected[start:end] = row[:, before:].transpose(0, 1)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for own, other in zip(ours, theirs):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "packs"),
    [
        ("llama", True), ("qwen3", True), ("gpt_neox", True), ("gpt2", True), ("phi3", True),
        ("gemma2", False), ("gpt_oss", False),  # caps of scores, sinks
        ("mpt", False), ("falcon", False),  # attention of their own
        ("mamba", False), ("falcon_h1", False), ("lfm2", False), ("bamba", False),  # what passes from token to token besides attention
    ],
)  # fmt: skip
def test_models_that_pack(family, packs, dtype):
    more = {"lfm2": {"layer_types": ["conv", "full_attention"]}, "bamba": {"attn_layer_indices": [1]}, "mpt": {}}.get(family, {})
    assert can_pack(build(family, **more).to(dtype).base_model) is packs


def test_positions_that_are_not_heeded_are_told(monkeypatch):
    model = build("llama").model
    rotary = model.rotary_emb.forward
    model.rotary_emb.forward = lambda states, position_ids: rotary(states, torch.arange(states.shape[1])[None])
    assert not can_pack(model)


def test_rows_beyond_a_window_are_not_packed():
    assert longest(build("mistral", sliding_window=40).model) == 40
    assert longest(build("mistral", sliding_window=None).model) == longest(build("llama").model) == 512


def test_nothing_is_packed_where_it_is_switched_off(monkeypatch):
    monkeypatch.setattr(cpu_speed, "ENABLED", False)
    assert not can_pack(build("llama").model)


def test_attention_is_the_models_own_again_afterwards():
    model = build("llama").model
    with attention_within(model, pack(ROWS, 2)):
        assert model.config._attn_implementation == "within_rows"
    assert model.config._attn_implementation == "sdpa"


def test_a_padded_pass_without_its_padding():
    model = build("llama").model
    rows = [[7, 8, 9, 1, 2], [7, 8], [7, 8, 9, 5], [7, 8]]
    ids, mask = pad(rows, 0)
    with torch.no_grad():
        expected = [model(torch.tensor([row])).last_hidden_state[0] for row in rows]
        with without_padding(model, rows):
            found = model(input_ids=ids, attention_mask=mask).last_hidden_state
        again = model(ids[:1]).last_hidden_state[0]
    assert found.shape == (4, 5, expected[0].shape[1])
    for row, own in zip(found, expected):
        torch.testing.assert_close(row[: len(own)], own, rtol=1e-4, atol=1e-5)
        assert not row[len(own) :].any()
    torch.testing.assert_close(again, expected[0])


# ------------------------------------------------------------------------------------------------------------ norms and LoRA


def states_and_gradients(wrapped) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    wrapped.zero_grad()
    states = wrapped.pretrained_model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state
    states.float().square().sum().backward()
    return {"states": states} | {name: weight.grad.clone() for name, weight in wrapped.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("qwen3", 9), ("gemma", 0)])
def test_fewer_kernels_give_the_same_gradients(family, norms):
    """Those of PEFT and transformers, after the weights changed too; what is saved stays as it was."""
    plain, fast = policy(family), policy(family)
    cpu_speed.fewer_kernels(fast)
    swapped = [type(module).__name__ for module in fast.modules() if "forward" in vars(module)]
    assert sum(name.endswith("RMSNorm") for name in swapped) == norms and swapped.count("Linear") == 4
    assert sum(name.endswith("MLP") for name in swapped) == 2
    assert list(fast.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        expected, found = states_and_gradients(plain), states_and_gradients(fast)
        assert set(found) == set(expected) and len(found) == 9
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        for one in (plain, fast):
            for name, weight in one.named_parameters():
                weight.data.mul_(1.5 if "norm" in name or "lora" in name else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_layer_keeps_two_tables_for_the_same_gradients(dtype):
    """To the bit; transformers' own keeps a third, the activation."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    torch.manual_seed(0)
    plain = LlamaMLP(LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=1)).to(dtype).requires_grad_(False)
    fast = cpu_speed.fewer_kernels(copy.deepcopy(plain))
    found = []
    for layer in (plain, fast):
        x, kept = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda table, kept=kept: kept.setdefault(table.data_ptr(), table), lambda table: table
        ):
            states = layer(x)
        states.float().square().sum().backward()
        found.append((states, x.grad, [tuple(table.shape) for table in kept.values()].count((3, 5, 10))))
    (states, gradient, tables), (own_states, own_gradient, own_tables) = found
    assert torch.equal(own_states, states) and torch.equal(own_gradient, gradient)
    assert (tables, own_tables) == (3, 2)


def test_layers_that_are_gated_otherwise_stay_as_they_are():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    class Doubled(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class Learned(nn.SiLU):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.ones(1))

    config = LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=1)
    trained = LlamaMLP(config)
    trained.act_fn = Learned()
    for layer in (Doubled(config), trained):
        assert "forward" not in vars(cpu_speed.fewer_kernels(layer))


def test_an_adapter_that_is_off_stays_off():
    wrapped = policy("llama")
    model, ids = wrapped.pretrained_model, torch.tensor([[5, 6, 7]])
    with model.disable_adapter():
        expected = model(ids).logits
    cpu_speed.fewer_kernels(wrapped)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
