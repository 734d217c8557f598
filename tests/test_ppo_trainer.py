"""`FastPPOTrainer` against the installed TRL, live: same statistics, same weights, step after step."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from parts.models import load_tokenizer
from parts.ppo_trainer import FastPPOTrainer

BATCH = 8
ARRAYS = ("objective/logprobs", "objective/ref_logprobs", "ppo/policy/advantages", "ppo/policy/ratio")


def make_trainer(cls, tiny_model, padding_side="left", **settings):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model))
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=lora)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)  # a policy that is not its reference
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.padding_side = padding_side
    config = PPOConfig(**{"batch_size": BATCH, "mini_batch_size": 2, "gradient_accumulation_steps": 1, "ppo_epochs": 2,
                          "learning_rate": 2e-4, "use_score_scaling": True, "use_score_norm": True, "score_clip": 10.0, **settings})  # fmt: skip
    return cls(config, policy, ref_model=None, tokenizer=tokenizer)


def rollouts(step: int):
    """Queries of 3 to 12 tokens and responses of 1 to 16, with scores; the same for every trainer."""
    draw = torch.Generator().manual_seed(step)
    lengths = [1, 16, *torch.randint(2, 16, (BATCH - 2,), generator=draw).tolist()]
    queries = [torch.randint(3, 300, (int(torch.randint(3, 13, (1,), generator=draw)),), generator=draw) for _ in range(BATCH)]
    responses = [torch.randint(3, 300, (length,), generator=draw) for length in lengths]
    return queries, responses, list(torch.randn(BATCH, generator=draw))


def trained_weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def compare(stock, fast, steps=3, masks=None):
    for step in range(steps):
        results = []
        kl = fast.kl(*([tokens.tolist() for tokens in column] for column in rollouts(step)[:2]))
        for trainer in (stock, fast):
            np.random.seed(step)
            queries, responses, scores = rollouts(step)
            given = None if masks is None else [mask[: len(response)] for mask, response in zip(masks, responses)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(trainer.step(queries, responses, scores, given))
        theirs, ours = results
        assert masks or np.mean(kl) == pytest.approx(float(theirs["objective/kl"]), rel=1e-4, abs=1e-5)
        missing = {name for name in theirs if name not in ours}
        assert missing == set()
        for name, value in theirs.items():
            if name.startswith("time/") or name in ARRAYS:
                continue
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5, err_msg=f"step {step}: {name}")
        assert stock.kl_ctl.value == pytest.approx(fast.kl_ctl.value, rel=1e-6)
        if masks is None:
            compare_arrays(theirs, ours, queries, responses, stock.tokenizer.padding_side)
        weights = trained_weights(stock)
        for name, weight in trained_weights(fast).items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def compare_arrays(theirs, ours, queries, responses, padding_side):
    """Theirs cover prompts and padding too; ours the response tokens, up to the last column."""
    for name in ("objective/logprobs", "objective/ref_logprobs"):
        assert ours[name].shape == (BATCH, 16)
        for row, (query, response) in enumerate(zip(queries, responses)):
            start = theirs[name].shape[1] - len(response) if padding_side == "left" else len(query) - 1
            expected = theirs[name][row, start : start + len(response)]
            np.testing.assert_allclose(ours[name][row, -len(response) :], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_score_scaling": False, "use_score_norm": False, "score_clip": None},
        {"use_score_norm": False, "score_clip": 0.5},
        {"adap_kl_ctrl": False, "init_kl_coef": 0.1},
        {"target": 0.1, "horizon": 20},
        {"gradient_accumulation_steps": 4},
        {"mini_batch_size": 8},
        {"mini_batch_size": 1, "gradient_accumulation_steps": 8},
        {"padding_side": "right"},
        {"early_stopping": True, "target_kl": 1e-4},
        {"kl_penalty": "abs", "whiten_rewards": True, "gamma": 0.9, "lam": 0.8},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()) or "defaults",
)
def test_same_numbers_as_trl(tiny_model, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock, fast = (make_trainer(cls, tiny_model, **settings) for cls in (PPOTrainer, FastPPOTrainer))
    compare(stock, fast)


def test_same_numbers_with_response_masks(tiny_model):
    stock, fast = (make_trainer(cls, tiny_model) for cls in (PPOTrainer, FastPPOTrainer))
    masks = [torch.tensor([1] * 1 + [0, 1] * 8)] * BATCH
    compare(stock, fast, masks=masks)


@pytest.mark.parametrize("head", ["tied", "own", "scaled", "frozen"])
def test_same_numbers_without_peft(tiny_model, monkeypatch, head):
    """The whole model is trained, its output head too, against a copy of itself; in chunks of some tokens."""
    from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

    monkeypatch.setattr("parts.logprobs.LOGITS_PER_CHUNK", 3 * 400)

    def make(cls):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(str(tiny_model), tie_word_embeddings=head in ("tied", "frozen"))
        if head == "scaled":  # what stands between states and logits is more than a product
            model = GraniteForCausalLM(GraniteConfig(**{**model.config.to_dict(), "logits_scaling": 4.0, "attention_multiplier": 0.3}))
        model.get_output_embeddings().requires_grad_(head != "frozen")
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(model)
        config = PPOConfig(batch_size=BATCH, mini_batch_size=4, ppo_epochs=1, learning_rate=5e-5)
        return cls(config, policy, ref_model=None, tokenizer=load_tokenizer(str(tiny_model)))

    compare(make(PPOTrainer), make(FastPPOTrainer), steps=2)


def test_scores_normalised_by_query_type(tiny_model):
    """Each type by its own running moments: literal values, and TRL's own moments of the rows of that type alone."""
    from trl.trainer import RunningMoments

    trainer = make_trainer(FastPPOTrainer, tiny_model, score_clip=1.2)

    def scale(*scores: float, qtypes: list[str]) -> torch.Tensor:
        return trainer._scaled(torch.tensor(scores, device=trainer.current_device), qtypes).cpu()

    scaled = scale(1.0, 10.0, 3.0, 30.0, qtypes=["OPENENDED", "CONSTRAINED"] * 2)
    half = 0.5**0.5  # means 2 and 20, deviations of two scores 2 ** 0.5 and 200 ** 0.5
    torch.testing.assert_close(scaled, torch.tensor([-half, -half, half, half]))
    scaled = scale(8.0, 4.0, qtypes=["OPENENDED", "OPENENDED"])  # of 1, 3, 8 and 4: mean 4, variance 26 / 3
    torch.testing.assert_close(scaled, torch.tensor([1.2, 0.0]))  # 4 / 2.94 is clipped
    assert float(trainer.running_by_qtype["CONSTRAINED"].mean) == 20 and trainer.running.count < 1

    trainer = make_trainer(FastPPOTrainer, tiny_model)
    qtypes = ["CONSTRAINED"] + ["OPENENDED"] * (BATCH - 1)
    stats = [trainer.step(*rollouts(step), qtypes=qtypes) for step in (0, 1)]
    theirs = RunningMoments(trainer.accelerator)
    for step in (0, 1):
        theirs.update(torch.stack(rollouts(step)[2][1:]))
        assert stats[step]["ppo/running_mean/OPENENDED"] == float(theirs.mean)
        assert stats[step]["ppo/running_std/OPENENDED"] == float(theirs.std)
    assert np.isfinite(stats[0]["ppo/mean_scores"])  # one score of a type has no deviation yet
    with pytest.raises(ValueError, match=r"unknown query types \{None\}, expected OPENENDED or CONSTRAINED"):
        trainer.step(*rollouts(2), qtypes=[None] * BATCH)


def test_one_query_type_is_as_none(tiny_model):
    plain, typed = (make_trainer(FastPPOTrainer, tiny_model) for _ in range(2))
    for step in range(2):
        for trainer, qtypes in ((plain, None), (typed, ["OPENENDED"] * BATCH)):
            np.random.seed(step)
            trainer.step(*rollouts(step), qtypes=qtypes)
    assert all(torch.equal(weight, trained_weights(plain)[name]) for name, weight in trained_weights(typed).items())


def test_a_loss_that_is_not_finite_leaves_the_weights(tiny_model):
    trainer = make_trainer(FastPPOTrainer, tiny_model, score_clip=None, use_score_scaling=False, use_score_norm=False)
    before = trained_weights(trainer)
    queries, responses, scores = rollouts(0)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        trainer.step(queries, responses, [torch.tensor(float("nan")), *scores[1:]])
    assert all(torch.equal(weight, before[name]) for name, weight in trained_weights(trainer).items())


def test_skipped_mini_batches_are_counted(tiny_model):
    trainer = make_trainer(FastPPOTrainer, tiny_model, ratio_threshold=0.5)
    before = trained_weights(trainer)
    with pytest.warns(UserWarning, match="the mean ratio of a mini batch is 1.00, above 0.5: skipped"):
        stats = trainer.step(*rollouts(0))
    assert stats["ppo/skipped_minibatches"] == BATCH / 2 * 2
    assert all(torch.equal(weight, before[name]) for name, weight in trained_weights(trainer).items())


def test_gradients_are_clipped_on_every_step(tiny_model, monkeypatch):
    trainer = make_trainer(FastPPOTrainer, tiny_model, max_grad_norm=1e-3, ppo_epochs=1)
    norms = []

    def clip(parameters, limit):
        parameters = list(parameters)
        norms.append(len(parameters))
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", clip)
    trainer.step(*rollouts(0))
    assert norms == [10] * 4  # eight LoRA matrices and the value head's two, at each of four optimiser steps


def test_the_end_of_a_data_loader_does_not_cut_accumulation_short(tiny_model):
    trainer = make_trainer(FastPPOTrainer, tiny_model, gradient_accumulation_steps=4, ppo_epochs=1)
    loader = trainer.accelerator.prepare(torch.utils.data.DataLoader(list(range(4)), batch_size=2))
    updates = []
    original = trainer.optimizer.step

    def counted():
        updates.append(trainer.accelerator.sync_gradients)
        original()

    trainer.optimizer.step = counted
    for _ in loader:  # the second batch is the loader's last
        trainer.step(*rollouts(0))
    assert sum(updates) == 2 and len(updates) == 8


def test_a_trained_output_head_is_refused(tiny_model):
    from peft import LoraConfig

    from parts.errors import InputError

    policy = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(tiny_model), peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with pytest.raises(InputError, match="policy's output head is among the trained modules"):
        FastPPOTrainer(PPOConfig(batch_size=2, mini_batch_size=1), policy, tokenizer=load_tokenizer(str(tiny_model)))


def test_the_policy_stays_in_eval_mode_and_layers_checkpoint_only_with_gradients(tiny_model):
    from transformers.modeling_layers import GradientCheckpointingLayer

    trainer = make_trainer(FastPPOTrainer, tiny_model, gradient_checkpointing=True, ppo_epochs=1)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    seen = {True: [], False: []}
    runs = []
    for layer in layers:
        checkpointing = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda run, *args, own=checkpointing: runs.append(1) or own(run, *args)
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, layer=layer: seen[torch.is_grad_enabled()].append(layer.training or module.training)
        )
    trainer.step(*rollouts(0))
    trainer.generate([torch.tensor([5, 6])], batch_size=1, return_prompt=False, max_new_tokens=3, do_sample=True)
    assert len(runs) == len(layers) * BATCH / 2  # in every mini batch, and nowhere else
    assert seen[True] and not any(seen[True]) and seen[False] and not any(seen[False])


def test_generate_draws_from_the_global_generator_and_knows_trls_options(tiny_model):
    trainer = make_trainer(FastPPOTrainer, tiny_model)
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(trainer.generate(queries, batch_size=2, return_prompt=False, max_new_tokens=9, do_sample=True))
    assert all(torch.equal(*pair) for pair in zip(found[0], found[1]))
    assert not all(len(one) == len(other) and torch.equal(one, other) for one, other in zip(found[0], found[2]))
    greedy = trainer.generate(queries, batch_size=1, max_new_tokens=5)
    theirs = PPOTrainer.generate(trainer, queries, batch_size=1, max_new_tokens=5, eos_token_id=2, pad_token_id=2)
    assert [row.tolist() for row in greedy] == [row.tolist() for row in theirs]  # both with their prompts
    assert len(trainer.generate(queries[0].to(trainer.current_device), max_new_tokens=2, pad_token_id=2)[0]) == 5  # one query: TRL's own
