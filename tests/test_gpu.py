"""On a GPU, what the other tests show on a CPU; skipped where there is none. tests/test_ppo_trainer.py takes the GPU by itself."""

from __future__ import annotations

import pytest
import torch
from conftest import ROWS, run_script
from safetensors.torch import load_file
from test_best_of_n import evaluation_words
from test_pipeline import metrics, ppo_words
from test_processes import launcher

from parts.rows import read_rows
from parts.sampling import Decoding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def run_on_gpu(*words: object, **how: tuple[str, ...]) -> None:
    done = run_script(*words, gpus="0", **how)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("launch", ["alone", "zero2-bf16"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tiny_model, rows_file, tmp_path, launch):
    """By the published launch, DeepSpeed's ZeRO-2 in bf16, and without a launcher in fp32: the adapter after four steps."""
    if launch == "zero2-bf16":
        pytest.importorskip("deepspeed")
    how = {"launcher": launcher(launch)} if launch != "alone" else {}
    for name, stops in (("whole", [4]), ("resumed", [2, 4])):
        for steps in stops:
            resume = {"resume_from_checkpoint": "auto"} if steps != stops[0] else {}
            words = ppo_words(tiny_model, rows_file, tmp_path / name, overall_steps=steps, learning_rate=0.01, lora_dropout=0.0, **resume)
            run_on_gpu(*words, **how)
    found = metrics(tmp_path / "whole")
    assert [row["step"] for row in found] == [1, 2, 3, 4] and found[0]["objective/kl"] == pytest.approx(0, abs=1e-2)
    weights = [load_file(tmp_path / f"{name}_step_4" / "adapter_model.safetensors") for name in ("whole", "resumed")]
    assert any(weight.abs().max() > 0 for name, weight in weights[0].items() if "lora_B" in name)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_greedy_rollouts_are_those_of_transformers(tiny_model):
    from transformers import AutoModelForCausalLM

    from parts.generation import HFEngine
    from parts.models import load_tokenizer

    prompts = [[5, 6, 7], [9] * 11, [20, 21, 22, 23, 24, 25]]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model).cuda().eval(), load_tokenizer(str(tiny_model))
    found: dict[int, list[int]] = {}
    engine = HFEngine(str(tiny_model), tokenizer, "cuda", 2, dtype="float32")
    engine.generate(None, prompts, Decoding(12, temperature=0), 0, range(3), found.__setitem__)
    for place, prompt in enumerate(prompts):
        stock = model.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2)
        new = stock[0, len(prompt) :].tolist()
        assert found[place] == (new[: new.index(2) + 1] if 2 in new else new)


def test_rollouts_and_gold_scores_are_those_of_the_cpu(tiny_model, tiny_gold, eval_file, tmp_path):
    """Drawn from the same draws in fp32, and scored: text by text, score by score."""
    from parts.gold_models import load_gold_reward_model
    from parts.gold_settings import GoldSettings

    outputs, scores = {}, {}
    for device in ("cpu", "cuda"):
        run_on_gpu(*evaluation_words(tiny_model, eval_file, tmp_path / device, 1, "--dtype=float32", f"--device={device}"))
        (path,) = (path for path in tmp_path.glob(f"{device}/*/alpaca-eval-*.json") if not path.name.endswith(".meta.json"))
        outputs[device] = [row["output"] for row in read_rows(path, {"output": None})]
        gold = load_gold_reward_model(str(tiny_gold), device=device, settings=GoldSettings(gold_dtype="float32"))
        scores[device] = gold.get_reward({"query": [row["input"] for row in ROWS], "response": outputs["cpu"]})
    assert len(outputs["cpu"]) == len(ROWS) and outputs["cpu"] == outputs["cuda"]
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=1e-4)
