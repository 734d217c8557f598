"""Rollouts by vLLM, which transformers plays here (`tests/stand_in`); and by vLLM itself where it is installed."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, ROWS, run_script
from test_best_of_n import SAMPLES, evaluation_words, run_inside
from test_pipeline import metrics, ppo_words
from test_processes import launcher

from parts.chat_templates import encode_prompts, load_template
from parts.files import read_json
from parts.models import load_tokenizer
from parts.ppo_metrics import engine_metrics
from parts.rows import read_rows
from parts.sampling import row_seed

STAND_IN = Path(__file__).parent / "stand_in"
REAL = importlib.util.find_spec("vllm") is not None
played = pytest.mark.skipif(REAL, reason="vLLM itself is installed")


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.syspath_prepend(STAND_IN)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@played
@pytest.mark.parametrize("processes", [1, 2])
def test_ppo_hands_its_lora_over_at_every_step(tiny_model, rows_file, tmp_path, stand_in, processes):
    """The engine's log-probabilities are the policy's at each step: it has the weights of now, though they move."""
    words = ppo_words(tiny_model, rows_file, tmp_path / "run", rollout_engine="vllm", overall_steps=3, save_freq=3, learning_rate=0.05)
    done = run_script(*words, **({"launcher": launcher("torchrun")} if processes == 2 else {}))
    assert done.returncode == 0, done.stderr[-3000:]
    found = metrics(tmp_path / "run")
    assert len(found) == 3
    assert all(row["rollout/logprob_difference"] < 1e-4 and abs(row["rollout/kl"]) < 1e-3 for row in found)
    assert abs(found[2]["objective/kl"]) > 1e-3  # the weights did move
    record = read_json(f"{tmp_path / 'run'}_step_3/training_record.json")
    assert record["settings"]["rollout_engine"] == "vllm"


@played
def test_each_sample_is_drawn_from_a_seed_of_its_own(tiny_model, eval_file, tmp_path, stand_in, monkeypatch):
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM

    words = evaluation_words(tiny_model, eval_file, tmp_path / "out", SAMPLES, "--engine=vllm")
    assert run_inside(monkeypatch, *words) == 0
    from vllm import draw

    tokenizer = load_tokenizer(str(tiny_model))
    template = load_template("tokenizer", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    rows = read_rows(tmp_path / "out" / "model" / "samples-model.jsonl", {"instruction": None})
    for place, prompt in enumerate(encode_prompts(tokenizer, [template.render(row["input"]) for row in ROWS])):
        for number in range(SAMPLES):
            seed = row_seed(42, "model", place, number)
            ids, _ = draw(model, prompt, SimpleNamespace(seed=seed, max_tokens=12, stop_token_ids=[tokenizer.eos_token_id]))
            assert rows[place]["responses"][number]["output"] == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_difference_of_engine_and_policy_by_hand():
    """Two responses of two and one token, the second one's further token cut off."""
    ours = torch.tensor([[-1.0, -2.0], [0.0, -3.0]]).numpy()
    found = engine_metrics(ours, [[-1.5, -1.0], [-2.5, -9.0]], [2, 1])
    assert found == {"rollout/logprob_difference": pytest.approx((0.75 + 0.5) / 2), "rollout/kl": pytest.approx((0.5 + 0.5) / 2)}


@played
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--rollout_engine=vllm"],
            "--rollout_engine vllm: vLLM is not installed, expected an environment made with requirements/vllm.txt",
        ),
        (["--rollout_engine=tgi"], "--rollout_engine is 'tgi'"),
        (["--vllm_gpu_memory_utilization=1.5"], "--vllm_gpu_memory_utilization is 1.5, expected more than 0 and at most 1"),
    ],
)
def test_engines_that_cannot_be_had(tiny_model, rows_file, tmp_path, monkeypatch, capsys, words, message):
    assert run_inside(monkeypatch, *ppo_words(tiny_model, rows_file, tmp_path / "run"), *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not REAL, reason="vLLM is not installed")
def test_two_steps_with_vllm_itself(rows_file, tmp_path):
    """On a model that its kernels take; they do not take the tiny one's attention."""
    model = REPOSITORY / "models" / "SmolLM2-135M-Instruct"
    words = ppo_words(
        model, rows_file, tmp_path / "run", rollout_engine="vllm", overall_steps=2, save_freq=2, learning_rate=0.001, bf16="true"
    )
    done = run_script(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in metrics(tmp_path / "run"):
        assert math.isfinite(row["rollout/kl"]) and 0 < row["rollout/logprob_difference"] < 0.2
