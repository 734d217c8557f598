"""Policies other than LoRA on whole weights: all weights trained, and LoRA on weights in 8 or 4 bits."""

from __future__ import annotations

import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import ROWS, run_script
from test_pipeline import ppo_words
from test_ppo_trainer import rollouts, trained_weights
from trl import PPOTrainer

from parts.errors import InputError
from parts.files import read_json
from run_ppo import PPOSettings

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def wide_model(tiny_model, tmp_path_factory):
    """As the tiny model, 64 wide: 4-bit weights come in blocks of 64."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=2, pad_token_id=2, bos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make(cls, model, **more):
    """A trainer as `run_ppo.py` makes it, with LoRA that acts."""
    from parts.models import load_tokenizer
    from parts.ppo_setup import load_policy, optimizer_setup, ppo_config
    from parts.processes import join_processes

    settings = PPOSettings(model_name=str(model), log_with="none", batch_size=8, mini_batch_size=4, gradient_accumulation_steps=1,
                           ppo_epochs=2, learning_rate=1e-3, use_optimizer_setup=True, overall_steps=6, **more)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = load_policy(settings, join_processes(4, 1))
        torch.manual_seed(1)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        return cls(ppo_config(settings), policy, tokenizer=load_tokenizer(str(model)), **optimizer_setup(settings, policy, 1))


def step(trainer, number: int):
    np.random.seed(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trainer.step(*rollouts(number))


# -------------------------------------------------------------------------------------------------------- all weights


def test_a_run_of_all_weights_resumes_bit_for_bit(tiny_model, tmp_path):
    from parts.ppo_checkpoints import fault
    from parts.ppo_state import load, save
    from parts.ppo_trainer import FastPPOTrainer

    one, other = (make(FastPPOTrainer, tiny_model, use_peft=False) for _ in range(2))
    assert step(one, 0)["objective/kl"] == 0.0  # against a copy of itself
    record = {"step": 1, "processes": 1, "settings": {"use_peft": False, "model_name": "m", "exp_name": "e", "reward_function": [],
              "reward_model_name": [], "dataset_path": "d", "chat_template_name": "t"}, "design": "LI", "commit": "c",
              "reward_source": {}, "data": {}, "start": {}}  # fmt: skip
    save(one, tmp_path / "run_step_1", record, None)
    assert fault(tmp_path / "run_step_1") is None
    assert load(other, tmp_path / "run_step_1")["step"] == 1
    found = [step(trainer, 1) for trainer in (one, other)]
    assert found[0]["objective/kl"] == found[1]["objective/kl"] != 0.0
    assert all(torch.equal(weight, trained_weights(one)[name]) for name, weight in trained_weights(other).items())
    assert all(not weight.requires_grad for weight in one.ref_model.parameters())
    (tmp_path / "run_step_1" / "model.safetensors").write_bytes(b"cut short")
    assert "model.safetensors" in fault(tmp_path / "run_step_1")


def test_all_weights_from_ppo_to_monotonicity(tiny_model, tiny_gold, tmp_path, eval_file):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    words = ppo_words(tiny_model, tmp_path / "rows.json", tmp_path / "full", use_peft="false", save_freq=1, overall_steps=2)
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "full_step_2"
    assert not (folder / "adapter_config.json").exists()
    assert "All weights of" in (folder / "README.md").read_text(encoding="utf-8")
    start, end = (AutoModelForCausalLM.from_pretrained(tmp_path / f"full_step_{step}") for step in (0, 2))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert all(torch.equal(weight, start.get_parameter(name)) for name, weight in base.named_parameters())
    assert not any(torch.equal(weight, end.get_parameter(name)) for name, weight in base.named_parameters())

    done = run_script("evaluation.py", f"--base_model_name={tiny_model}", "--peft_model_name", f"{tmp_path}/full_step_*",
                      f"--data_path={eval_file}", "--max_new_tokens=6", "--temperature=0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "alpaca-eval-full_step_2.json").read_text(encoding="utf-8"))
    for row in rows:
        messages = [{"role": "user", "content": row["instruction"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        alone = end.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert row["output"] == tokenizer.decode(alone, skip_special_tokens=True).strip()
    assert read_json(folder / "alpaca-eval-full_step_2.meta.json")["template"] == "tokenizer"
    done = run_script("eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix=full", "--include_start=true",
                      f"--gold_model={tiny_gold}")  # fmt: skip
    assert done.returncode == 0 and "full_monotonicity" in done.stdout, done.stderr


def test_what_makes_no_sense_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(InputError, match="--use_peft=false trains all weights, expected them whole, not --load_in_8bit"):
        PPOSettings(model_name="m", use_peft=False, load_in_8bit=True)
    with pytest.raises(InputError, match="--use_peft=false with --bf16: small updates would be rounded away"):
        PPOSettings(model_name="m", use_peft=False, bf16=True)
    with pytest.raises(InputError, match="--load_in_8bit and --load_in_4bit are both set"):
        PPOSettings(model_name="m", load_in_4bit=True, load_in_8bit=True)
    for more in ({"use_peft": False}, {"load_in_4bit": True}):
        with pytest.raises(InputError, match="--rollout_engine vllm draws with LoRA on whole weights"):
            PPOSettings(model_name="m", rollout_engine="vllm", **more)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="--load_in_8bit and --load_in_4bit under DeepSpeed"):
        PPOSettings(model_name="m", load_in_4bit=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="need bitsandbytes, which is not installed: pip install -r requirements/quantized.txt"):
        PPOSettings(model_name="m", load_in_4bit=True)

    from merge_adapter import MergeSettings, check

    folder = tmp_path / "full_step_1"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "training_record.json").write_text('{"settings": {"use_peft": false}}', encoding="utf-8")
    with pytest.raises(InputError, match="all of a model's weights already, expected an adapter to merge"):
        settings = MergeSettings(output_dir=str(tmp_path / "merged"))
        settings.adapter = [str(folder)]
        check(settings)


# --------------------------------------------------------------------------------------------------------- fewer bits


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_step_as_trl_has_it(wide_model, bits):
    from parts.ppo_trainer import FastPPOTrainer

    theirs, ours = (make(cls, wide_model, **{f"load_in_{bits}bit": True}) for cls in (PPOTrainer, FastPPOTrainer))
    kinds = {type(module).__name__ for module in ours.model.modules()}
    assert {8: "Linear8bitLt", 4: "Linear4bit"}[bits] in kinds
    for number in range(2):
        expected, found = step(theirs, number), step(ours, number)
        for name in ("objective/kl", "ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy", "ppo/policy/approxkl"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert found["ppo/policy/approxkl"] > 1e-5  # gradients went through the quantised layers
    for name, weight in trained_weights(theirs).items():
        torch.testing.assert_close(trained_weights(ours)[name], weight, rtol=0, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_through_quantised_weights_after_sampling(wide_model, bits):
    """Those of the same numbers in plain layers, with LoRA below and above; a row's log-probabilities are its own in any batch."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from parts.ppo_policy import base_model
    from parts.ppo_trainer import FastPPOTrainer

    trainer = make(FastPPOTrainer, wide_model, **{f"load_in_{bits}bit": True})
    trainer.generate([torch.tensor([5, 6, 7])], batch_size=1, return_prompt=False, max_new_tokens=3, do_sample=True)
    model = base_model(trainer.accelerator.unwrap_model(trainer.model))
    ids = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[:1], model(input_ids=ids[:1]).logits)
    gradients = []
    for plain in (False, True):
        for layer in list(model.modules()) if plain else ():
            for name, child in list(layer.named_children()):
                if isinstance(child, Linear4bit | Linear8bitLt):
                    if bits == 4:
                        weight = dequantize_4bit(child.weight.data, child.weight.quant_state)
                    else:
                        weight = child.state.CB * child.state.SCB[:, None] / 127
                    setattr(layer, name, torch.nn.Linear(*weight.shape[::-1], bias=False))
                    getattr(layer, name).weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        trainer.model.zero_grad()
        model(input_ids=ids).logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})
    assert len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        error = (gradient - gradients[1][name]).norm() / gradients[1][name].norm()
        assert error < 1e-4, (name, float(error))
