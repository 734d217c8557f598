"""Where a newcomer stumbles: hints instead of riddles, help in groups, models merged by one command."""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_script

from eval_monotonicity import MonotonicitySettings, choose_checkpoints
from parts.errors import InputError
from parts.files import file_digest
from parts.rank_statistics import correlations
from parts.report import describe
from parts.runs import without_records
from run_ppo import PPOSettings


def test_help_has_groups_and_each_flag_once():
    shown = run_script("run_ppo.py", "--help").stdout
    for heading in ("the proxy reward:", "another reward:", "the model:", "files:", "PPO:", "LoRA:", "KL:"):
        assert f"\n{heading}\n" in shown
    assert "LI is the length incentive, RP the repetition penalty" in shown
    for field in fields(PPOSettings):
        assert sum(line.split()[:1] == [f"--{field.name}"] for line in shown.splitlines()) == 1, field.name
    assert shown.splitlines()[0] == "usage: run_ppo.py [--setting=value ...]"


@pytest.mark.parametrize(
    "script", ["run_ppo", "evaluation", "eval_monotonicity", "reward_model", "train_gold_rm", "train_sft", "merge_adapter"]
)
def test_help_imports_nothing_heavy(script):
    """No clock: what takes its time is not imported."""
    code = f"import sys; sys.argv = ['{script}.py', '--help']; import runpy\ntry: runpy.run_path('{script}.py', run_name='__main__')\nexcept SystemExit: pass\n"
    code += (
        "print('HEAVY', sorted({'torch', 'transformers', 'nltk', 'scipy.stats', 'sklearn', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout[-200:] + done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--output_dri=x"], "unrecognized arguments: --output_dri=x, did you mean --output_dir?"),
        (["--learning-rat", "1"], "did you mean --learning-rate?"),
        (["--reward_weights", "1"], "--reward_weights are for --reward_function, which is missing"),
    ],
)
def test_misspelt_flags(words, told):
    done = run_script("run_ppo.py", "--model_name=m", *words)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_script_imports(name):
    code = "import os, signal, sys; sys.modules['__main__'].__file__ = 'run_ppo.py'; import parts; os.kill(os.getpid(), signal.{})"
    done = subprocess.run([sys.executable, "-c", code.format(name)], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + getattr(signal, name), "\ninterrupted: nothing was begun\n")
    done = subprocess.run(
        [sys.executable, "-c", code.format(name).replace("run_ppo.py", "/else/where.py")], cwd=REPOSITORY, capture_output=True
    )
    assert done.returncode == -getattr(signal, name)  # whoever imports parts keeps what is theirs


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_a_library_turns_into_another_exception(name):
    code = f"""
import os, signal
from parts.errors import run_main
def main():
    try:
        os.kill(os.getpid(), signal.{name})
    except KeyboardInterrupt as error:
        raise TypeError("a library's own") from error
run_main(main)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + getattr(signal, name), "\ninterrupted: what was finished is kept\n")


@pytest.mark.parametrize("script", [*REPOSITORY.glob("*.py"), *(REPOSITORY / "data").glob("*.py")], ids=lambda path: path.name)
def test_scripts_import_what_catches_signals_first(script):
    """(`reward_model.py` is part of what scores depend on: a line there would have all of them made again.)"""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    names = [node.names[0].name for node in tree.body if isinstance(node, ast.Import)]
    assert [name for name in names if name not in ("os", "sys")][:1] == ["parts"] or script.name == "reward_model.py"


def rollouts(folder, step: int) -> None:
    path = folder / f"run_step_{step}" / f"alpaca-eval-run_step_{step}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"instruction": "a", "output": str(step)}]), encoding="utf-8")


def test_too_few_checkpoints_and_the_start(tmp_path):
    for step in (0, 1, 2):
        rollouts(tmp_path, step)
    with pytest.raises(InputError, match=r"2 checkpoints of run .* \(--include_start=true counts step 0, which has rollouts\)"):
        choose_checkpoints(MonotonicitySettings(output_dir=str(tmp_path), model_prefix=["run"]), "run")
    assert len(choose_checkpoints(MonotonicitySettings(output_dir=str(tmp_path), model_prefix=["run"], include_start=True), "run")) == 3
    shutil.rmtree(tmp_path / "run_step_0")
    with pytest.raises(InputError, match="expected at least 3 for a correlation$"):
        choose_checkpoints(MonotonicitySettings(output_dir=str(tmp_path), model_prefix=["run"]), "run")


def test_a_pattern_s_records_are_left_out():
    assert without_records(["a.json", "a.meta.json", "b.json"]) == ["a.json", "b.json"]
    assert without_records(["a.meta.json"]) == ["a.meta.json"]  # then its own error says what it is


def test_the_default_gold_is_named(tmp_path):
    for step in (1, 2, 3):
        rollouts(tmp_path, step)
    done = run_script(
        "eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix=run", "--relevance_scaling=false", "--reward_branching=false"
    )
    assert done.returncode == 2, done.stderr
    assert "error: --gold_model is missing, and the paper's, Nexusflow/Starling-RM-34B, cannot be loaded" in done.stderr


def test_over_optimisation_is_said_where_prompts_show_it():
    rng = np.random.default_rng(0)
    scatter = rng.normal(size=(4, 40))
    proxy = np.arange(4.0)[:, None] + 0.1 * scatter
    for fall, is_said in ((0.0004, False), (2.0, True)):
        gold = np.array([0.0, fall, fall / 2, 0.0])[:, None] + scatter
        gold -= gold.mean(axis=1, keepdims=True) - np.array([0.0, fall, fall / 2, 0.0])[:, None]
        found = correlations([1, 2, 3, 4], proxy, gold, [None] * 40)
        assert ("a sign of over-optimisation" in describe(found, [1, 2, 3, 4])) is is_said
    means = correlations([1, 2, 3, 4], proxy, np.array([[0.0], [2.0], [1.0], [0.0]]), [None] * 40)
    assert "gold peaks at step 2 while the proxy rises beyond it, which may be chance" in describe(means, [1, 2, 3, 4])


def test_a_merged_model_is_the_adapter_on_its_base(tiny_model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "run_step_2")
    done = run_script("merge_adapter.py", tmp_path / "run_step_2/", f"--output_dir={tmp_path}/merged")
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run_step_2")(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base, atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    # The tied head's weight is the embeddings' too, which the adapter leaves alone.
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    ).save_pretrained(tmp_path / "tied")
    tied = run_script("merge_adapter.py", tmp_path / "tied", f"--output_dir={tmp_path}/x")
    assert tied.returncode == 2 and "lm_head, whose weight another module shares, expected one that can be merged alone" in tied.stderr
    # The base that the adapter names is elsewhere now; a headless model of its layers is none.
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "run_step_2", moved)
    config = json.loads((moved / "adapter_config.json").read_text(encoding="utf-8"))
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/old/llama"}), encoding="utf-8")
    done = run_script("merge_adapter.py", moved, f"--base_model_name={tiny_model}", f"--output_dir={tmp_path}/merged_moved")
    assert done.returncode == 0, done.stderr
    assert file_digest(tmp_path / "merged_moved" / "model.safetensors") == file_digest(tmp_path / "merged" / "model.safetensors")
    newer = shutil.copytree(tmp_path / "run_step_2", tmp_path / "newer")
    (newer / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NEWEST"}), encoding="utf-8")
    again = run_script("merge_adapter.py", tmp_path / "run_step_2", f"--output_dir={tmp_path}/merged")
    assert again.returncode == 2 and "merged: exists already (--overwrite=true replaces it)" in again.stderr
    for words, told in (
        ([tmp_path / "merged", f"--output_dir={tmp_path}/x"], "merged: no adapter_config.json"),
        (
            [tmp_path / "run_step_2", f"--output_dir={tmp_path}/run_step_2", "--overwrite=true"],
            "run_step_2: exists already, expected a new folder",
        ),
        ([tmp_path / "run_step_2", f"--output_dir={tmp_path}/x", "--base_model_name=/gone"], "/gone: no such folder"),
        ([newer, f"--output_dir={tmp_path}/x"], "adapter_config.json: peft_type is NEWEST, expected one of "),
    ):
        done = run_script("merge_adapter.py", *words)
        assert done.returncode == 2 and told in done.stderr, done.stderr
