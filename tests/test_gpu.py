"""On a GPU, what the other tests show on a CPU; skipped where there is none. tests/test_ppo_trainer.py takes the GPU by itself."""

from __future__ import annotations

import pytest
import torch
from conftest import ROWS, run_script
from safetensors.torch import load_file
from test_best_of_n import evaluation_words
from test_families import FAMILIES, VOCABULARY, build
from test_pipeline import metrics, ppo_words
from test_processes import launcher

from parts import cuda_graphs
from parts.rows import read_rows
from parts.sampling import Decoding, check_sampling, row_draws, sample

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


@pytest.fixture
def captured(monkeypatch):
    """The graphs that are captured, and what is said."""
    found, lines, own = [], [], cuda_graphs.capture

    def capture(step, device):
        graph = own(step, device)
        found.append(graph)
        return graph

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "say_once", lines.append)
    return found, lines


def drawn(model, monkeypatch, graphs: bool) -> list[list[int]]:
    """40 responses, 7 at a time, some of which end early."""
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(4, VOCABULARY, (length,), generator=draw).tolist() for length in [*range(2, 22)] * 2]
    with monkeypatch.context() as patch:
        if not graphs:
            patch.setattr(cuda_graphs, "DEVICES", ())
        return sample(model, prompts, Decoding(150), row_draws(5, range(40), 150), set(range(4)), at_a_time=7)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "olmo2", "phi", "qwen2", "qwen3", "smollm3", "starcoder2"])
def test_graphs_draw_what_the_kernels_one_by_one_draw(family, captured, monkeypatch):
    """In fp32, with rows that leave and enter, and more tokens than a first room has."""
    graphs, lines = captured
    model = build(family, **FAMILIES[family]).cuda()
    check_sampling(model)
    plain, checked = drawn(model, monkeypatch, graphs=False), len(graphs)
    assert checked >= 1 and len(set(map(len, plain))) > 3
    assert drawn(model, monkeypatch, graphs=True) == plain
    assert len(graphs) > checked + 1 and not lines


@pytest.mark.parametrize("family", ["falcon", "granitemoe", "mistral", "mixtral", "olmoe", "opt", "qwen2_moe", "qwen3_moe"])
def test_what_cannot_be_captured_is_drawn_too(family, captured, monkeypatch):
    model = build(family, **FAMILIES[family]).cuda()
    check_sampling(model)
    assert drawn(model, monkeypatch, graphs=True) == drawn(model, monkeypatch, graphs=False)
    print(family, len(captured[0]), captured[1])


def test_a_model_that_waits_for_the_gpu_goes_on_without_graphs(captured, monkeypatch):
    """The failed capture leaves nothing behind: another model is captured after it."""
    graphs, lines = captured
    waiting, other = build("llama").cuda(), build("llama").cuda()
    plain = drawn(waiting, monkeypatch, graphs=False)
    handle = waiting.model.layers[1].register_forward_pre_hook(lambda layer, given: given[0].sum().item() and None)
    assert drawn(waiting, monkeypatch, graphs=True) == plain and len(lines) == 1 and not graphs
    handle.remove()
    assert drawn(other, monkeypatch, graphs=True) == plain and graphs and len(lines) == 1
