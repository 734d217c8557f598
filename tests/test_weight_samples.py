"""Whether two names mean the same model, and adapters that are put on another base than their own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from parts.errors import InputError
from parts.files import read_json
from parts.weight_samples import VALUES, is_same_sample, require_base, weight_sample


@pytest.fixture(scope="module")
def copies(tiny_model, tmp_path_factory):
    """The tiny model in bf16, in fp16, in two files; and one of other weights."""
    folder = tmp_path_factory.mktemp("copies")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(folder / "shards", max_shard_size="200KB")
    for name, dtype in (("half", torch.bfloat16), ("float16", torch.float16)):
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(folder / name)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(1.02)
    model.save_pretrained(folder / "other")
    return folder


def test_a_sample_is_of_the_weights_themselves(tiny_model):
    sample, weights = weight_sample(str(tiny_model)), load_file(tiny_model / "model.safetensors")
    assert len(sample) == sum(weight.ndim == 2 and ".layers." in name for name, weight in weights.items()) == 14
    assert sample["1.self_attn.q_proj.weight"] == weights["model.layers.1.self_attn.q_proj.weight"][0, :VALUES].bfloat16().tolist()


@pytest.mark.parametrize(("name", "same"), [("shards", True), ("half", True), ("float16", True), ("other", False)])
def test_copies_are_one_model(tiny_model, copies, name, same):
    assert is_same_sample(weight_sample(str(tiny_model)), weight_sample(str(copies / name))) is same


def test_nothing_in_common_says_nothing(tiny_model, tmp_path):
    assert is_same_sample(weight_sample(str(tiny_model)), {}) and is_same_sample({"0.a.weight": [1.0]}, {"0.b.weight": [2.0]})
    save_file({"embedding": torch.zeros(4, 4), "layers.0.norm": torch.zeros(4)}, tmp_path / "model.safetensors")
    assert weight_sample(str(tmp_path)) == {}


def test_another_base_is_one_line(tiny_model, copies, tmp_path):
    record = {"model": str(tiny_model), "base_sample": weight_sample(str(tiny_model))}
    require_base(tmp_path, record, str(copies / "half"))
    require_base(tmp_path, {}, str(copies / "other"))
    with pytest.raises(InputError, match="trained on .*, whose weights were others than those of .*other$"):
        require_base(tmp_path, record, str(copies / "other"))


def test_a_run_on_a_base_that_has_changed(tiny_model, copies, rows_file, eval_file, tmp_path):
    """What is trained says what it was trained on: no resuming, no rollouts and no merging on other weights of the same name."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    words = [f"--model_name={base}", f"--dataset_path={rows_file}", f"--dev_prompt_path={rows_file}", "--chat_template_name=tokenizer",
             "--log_with=none", "--save_freq=1", "--batch_size=2", "--mini_batch_size=2", "--gradient_accumulation_steps=1", "--ppo_epochs=1",
             "--output_max_length=4", f"--output_dir={tmp_path / 'run'}", "--relevance_scaling=false", "--reward_branching=false"]  # fmt: skip
    done = run_script("run_ppo.py", *words, "--overall_steps=1")
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "run_step_1"
    assert read_json(adapter / "training_record.json")["base_sample"] == json.loads(json.dumps(weight_sample(str(tiny_model))))
    shutil.copy(copies / "other" / "model.safetensors", base / "model.safetensors")
    said = f"error: {adapter}: trained on {base}, whose weights were others than those of {base}\n"
    rollouts = [f"--base_model_name={base}", f"--peft_model_name={adapter}", f"--data_path={eval_file}", "--max_new_tokens=4"]
    for script, more in (("evaluation.py", rollouts), ("merge_adapter.py", [str(adapter), f"--output_dir={tmp_path / 'merged'}"])):
        done = run_script(script, *more)
        assert done.returncode == 2 and done.stderr == said
    done = run_script("run_ppo.py", *words, "--overall_steps=2", "--resume_from_checkpoint=auto")
    assert done.returncode == 2
    assert f"the weights of {base} are others now (--allow_changed_settings=true resumes all the same)" in done.stderr
