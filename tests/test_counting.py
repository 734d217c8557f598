"""What a run on GPUs would take, by counting: literal numbers, and PyTorch's own counter of operations. Nothing is computed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import REPOSITORY, run_script
from torch import nn
from transformers import GPT2Config, LlamaConfig

from parts.counting import Follower, cache_bytes, count, meta_policy, policy_operations, sampling_kernels, torchs_counter, trainer_pass
from parts.errors import InputError
from parts.ppo_policy import predict_or_forward

SETTINGS = SimpleNamespace(lora_r=8, lora_target_modules=["q_proj", "v_proj"])
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}


@pytest.fixture(scope="module")
def llama():
    """LLaMA-7B with two layers in place of 32: every layer counts the same."""
    config = LlamaConfig(**LLAMA_7B, num_hidden_layers=2)
    return meta_policy(config, SETTINGS, "bfloat16").to(torch.bfloat16), config


@pytest.mark.parametrize(
    ("more", "base", "trained"),
    [
        ({**LLAMA_7B, "num_hidden_layers": 32}, 6_738_415_616, 4_194_304 + 4_097),
        ({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
          "vocab_size": 32000}, 68_976_648_192, 16_384_000 + 8_193),
    ],
)  # fmt: skip
def test_parameters_of_published_models(more, base, trained):
    config = LlamaConfig(**more)
    policy = meta_policy(config, SETTINGS, "bfloat16")
    assert (count(policy, trained=False), count(policy, trained=True)) == (base, trained)
    counted = policy_operations(policy, config)
    assert counted.head == config.hidden_size * 32000 and counted.lora == trained - config.hidden_size - 1
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert counted.frozen == base - 2 * counted.head - norms  # embeddings multiply nothing


def test_operations_are_those_of_torchs_counter(llama):
    policy, config = llama
    rows, prompt, response = 3, 5, 7
    counted = policy_operations(policy, config)
    tokens, predicted = rows * (prompt + response), rows * response
    places = torch.zeros(predicted, dtype=torch.long, device="meta")
    inputs = {"input_ids": torch.zeros(rows, prompt + response, dtype=torch.long, device="meta"), "rows": places, "columns": places}
    with torchs_counter() as counter, torch.no_grad():
        predict_or_forward(policy, **inputs)
        with policy.pretrained_model.disable_adapter():
            predict_or_forward(policy, **inputs)
    before, epochs = counted.step(rows, prompt, response, epochs=1)
    assert counter.get_total_flops() == before

    with torchs_counter() as counter:
        logprobs, _, values = predict_or_forward(policy, **inputs)
        (logprobs.sum() + values.sum()).backward()
    # The first layer's query, key and value need no gradient of their input, nor do their LoRA's first factors.
    assert counter.get_total_flops() == epochs - tokens * 2 * (3 * 4096 * 4096 + 2 * 8 * 4096)
    assert counted.step(rows, prompt, response, epochs=3) == (before, 3 * epochs)


def test_memory_of_a_pass(llama):
    """Activations grow with the layers, with checkpointing by a layer's input alone; those of a pass without gradients do not."""
    policy, config = llama
    more = meta_policy(LlamaConfig(**LLAMA_7B, num_hidden_layers=3), SETTINGS, "bfloat16").to(torch.bfloat16)
    kept, recomputed = (
        [trainer_pass(model, 2, 512, 512, trained=True, checkpointing=checkpointing)[0] for model in (policy, more)]
        for checkpointing in (False, True)
    )
    assert recomputed[1] - recomputed[0] == 2 * 1024 * 4096 * 2  # the layer's input in bf16
    assert kept[1] - kept[0] > 15 * (recomputed[1] - recomputed[0])
    without = [trainer_pass(model, 2, 512, 512, trained=False)[0] for model in (policy, more)]
    assert without[0] == without[1] < recomputed[0]
    assert cache_bytes(config) == 2 * 2 * 4096 * 2
    assert sampling_kernels(policy, 4) == sampling_kernels(policy, 400) < sampling_kernels(more, 4)


def test_tensors_are_followed_while_they_live():
    layer = nn.Linear(10, 100, device="meta")
    with torch.no_grad(), Follower(layer) as alive:
        x = torch.zeros(5, 10, device="meta")
        found = layer(x)
        assert (alive.now, alive.peak) == (200 + 2000, 200 + 2000)
        del x
        assert (alive.now, alive.peak) == (2000, 2200)
        view = found.view(-1)
        assert (alive.now, alive.kernels) == (2000, 2)
        del found, view
        assert alive.now == 0
        layer.weight.add_(1)
        assert (alive.now, alive.kernels) == (0, 3)


def test_what_cannot_be_counted_is_refused():
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2)
    settings = SimpleNamespace(lora_r=8, lora_target_modules=["c_attn"])
    with pytest.raises(InputError, match="gpt2: .*c_attn.* is no linear layer's"):
        policy_operations(meta_policy(config, settings, "float32"), config)
    with pytest.raises(InputError, match="llama: cannot be loaded as a policy with LoRA on nothing"):
        meta_policy(LlamaConfig(num_hidden_layers=1), SimpleNamespace(lora_r=8, lora_target_modules=["nothing"]), "float32")


# ----------------------------------------------------------------------------------------------------------------- the script


def test_the_script_counts_a_folder(tiny_model):
    done = run_script("benchmarks/scale.py", f"--model={tiny_model}", f"--gold={tiny_model}", "--gpus", "1", "2", "--gpu_memory=3")
    assert done.returncode == 0, done.stderr
    assert "LoRA and value head 1,825." in done.stdout  # 2 layers of 8 * (32 + 32) and 8 * (32 + 16), and 33
    heads, _, memory, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert heads.endswith("| 1 GPU, ZeRO-2 | 2 GPUs, ZeRO-2 |")
    assert memory == "| **PPO: memory of a GPU, GB** | 3.4, does not fit | 3.4, does not fit |"  # bucket 1, encoder 0.4, other 2
    assert any(row.startswith("| - rollouts |") for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8", "0"], "--gpus is [8, 0], expected numbers of at least 1"),
        (["--output_max_length=128"], "--response_tokens is 256, expected output_max_length = 128 at most"),
        (["--zero_stages", "1"], "--zero_stages is [1], expected 2, 3 or both"),
        (["--model=models/none"], "models/none: no such folder"),
    ],
)
def test_bad_settings_of_the_script(words, message):
    done = run_script("benchmarks/scale.py", *words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_papers_settings_are_the_defaults():
    help_text = run_script("benchmarks/scale.py", "--help").stdout
    paper = yaml.safe_load((REPOSITORY / "configs" / "paper.yaml").read_text(encoding="utf-8"))
    for name in ("batch_size", "mini_batch_size", "ppo_epochs", "max_prompt_length", "output_max_length", "lora_r"):
        text = help_text.split(f"--{name} ")[1].split("\n  --")[0]
        assert " ".join(text.split()).endswith(f"(default: {paper[name]})"), text
