"""The commands a user types, end to end on a two-layer model; and the one clear line for whatever is wrong with their input."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, ROWS, run_script

from parts.errors import run_main
from parts.files import read_json

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


def ppo_words(model: Path, rows: Path, output: Path, **more: object) -> list[str]:
    """The published command's flags at a size for a two-layer model, in both spellings of a flag."""
    settings = {
        "exp_name": "tiny", "model_name": model, "overall_steps": 3, "seed": 42, "save_freq": 2, "output_dir": output, "cache_dir": "",
        "dataset_path": rows, "dev_prompt_path": rows, "logging_dir": output / "logs", "output_max_length": 10, "batch_size": 4,
        "mini_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": "1e-3", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.05,
        "length_incentive": "true", "repetition_penalty": "true", "chat_template_name": "tokenizer", "log_with": "none", **more,
    }  # fmt: skip
    return ["run_ppo.py", *[f"--{name}={value}" for name, value in settings.items()], "--reward_model_batch_size", "8"]


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A run of run_ppo.py through `accelerate launch`; its checkpoints are <folder>/tiny_step_<k>."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    launcher = (*ACCELERATE, "--config_file", "configs/cpu.yaml")
    done = run_script(*ppo_words(tiny_model, folder / "rows.json", folder / "tiny", log_with="tensorboard"), launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "step 3, one sample: reward" in done.stdout + done.stderr  # sample rollouts
    return folder


def test_checkpoints_hold_what_they_should(trained, tiny_model):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert sorted(path.name for path in trained.glob("tiny_step_*")) == ["tiny_step_0", "tiny_step_2", "tiny_step_3"]
    record = read_json(trained / "tiny_step_3" / "training_record.json")
    assert record["step"] == 3 and record["seed"] == 42 and record["dtype"] == "float32" and record["model"] == str(tiny_model)
    assert record["settings"]["repetition_penalty"] is True
    columns = ("length", "repetition", "total", "objective/kl")
    groups = ("", "/CONSTRAINED", "/OPENENDED")
    assert set(record["development"]) == {f"dev/{column}{group}" for column in columns for group in groups}
    assert len(record["reward_source"]["reward_model.py"]) == 64
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        start = PeftModel.from_pretrained(base, trained / "tiny_step_0")(ids).logits
        assert torch.equal(start, AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits)  # the start is the base model
    weights = [load_file(trained / f"tiny_step_{step}" / "adapter_model.safetensors") for step in (0, 3)]
    assert len(weights[0]) == 8  # A and B of q_proj and v_proj in two layers
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert set(load_file(trained / "tiny_step_3" / "value_head.safetensors")) == {"summary.weight", "summary.bias"}
    assert list((trained / "tiny" / "logs").rglob("events.out.tfevents*"))


def test_logged_rewards_are_the_formula(trained):
    from reward_model import ReversedEngineeredRewardForInference

    rows = json.loads((trained / "tiny_step_3" / "development_rollouts.json").read_text(encoding="utf-8"))
    assert [row["input"] for row in rows] == [row["input"] for row in ROWS]
    from parts.chat_templates import load_template
    from parts.models import load_tokenizer

    template = load_template("tokenizer", load_tokenizer(read_json(trained / "tiny_step_3" / "training_record.json")["model"]))
    totals = ReversedEngineeredRewardForInference(template, repetition_penalty=True).get_reward(
        {"response": [row["response"] for row in rows]}
    )
    assert [row["scores"]["total"] for row in rows] == totals
    log = metrics(trained / "tiny")
    assert [row["step"] for row in log] == [1, 2, 3]
    assert log[2]["dev/total"] == pytest.approx(sum(totals) / len(totals))
    assert log[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # the policy starts as its reference
    measured = log[2]["dev/objective/kl"]
    assert measured == pytest.approx(statistics.fmean(row["kl"] for row in rows), abs=1e-6) and measured != 0
    assert 0 <= log[0]["reward/eos_rate"] <= 1 and 1 <= log[0]["reward/response_tokens"] <= 10
    start = json.loads((trained / "tiny_step_0" / "development_rollouts.json").read_text(encoding="utf-8"))
    lengths = [row["scores"]["length"] for row in start]
    for row in log:  # normalised by the start's mean and standard deviation
        for name in ("length", "length/CONSTRAINED", "length/OPENENDED"):
            if f"reward/{name}" in row:
                z = (row[f"reward/{name}"] - statistics.fmean(lengths)) / statistics.pstdev(lengths)
                assert row[f"reward_normalised/{name}"] == pytest.approx(z)
        assert {"reward/truncation_rate", "reward/eos_rate"} <= set(row)


def test_an_existing_run_is_not_replaced_unasked(trained, tiny_model):
    done = run_script(*ppo_words(tiny_model, trained / "rows.json", trained / "tiny"))
    assert done.returncode == 2
    assert "tiny_step_0: exists already (--overwrite=true removes" in done.stderr


def test_rollouts_and_monotonicity(trained, tiny_model, tiny_gold, eval_file):
    for step in (0, 2, 3):
        checkpoint = trained / f"tiny_step_{step}"
        words = ["evaluation.py", f"--base_model_name={tiny_model}", f"--peft_model_name={checkpoint}", "--baseline_model_file=",
                 "--batch_size=4", "--evaluations", "alpaca", f"--data_path={eval_file}", "--max_new_tokens=10", f"--seed={step}"]  # fmt: skip
        done = run_script(*words)
        assert done.returncode == 0, done.stderr
        rows = json.loads((checkpoint / f"alpaca-eval-tiny_step_{step}.json").read_text(encoding="utf-8"))
        assert [set(row) for row in rows] == [{"dataset", "instruction", "output", "generator", "qtype"}] * 6
        assert {row["generator"] for row in rows} == {f"tiny_step_{step}"}
        meta = read_json(checkpoint / f"alpaca-eval-tiny_step_{step}.meta.json")
        assert meta["decoding"] == {"max_new_tokens": 10, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
        assert meta["template"] == "tokenizer"
    again = run_script(*words)
    assert again.returncode == 0 and "is there already" in again.stdout
    baseline = trained / "tiny_step_0" / "alpaca-eval-tiny_step_0.json"
    compared = run_script(*words, "--overwrite=true", f"--baseline_model_file={baseline}")
    assert compared.returncode == 0 and "proxy above the baseline's in" in compared.stdout

    done = run_script(
        "eval_monotonicity.py", f"--output_dir={trained}", "--model_prefix=tiny", "--gold_model", tiny_gold, "--include_start=true"
    )
    assert done.returncode == 0, done.stderr
    folder = trained / "tiny_monotonicity"
    content = read_json(folder / "monotonicity.json")
    assert [point["step"] for point in content["curve"]] == [0, 2, 3]
    assert (folder / "monotonicity.png").stat().st_size > 5000

    from scipy.stats import spearmanr

    expected = spearmanr([point["proxy"] for point in content["curve"]], [point["gold"] for point in content["curve"]])
    assert f"SignificanceResult(statistic={float(expected.statistic)}, pvalue={float(expected.pvalue)})" in done.stdout
    for point in content["curve"]:
        for name, by_row in (("proxy", content["per_row"]["proxy"]), ("gold", content["per_row"]["gold"]["gold"])):
            assert point[name] == pytest.approx(sum(by_row[str(point["step"])]) / 6)
    assert "SpearmanR" in (folder / "report.html").read_text(encoding="utf-8") and str(folder / "report.html") in done.stdout

    table = trained / "gold.csv"
    table.write_text("step,gold\n0,1.5\n2,0.5\n3,0.25\n", encoding="utf-8")
    words = ["eval_monotonicity.py", f"--output_dir={trained}", "--model_prefix=tiny", f"--gold_scores={table}", "--steps", 0, 2, 3]
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    assert [point["gold"] for point in read_json(folder / "monotonicity.json")["curve"]] == [1.5, 0.5, 0.25]
    table.write_text("step,gold\n0,1.5\n2,much\n", encoding="utf-8")
    assert run_script(*words).stderr.strip().endswith("gold.csv: row 2: field 'gold' is 'much', expected a number")
    missing = run_script("eval_monotonicity.py", f"--output_dir={trained}", "--model_prefix=tiny", "--steps", 0, 2, 5)
    assert missing.returncode == 2 and "tiny_step_5: no rollouts" in missing.stderr


def test_other_rewards_and_switches(tiny_model, tiny_gold, rows_file, tmp_path):
    """A learned reward model as the reward; gradient checkpointing, warm-up, early stopping and a fixed KL coefficient in one run."""
    words = ppo_words(tiny_model, rows_file, tmp_path / "tiny", reward_model_name=tiny_gold, gradient_checkpointing="true",
                      use_optimizer_setup="true", warmup_ratio=0.5, early_stopping="true", adap_kl_ctrl="false", init_kl_coef=0.1,
                      reward_baseline=0.5, ppo_epochs=2)  # fmt: skip
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    log = metrics(tmp_path / "tiny")
    assert [row["objective/kl_coef"] for row in log] == [0.1, 0.1, 0.1]
    assert [row["ppo/learning_rate"] for row in log] == pytest.approx([0.0, 5e-4, 1e-3])  # warm-up over 2 of 3 steps

    from parts.gold_models import load_gold_reward_model

    rows = json.loads((tmp_path / "tiny_step_3" / "development_rollouts.json").read_text(encoding="utf-8"))
    batch = {"query": [row["input"] for row in rows], "response": [row["response"] for row in rows]}
    gold = load_gold_reward_model(str(tiny_gold), device="cpu").get_reward(batch)
    assert [row["scores"]["total"] for row in rows] == pytest.approx(gold, rel=1e-4, abs=1e-6)


def test_ppo_against_an_ensemble(tiny_model, tiny_gold, rows_file, tmp_path):
    """Two reward models, the mean less their variance: each member's score and the total are what the models alone give."""
    import shutil

    from safetensors.torch import load_file, save_file

    from parts.gold_models import load_gold_reward_model

    other = tmp_path / "other"
    shutil.copytree(tiny_gold, other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "score.weight": weights["score.weight"] + 1.0}, other / "model.safetensors", metadata={"format": "pt"})
    words = ppo_words(tiny_model, rows_file, tmp_path / "tiny", overall_steps=1, reward_ensemble="uwo", uwo_coefficient=0.5,
                      reward_offload="true")  # fmt: skip
    done = run_script(*words, "--reward_model_name", tiny_gold, other)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "tiny_step_1" / "development_rollouts.json").read_text(encoding="utf-8"))
    batch = {"query": [row["input"] for row in rows], "response": [row["response"] for row in rows]}
    scores = [load_gold_reward_model(str(folder), device="cpu").get_reward(batch) for folder in (tiny_gold, other)]
    found = [[row["scores"][name] for row in rows] for name in (tiny_gold.name, other.name, "disagreement", "total")]
    assert found[:2] == [pytest.approx(column, rel=1e-4, abs=1e-6) for column in scores]
    for one, two, disagreement, total in zip(*found):
        assert disagreement == pytest.approx(abs(one - two) / 2)
        assert total == pytest.approx((one + two) / 2 - 0.5 * ((one - two) / 2) ** 2)
    (line,) = metrics(tmp_path / "tiny")
    assert line["reward/disagreement"] > 0 and f"reward/{other.name}" in line
    assert f"the reward model `uwo 0.5 of {tiny_gold}, {other}`" in (tmp_path / "tiny_step_1" / "README.md").read_text(encoding="utf-8")


def test_gradient_checkpointing_changes_no_number(tiny_model, rows_file, tmp_path):
    logs = []
    for switch in ("false", "true"):
        output = tmp_path / switch
        done = run_script(*ppo_words(tiny_model, rows_file, output, overall_steps=2, gradient_checkpointing=switch))
        assert done.returncode == 0, done.stderr
        logs.append([{name: value for name, value in row.items() if not name.startswith("time/")} for row in metrics(output)])
    assert logs[0] == logs[1]


def test_the_value_head_learns_first_and_at_its_own_rate(tiny_model, rows_file, tmp_path):
    """One optimiser step a PPO step: Adam's first step moves each weight by the learning rate, whatever its gradient."""
    words = ppo_words(tiny_model, rows_file, tmp_path / "tiny", save_freq=1, ppo_epochs=1, value_warmup_steps=2,
                      value_learning_rate="5e-3", adap_kl_horizon=50)  # fmt: skip
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    adapters, heads = (
        [load_file(tmp_path / f"tiny_step_{step}" / f"{name}.safetensors") for step in range(4)] for name in ("adapter_model", "value_head")
    )
    for name, start in adapters[0].items():
        assert torch.equal(adapters[1][name], start) and torch.equal(adapters[2][name], start)
        moved = (adapters[3][name] - start).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3 if "lora_B" in name else 0.0), rtol=0.1, atol=1e-7)
    moved = (heads[1]["summary.weight"] - heads[0]["summary.weight"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 5e-3), rtol=1e-2, atol=0)
    log = metrics(tmp_path / "tiny")
    assert [row["objective/kl"] for row in log] == pytest.approx([0.0] * 3, abs=1e-5)
    assert [row["objective/kl_coef"] for row in log] == pytest.approx([0.2, 0.2 * (1 - 0.2 * 4 / 50), 0.2])  # the policy's starts again
    assert [row["ppo/learning_rate"] for row in log] == [0.0, 0.0, 1e-3]
    assert [row["ppo/value_learning_rate"] for row in log] == [5e-3] * 3


def test_two_groups_of_weights_change_no_number(trained, tiny_model, tmp_path):
    done = run_script(*ppo_words(tiny_model, trained / "rows.json", tmp_path / "tiny", value_learning_rate="1e-3"))
    assert done.returncode == 0, done.stderr
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "tiny_step_3" / name).read_bytes() == (trained / "tiny_step_3" / name).read_bytes()


@pytest.mark.parametrize("processes", [1, 2])
def test_schedules_of_policy_and_value_head(processes):
    """Linear over six steps, two of them rising; the policy's over the four that follow the warm-up, one of them rising."""
    from types import SimpleNamespace

    from transformers import get_linear_schedule_with_warmup

    from parts.ppo_setup import optimizer_setup

    def rates(**changes) -> list[list[float]]:
        settings = {"value_learning_rate": 0.0, "value_warmup_steps": 0, "use_optimizer_setup": True, "learning_rate": 1.0,
                    "overall_steps": 6, "warmup_ratio": 0.3, **changes}  # fmt: skip
        policy = torch.nn.ModuleDict({"pretrained_model": torch.nn.Linear(2, 2), "v_head": torch.nn.Linear(2, 1)})
        policy.pretrained_model, policy.v_head = policy["pretrained_model"], policy["v_head"]
        made = optimizer_setup(SimpleNamespace(**settings), policy, processes)
        return rates_of(made["optimizer"], made["lr_scheduler"])

    def rates_of(optimizer, schedule) -> list[list[float]]:
        found = []
        for _ in range(6):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            for _ in range(processes):
                schedule.step()
        return found

    plain = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    theirs = rates_of(plain, get_linear_schedule_with_warmup(plain, round(0.3 * 6 * processes), 6 * processes))
    assert rates() == theirs
    both = rates(value_warmup_steps=2, value_learning_rate=10.0)
    assert [head for _, head in both] == pytest.approx([10 * rate for (rate,) in theirs])
    assert [rate for rate, _ in both] == pytest.approx([0, 0, 0, 1, 2 / 3, 1 / 3] if processes == 1 else [0, 0, 0, 1, 4 / 6, 2 / 6])
    assert rates(value_warmup_steps=2, use_optimizer_setup=False) == [[0.0, 1.0]] * 2 + [[1.0, 1.0]] * 4


def run_inside(words: list[object], monkeypatch, capsys) -> tuple[int, str]:
    """A command line run in this process: its exit code and what it wrote to stderr."""
    import importlib

    module = importlib.import_module(Path(str(words[0])).stem)
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as ended:
        run_main(module.main)
    return ended.value.code, capsys.readouterr().err


def broken(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


BAD_PPO = {
    "missing file": ({"dataset_path": "nowhere.json"}, "nowhere.json: no such file"),
    "broken JSON": ({"dataset_path": "[{"}, "bad.json: broken JSON"),
    "empty file": ({"dataset_path": ""}, "bad.json: empty file, expected a JSON list of rows"),
    "missing field": ({"dataset_path": '[{"input": "a"}, {"output": "b"}]'}, "bad.json: row 2: field 'input' is missing, expected text"),
    "missing reference": (
        {"dev_prompt_path": '[{"input": "a", "qtype": "OPENENDED"}]', "relevance_scaling": "true", "reward_branching": "true"},
        "bad.json: row 1: field 'output' is missing, expected text",
    ),
    "unknown qtype": (
        {"dataset_path": '[{"input": "a", "output": "b", "qtype": "OPEN"}]', "relevance_scaling": "true", "reward_branching": "true"},
        "bad.json: row 1: field 'qtype' is 'OPEN', expected OPENENDED or CONSTRAINED",
    ),
    "long prompt": ({"max_prompt_length": "20"}, "row 1: field 'input' makes a prompt of"),
    "unknown template": ({"chat_template_name": "alpacca"}, "unknown chat template 'alpacca', expected one of alpaca"),
    "unknown setting": ({"learning_rat": "1"}, "unrecognized arguments: --learning_rat=1"),
    "wrong type": ({"overall_steps": "many"}, "argument --overall_steps/--overall-steps: invalid int value: 'many'"),
    "indivisible batch": (
        {"batch_size": "6"},
        "--batch_size is 6, expected a multiple of mini_batch_size * gradient_accumulation_steps = 4",
    ),
    "no reward": ({"length_incentive": "false", "repetition_penalty": "false"}, "every part of the proxy reward is off"),
    "no model": ({"model_name": "outputs/none"}, "outputs/none: no such folder, expected a model's folder or its hub name"),
    "no reward model": ({"reward_model_name": "outputs/none"}, "outputs/none: no such folder"),
    "negative learning rate": ({"learning_rate": "-1"}, "--learning_rate is -1.0, expected more than 0"),
    "unreachable model": ({"model_name": "owner/unreachable"}, "owner/unreachable: cannot be loaded as a tokenizer"),
    "negative value learning rate": ({"value_learning_rate": "-1"}, "--value_learning_rate is -1.0, expected at least 0"),
    "negative warm-up": ({"value_warmup_steps": "-1"}, "--value_warmup_steps is -1, expected at least 0"),
    "nothing but warm-up": ({"value_warmup_steps": "3"}, "--value_warmup_steps is 3, expected fewer than overall_steps = 3"),
    "no qtype to normalise by": (
        {"dev_prompt_path": '[{"input": "a"}]', "score_norm_by_qtype": "true"},
        "bad.json: row 1: field 'qtype' is missing, expected text",
    ),
    "query types without a meaning": ({"random_qtypes": "true"}, "--random_qtypes=true, expected a reward that query types matter to"),
    "unknown tracker": ({"log_with": "paper"}, "--log_with is 'paper', expected tensorboard, wandb, none"),
}


@pytest.mark.parametrize("case", BAD_PPO)
def test_bad_input_is_one_line_and_exit_code_2(tiny_model, rows_file, tmp_path, case, monkeypatch, capsys):
    change, message = BAD_PPO[case]
    for name in ("dataset_path", "dev_prompt_path"):
        if name in change and not change[name].endswith(".json"):
            change = {**change, name: broken(tmp_path / "bad.json", change[name])}
    relevance = {"relevance_model_name": tiny_model} if "relevance_scaling" in change else {}
    code, stderr = run_inside(ppo_words(tiny_model, rows_file, tmp_path / "tiny", **{**relevance, **change}), monkeypatch, capsys)
    assert code == 2
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not list(tmp_path.glob("tiny*"))


def test_lora_on_modules_that_are_not_there(tiny_model, rows_file, tmp_path):
    done = run_script(*ppo_words(tiny_model, rows_file, tmp_path / "tiny", lora_target_modules="w_q"))
    assert done.returncode == 2
    assert "--lora_target_modules holds 'w_q', expected modules of the model: down_proj, gate_proj" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("tiny*"))


def test_an_unknown_key_in_a_configuration_file(tiny_model, rows_file, tmp_path):
    config = broken(tmp_path / "mine.yaml", "learning_rat: 1.0e-5\n")
    done = run_script(*ppo_words(tiny_model, rows_file, tmp_path / "tiny"), "--config", config)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (
        2,
        f"error: {config}: unknown setting 'learning_rat', did you mean learning_rate?",
    )


def test_long_prompts_can_be_dropped(tiny_model, tmp_path):
    rows = broken(tmp_path / "rows.json", json.dumps([*ROWS, {"input": "word " * 300, "output": "x", "qtype": "OPENENDED"}]))
    done = run_script(*ppo_words(tiny_model, rows, tmp_path / "tiny", overall_steps=1, long_prompts="drop", dev_prompts=2))
    assert done.returncode == 0, done.stderr
    assert "1 of 7 rows dropped, their prompts have 512 tokens or more" in done.stdout
    kept = json.loads((tmp_path / "tiny_step_1" / "development_rollouts.json").read_text(encoding="utf-8"))
    assert [row["input"] for row in kept] == [row["input"] for row in ROWS[:2]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluation.py", "--peft_model_name=x"], "--base_model_name is missing"),
        (
            ["evaluation.py", "--base_model_name=x", "--peft_model_name=outputs/none"],
            "outputs/none: no adapter_config.json, expected a checkpoint folder",
        ),
        (
            ["evaluation.py", "--base_model_name=x", "--peft_model_name=x", "--evaluations", "mmlu"],
            "--evaluations holds 'mmlu', expected alpaca or superni",
        ),
        (
            ["reward_model.py", "data/eval.json", "--data_path=data/eval.json", "--relevance_scaling=false", "--device=cuda"],
            "--device is 'cuda', and PyTorch finds no such device",
        ),
        (
            ["reward_model.py", "data/eval.json", "--data_path=data/eval.json", "--relevance_scaling=false", "--device=gpu"],
            "--device is 'gpu', expected cpu, cuda",
        ),
        (["eval_monotonicity.py"], "--model_prefix is missing"),
        (
            ["eval_monotonicity.py", "--output_dir=none", "--model_prefix=x"],
            "none: no such folder, expected the one that holds the checkpoints",
        ),
        (["eval_monotonicity.py", "--output_dir=data", "--model_prefix=x"], "data: no folder x_step_<k>"),
    ],
)
def test_bad_commands_of_the_other_scripts(words, message, monkeypatch, capsys):
    code, stderr = run_inside(words, monkeypatch, capsys)
    assert code == 2
    assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1


def test_help_explains_every_setting():
    done = run_script("run_ppo.py", "--help")
    assert done.returncode == 0
    assert "KL coefficient at the start" in done.stdout and "accelerate launch" in done.stdout


def test_a_reward_function_in_ppo_and_monotonicity(tiny_model, tiny_gold, rows_file, eval_file, tmp_path):
    """The worked example as the reward; the run is then judged by it, on the evaluation rows' own columns."""
    words = ppo_words(tiny_model, rows_file, tmp_path / "tiny", save_freq=1, reward_function="examples/my_reward.py:hedging")
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    log = metrics(tmp_path / "tiny")
    assert all("reward/plainness" in row and "reward/total" in row for row in log)
    for step in (1, 2, 3):
        done = run_script("evaluation.py", f"--base_model_name={tiny_model}", f"--peft_model_name={tmp_path}/tiny_step_{step}",
                          f"--data_path={eval_file}", "--max_new_tokens=10", f"--seed={step}")  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = run_script("eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix=tiny", f"--gold_model={tiny_gold}")
    assert done.returncode == 0, done.stderr
    content = read_json(tmp_path / "tiny_monotonicity" / "monotonicity.json")
    from parts.rewards import reward_batch
    from reward_model import RewardSettings

    rows = json.loads((tmp_path / "tiny_step_2" / "alpaca-eval-tiny_step_2.json").read_text(encoding="utf-8"))
    reward = RewardSettings(reward_function="examples/my_reward.py:hedging").load_reward(None, 512, "cpu")
    batch = reward_batch([row["instruction"] for row in rows], [row["output"] for row in rows], ROWS)
    assert content["per_row"]["proxy"]["2"] == pytest.approx(reward.get_reward(batch))
    broken = ppo_words(tiny_model, rows_file, tmp_path / "other", reward_function="examples/my_reward.py:nothing")
    done = run_script(*broken)
    assert done.returncode == 2 and "no function 'nothing' in it, found plainness, hedging" in done.stderr
