"""Where tensors lie: on a pretended GPU the numbers are those of the CPU, and nothing of one is mixed with the other's."""

from __future__ import annotations

import pytest
import torch
from conftest import not_captured
from pretend_gpu import GPU, OnGPU, pretend_gpu
from test_families import BATCH, FAMILIES, TOKENIZER, VOCABULARY, build, policy
from test_gold import starling  # noqa: F401, a fixture
from trl import PPOConfig

from parts import cuda_graphs
from parts.ppo_trainer import FastPPOTrainer
from parts.sampling import Decoding, check_sampling, row_draws, sample

PROMPTS = [[20 + number] * (1 + 2 * number % 7) for number in range(9)]


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", not_captured)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    yield
    assert all(device.index is not None for device in chosen)  # PyTorch refuses one without


def test_what_is_mixed_is_an_error():
    with pretend_gpu():
        table, here = torch.arange(6.0, device="cuda"), torch.arange(6)
        assert isinstance(table, OnGPU) and table.device == GPU and table[here].tolist() == here.tolist()
        assert (table * 2 + torch.tensor(1)).tolist() == [1, 3, 5, 7, 9, 11] and table.new_zeros(2).device == GPU
        assert not isinstance(table.cpu(), OnGPU) and torch.equal(table.cpu(), here.float())

        def put() -> None:
            table.long()[table.long()] = here

        for mixed in (lambda: table + here, lambda: here[table.long()], lambda: torch.cat([table, here.float()]), put):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            table.numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt", "gemma2", "mamba"])
def test_responses_are_drawn(family):
    model, draws = build(family, **FAMILIES[family]), row_draws(0, range(9), 12)
    expected = sample(model, PROMPTS, Decoding(12), draws, {2, 5, 9, 13}, 3)
    with pretend_gpu():
        check_sampling(model.to("cuda"))
        assert sample(model, PROMPTS, Decoding(12), draws, {2, 5, 9, 13}, 3) == expected


def test_the_engine_of_evaluation_draws(tiny_model):
    from parts.generation import HFEngine
    from parts.models import load_tokenizer

    tokenizer, found = load_tokenizer(str(tiny_model)), {}
    for device in ("cpu", "cuda", "cuda:0"):
        with pretend_gpu():
            engine = HFEngine(str(tiny_model), tokenizer, device, 4, dtype="float32")
            engine.generate(None, PROMPTS, Decoding(12), 0, range(9), lambda place, tokens: found.setdefault((device, place), tokens))  # noqa: B023
            assert isinstance(next(engine.model.parameters()), OnGPU) == (device != "cpu")
    for device in ("cuda", "cuda:0"):
        assert [found[device, place] for place in range(9)] == [found["cpu", place] for place in range(9)]


def run_ppo(there: bool) -> tuple[dict, list, list, list]:
    """Statistics of a step, drawn responses, KL, trained weights."""
    from accelerate.state import AcceleratorState, PartialState

    model = policy("llama")
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True).device = GPU if there else torch.device("cpu")
    config = PPOConfig(batch_size=BATCH, mini_batch_size=2, ppo_epochs=2, learning_rate=1e-3, seed=3)
    trainer = FastPPOTrainer(config, model.to("cuda") if there else model, ref_model=None, tokenizer=TOKENIZER)
    draw = torch.Generator().manual_seed(0)
    queries, responses = (
        [torch.randint(4, VOCABULARY, (size,), generator=draw) for size in sizes] for sizes in ((3, 7, 5, 9), (1, 8, 5, 3))
    )
    scores = list(torch.randn(BATCH, generator=draw))
    stats = trainer.step(queries, responses, scores, [torch.ones(len(row)) for row in responses], ["OPENENDED", "CONSTRAINED"] * 2)
    torch.manual_seed(1)
    drawn = trainer.generate(queries, batch_size=2, return_prompt=False, max_new_tokens=9, do_sample=True)
    kl = trainer.kl(*([row.tolist() for row in rows] for rows in (queries, responses)))
    weights = [weight.tolist() for weight in model.parameters() if weight.requires_grad]
    AcceleratorState._reset_state(reset_partial_state=True)
    return stats, [row.tolist() for row in drawn], kl, weights


def test_ppo_steps_draws_and_measures_kl():
    expected = run_ppo(there=False)
    with pretend_gpu():
        stats, drawn, kl, weights = run_ppo(there=True)
    numbers = [name for name, value in expected[0].items() if isinstance(value, float) and not name.startswith("time/")]
    assert len(numbers) > 20 and {name: stats[name] for name in numbers} == pytest.approx(
        {name: expected[0][name] for name in numbers}, abs=1e-4
    )
    assert drawn == expected[1] and kl == pytest.approx(expected[2], abs=1e-5)
    for weight, own in zip(weights, expected[3]):
        torch.testing.assert_close(torch.tensor(weight), torch.tensor(own), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny_gold", "starling"])
def test_a_gold_model_scores(kind, request):
    from parts.gold_models import load_gold_reward_model
    from parts.gold_settings import GoldSettings

    batch = {"query": ["Rain", "Give the plural of goose.", "What is 2 + 3?"], "response": ["falls.", "Geese, of course.", "5"]}
    how = {"batch_size": 2, "settings": GoldSettings(gold_dtype="float32")}
    name = str(request.getfixturevalue(kind))
    expected = load_gold_reward_model(name, device="cpu", **how).get_reward(batch)
    with pretend_gpu():
        there = load_gold_reward_model(name, device="cuda", **how)
        assert isinstance(next(there.model.parameters()), OnGPU) and there.get_reward(batch) == pytest.approx(expected, abs=1e-5)


def test_query_types_are_classified(tiny_model):
    from parts.qtype_classifier import label_logprobs

    model, found = build("llama"), []
    how = ([[5, 6, number] for number in range(9, 14)], [[7], [8, 9]], 2)
    label_logprobs(model, *how, lambda place, values: found.append((place, values)))
    with pretend_gpu():
        there: list = []
        label_logprobs(model.to("cuda"), *how, lambda place, values: there.append((place, values)))
    assert [place for place, _ in there] == [place for place, _ in found]
    assert [value for _, values in there for value in values] == pytest.approx([value for _, values in found for value in values], abs=1e-5)
