"""What is faster on a CPU changes no result: sampling, scores and a PPO step with it and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, ROWS
from test_ppo_trainer import make_trainer, rollouts, trained_weights

from parts import cpu_speed
from parts.generation import generate_responses
from parts.gold_models import load_gold_reward_model
from parts.models import load_tokenizer
from parts.ppo_trainer import FastPPOTrainer
from parts.relevance import RelevanceModel
from parts.sampling import Decoding

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this PyTorch")
MINILM = REPOSITORY / "models" / "all-MiniLM-L6-v2"
TEXTS = [(row["input"] + " " + row["output"] + " ") * (1 + number) for number, row in enumerate(ROWS)]


@pytest.fixture(params=["policy", "gold", "encoder", "trainer"])
def numbers(request, tiny_model, tiny_gold):
    """What a model computes, as tensors by name, and the model itself."""

    def policy():
        trainer = make_trainer(FastPPOTrainer, tiny_model)
        model = cpu_speed.use_onednn(trainer.model.pretrained_model)
        prompts = [[5 + number % 9] * (1 + number % 7) for number in range(9)]
        drawn = generate_responses(model, load_tokenizer(str(tiny_model)), prompts, Decoding(12), batch_size=9, seed=3)
        return {str(row): torch.tensor(response) for row, response in enumerate(drawn)}, model

    def gold():
        model = load_gold_reward_model(str(tiny_gold), device="cpu")
        return {"rewards": torch.tensor(model.get_reward({"query": TEXTS, "response": TEXTS[::-1]}))}, model.model

    def encoder():
        model = RelevanceModel(str(MINILM), device="cpu")
        return {"embeddings": model.embed(TEXTS)}, model.encoder

    def trainer():
        model = make_trainer(FastPPOTrainer, tiny_model)
        for weight in model.model.pretrained_model.parameters():
            assert weight.requires_grad == any(weight is trained for trained in model.model_params)
        cpu_speed.use_onednn(model.model.pretrained_model)
        np.random.seed(0)
        stats = model.step(*rollouts(0))
        singles = {name: torch.as_tensor(value) for name, value in stats.items() if np.ndim(value) == 0 and not name.startswith("time/")}
        return {**singles, **trained_weights(model)}, model.model

    return {"policy": policy, "gold": gold, "encoder": encoder, "trainer": trainer}[request.param]


def test_same_results_switched_off(numbers, monkeypatch):
    monkeypatch.setattr(cpu_speed, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(cpu_speed, "ROWS", 2)
    monkeypatch.setattr(cpu_speed, "TOKENS", 60)
    fast, fast_model = numbers()
    monkeypatch.setattr(cpu_speed, "ENABLED", False)
    plain, plain_model = numbers()
    kinds = [{type(module) for module in model.modules()} for model in (fast_model, plain_model)]
    assert cpu_speed.OneDNNLinear in kinds[0] and cpu_speed.OneDNNLinear not in kinds[1]
    assert set(fast) == set(plain)
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_limits_are_for_cpus(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (cpu_speed.most_rows(128, cpu), cpu_speed.most_rows(8, cpu), cpu_speed.most_rows(128, gpu)) == (96, 8, 128)
    assert (cpu_speed.most_tokens(16384, cpu), cpu_speed.most_tokens(99, cpu), cpu_speed.most_tokens(16384, gpu)) == (1024, 99, 16384)
    monkeypatch.setattr(cpu_speed, "ENABLED", False)
    assert (cpu_speed.most_rows(128, cpu), cpu_speed.most_tokens(16384, cpu)) == (128, 16384)


def test_attention_of_short_sequences_is_the_same(tiny_model):
    """Plain products in bf16 within bf16's rounding of fp32, and the model's own attention again afterwards."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    exact = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    with cpu_speed.short_sequences(model):
        assert model.config._attn_implementation == "eager"
        plain = model(ids).logits
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(plain.float(), exact, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(("heads", "groups", "size", "value_size"), [(6, 2, 8, 8), (4, 4, 8, 6), (3, 1, 16, 16)])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_to_one_token_is_the_formula(heads, groups, size, value_size, masked):
    """softmax(q k / sqrt(size)) v, row by row and head by head; keys and values are slices of some room, as the cache's are."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 1, size, generator=draw)
    key, value = (torch.randn(3, groups, 9, width, generator=draw)[:, :, :7] for width in (size, value_size))
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[0, ..., :3], mask[1, ..., :6] = False, False
    found, _ = cpu_speed._attention_to_one(None, query, key, value, mask if masked else None)
    assert found.shape == (3, 1, heads, value_size)
    for row in range(3):
        seen = mask[row, 0, 0] if masked else slice(None)
        for head in range(heads):
            group = head // (heads // groups)
            weights = (key[row, group][seen] @ query[row, head, 0] / size**0.5).softmax(dim=0)
            torch.testing.assert_close(found[row, 0, head], weights @ value[row, group][seen])


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 products on this CPU")
def test_half_precision_is_packed_for_sampling_alone(tiny_model):
    """A packed weight is the same numbers in another order: the logits are the same within rounding."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    model = cpu_speed.use_onednn(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).requires_grad_(False))
    layers = [module for module in model.modules() if isinstance(module, cpu_speed.OneDNNLinear)]
    plain = model(ids).logits
    with cpu_speed.one_token_at_a_time(model, 8):
        assert layers and all(layer.packed is not None for layer in layers)
        torch.testing.assert_close(model(ids).logits, plain, rtol=0.01, atol=1e-3)
    assert all(layer.packed is None for layer in layers)
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 products on this CPU")
def test_attention_to_one_token_leaves_what_it_finds(tiny_model):
    """Nested, after an error, and beside somebody else's attention under the same name."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16), ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyError), cpu_speed.attention_to_one(model):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is cpu_speed._attention_to_one
        with cpu_speed.attention_to_one(model):
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is cpu_speed._attention_to_one
        raise KeyError
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping and ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    ALL_ATTENTION_FUNCTIONS["sdpa"] = others = lambda *given: None
    with cpu_speed.attention_to_one(model):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is others
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
