"""Rollouts of checkpoints: one load for many, shared out, resumed; SuperNI's scores; the `alpaca_eval` command against a local judge."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, ROWS, run_script
from test_processes import launcher

from evaluation import EvaluationSettings, read_decoding, template_name
from parts.errors import InputError
from parts.files import read_json
from parts.runs import BaseModel, Checkpoint, checkpoints_of, find_adapters
from parts.superni import Instance, normalise, read_instances, score, summarise, superni_prompts


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tmp_path_factory) -> Path:
    """Two adapters of different rank as `run_step_2` and `run_step_10`, with the records that a run would leave."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("run")
    for step, rank in ((2, 4), (10, 8)):
        torch.manual_seed(step)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_model),
            LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "v_proj"]),
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(folder / f"run_step_{step}")
        settings = {"chat_template_name": "tokenizer", "tokenizer_name": "", "model_name": str(tiny_model), "relevance_scaling": False,
                    "reward_branching": False, "repetition_penalty": True, "length_incentive": True}  # fmt: skip
        (folder / f"run_step_{step}" / "training_record.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    return folder


def words(tiny_model, folder, eval_file, *more, tokens: int = 12) -> list[object]:
    return ["evaluation.py", f"--base_model_name={tiny_model}", "--peft_model_name", f"{folder}/run_step_*", f"--data_path={eval_file}",
            f"--max_new_tokens={tokens}", "--overwrite=true", *more]  # fmt: skip


def texts(folder: Path, step: int) -> list[str]:
    return [
        row["output"] for row in json.loads((folder / f"run_step_{step}" / f"alpaca-eval-run_step_{step}.json").read_text(encoding="utf-8"))
    ]


def test_checkpoints_in_one_call_alone_and_by_two_processes(tiny_model, checkpoints, eval_file):
    done = run_script(*words(tiny_model, checkpoints, eval_file, "--batch_size=4"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("alpaca-eval-run_step_2.json")  # in the order of steps
    both = {step: texts(checkpoints, step) for step in (2, 10)}
    assert both[2] != both[10]
    alone = words(tiny_model, checkpoints, eval_file, "--batch_size=1")
    alone[3] = f"{checkpoints}/run_step_10"
    done = run_script(*alone)
    assert done.returncode == 0, done.stderr
    assert texts(checkpoints, 10) == both[10]
    done = run_script(*words(tiny_model, checkpoints, eval_file, "--batch_size=2"), launcher=launcher("torchrun"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {step: texts(checkpoints, step) for step in (2, 10)} == both
    meta = read_json(checkpoints / "run_step_10" / "alpaca-eval-run_step_10.meta.json")
    assert meta["engine"] == "hf" and meta["dtype"] == "float32" and meta["template"] == "tokenizer" and meta["rows"] == 6
    assert not list(checkpoints.glob("*/*.partial"))


def test_an_interrupted_evaluation_goes_on(tiny_model, checkpoints, eval_file, tmp_path):
    command = words(tiny_model, checkpoints, eval_file, "--batch_size=1", tokens=300)
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    expected = {step: texts(checkpoints, step) for step in (2, 10)}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    partial = checkpoints / "run_step_2" / "alpaca-eval-run_step_2.json.partial"
    deadline = time.monotonic() + 120
    while not any(path.read_bytes().count(b"\n") >= 2 for path in partial.glob("rows_*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (log,) = partial.glob("rows_*.jsonl")
    with log.open("a", encoding="utf-8") as file:
        file.write("[5, [1, 2")  # a line that was cut short
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "of 6 rows are known from an earlier start" in done.stdout
    assert {step: texts(checkpoints, step) for step in (2, 10)} == expected
    # Other settings throw partial results away.
    partial.mkdir()
    (partial / "fingerprint").write_text("of other settings", encoding="utf-8")
    (partial / "rows_0_1.jsonl").write_text("[0, [5, 6]]\n", encoding="utf-8")
    done = run_script(*command)
    assert done.returncode == 0 and "known from an earlier start" not in done.stdout
    assert {step: texts(checkpoints, step) for step in (2, 10)} == expected


def test_common_draws_and_bf16(tiny_model, checkpoints, eval_file, tmp_path):
    """The same adapter under two names: other texts by default, the same with common draws; both settings are in the fingerprint."""
    for name in ("run_step_2", "run_step_3"):
        shutil.copytree(checkpoints / "run_step_2", tmp_path / name, ignore=shutil.ignore_patterns("alpaca-eval*"))
    command = [word for word in words(tiny_model, tmp_path, eval_file) if word != "--overwrite=true"]
    assert run_script(*command).returncode == 0
    own = texts(tmp_path, 2)
    assert own != texts(tmp_path, 3)
    for changed in ("--common_draws=true", "--dtype=bfloat16"):
        done = run_script(*command, changed)
        assert done.returncode == 2 and "run_step_2.json: exists already, made otherwise" in done.stderr
    done = run_script(*command, "--common_draws=true", "--dtype=bfloat16", "--overwrite=true")
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path, 2) == texts(tmp_path, 3) != own
    assert "alpaca-eval-run_step_2.json: 100%" in done.stderr and "alpaca-eval-run_step_3.json: 100%" not in done.stderr  # drawn once
    meta = read_json(tmp_path / "run_step_3" / "alpaca-eval-run_step_3.meta.json")
    assert meta["common_draws"] is True and meta["dtype"] == "bfloat16"
    done = run_script(*command, "--dtype=half")
    assert done.returncode == 2 and "--dtype is 'half', expected float32 or bfloat16" in done.stderr


def test_finished_files_stay_and_others_are_in_the_way(tiny_model, checkpoints, eval_file):
    command = [word for word in words(tiny_model, checkpoints, eval_file) if word != "--overwrite=true"]
    done = run_script(*command, "--overwrite=true")
    assert done.returncode == 0, done.stderr
    (checkpoints / "run_step_10" / "alpaca-eval-run_step_10.json").unlink()  # as if the call had been interrupted in between
    before = (checkpoints / "run_step_2" / "alpaca-eval-run_step_2.json").stat().st_mtime_ns
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "alpaca-eval-run_step_2.json: is there already, made as it would be now" in done.stdout
    assert (checkpoints / "run_step_2" / "alpaca-eval-run_step_2.json").stat().st_mtime_ns == before
    assert len(texts(checkpoints, 10)) == 6
    other = run_script(*command, "--seed=1")
    assert other.returncode == 2 and "run_step_2.json: exists already, made otherwise (--overwrite=true" in other.stderr
    rows = json.loads(eval_file.read_text(encoding="utf-8"))
    eval_file.write_text(json.dumps([{**rows[0], "qtype": "OPENENDED"}, *rows[1:]]), encoding="utf-8")
    other = run_script(*command)
    assert other.returncode == 2 and "run_step_2.json: exists already, of the same prompts with other columns (--overwrite" in other.stderr


def test_a_baseline_is_compared_row_by_row(tiny_model, checkpoints, eval_file, tmp_path):
    baseline = tmp_path / "baseline.json"
    rows = [{"instruction": row["input"], "output": "" if number < 4 else "word " * 500} for number, row in enumerate(ROWS)]
    baseline.write_text(json.dumps(rows[::-1]), encoding="utf-8")
    done = run_script(*words(tiny_model, checkpoints, eval_file, f"--baseline_model_file={baseline}"))
    assert done.returncode == 0, done.stderr
    found = read_json(checkpoints / "run_step_2" / "alpaca-eval-run_step_2.meta.json")["baseline"]
    outputs = texts(checkpoints, 2)
    from reward_model import ReversedEngineeredRewardForInference

    ours = ReversedEngineeredRewardForInference("alpaca", repetition_penalty=True, do_strip=False).get_reward({"response": outputs})
    theirs = [0.0] * 4 + [5.0 / 498] * 2
    assert found["won"] == pytest.approx(sum(a > b for a, b in zip(ours, theirs)) / 6)
    assert found["baseline"]["length"] == pytest.approx(10 / 6)
    from scipy.stats import binomtest

    interval = binomtest(round(found["won"] * 6), 6).proportion_ci(method="wilson")
    assert found["won_interval"] == pytest.approx([interval.low, interval.high])
    assert "rows (95% interval" in done.stdout


def test_a_baseline_named_later_is_compared_without_sampling(tiny_model, checkpoints, eval_file, tmp_path, monkeypatch, capsys):
    import evaluation
    import reward_model

    command = words(tiny_model, checkpoints, eval_file)
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    metas = [checkpoints / f"run_step_{step}" / f"alpaca-eval-run_step_{step}.meta.json" for step in (2, 10)]
    before = [read_json(path) for path in metas]
    assert not any("baseline" in meta for meta in before)
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps([{"instruction": row["input"], "output": "a b c"} for row in ROWS]), encoding="utf-8")
    command = [str(word) for word in command if word != "--overwrite=true"] + [f"--baseline_model_file={baseline}"]
    loads = []
    load = reward_model.RewardSettings.load_reward
    monkeypatch.setattr(reward_model.RewardSettings, "load_reward", lambda *given: loads.append(1) or load(*given))
    monkeypatch.setattr(evaluation, "load_engine", None)  # nothing is sampled
    monkeypatch.setattr(sys, "argv", command)

    def compared() -> str:
        evaluation.main()
        return capsys.readouterr().out

    assert compared().count("proxy above the baseline's in") == 2 and len(loads) == 1  # one reward for both checkpoints
    after = [read_json(path) for path in metas]
    for old, new in zip(before, after):
        found = new.pop("baseline")
        assert new == old and found["rows"] == 6 and found["file"] == str(baseline) and found["baseline"]["length"] == pytest.approx(0.03)
    assert "proxy above" not in compared() and len(loads) == 1
    baseline.write_text(json.dumps([{"instruction": row["input"], "output": "a b c d"} for row in ROWS]), encoding="utf-8")
    assert compared().count("proxy above the baseline's in") == 2
    assert read_json(metas[0])["baseline"]["baseline"]["length"] == pytest.approx(0.04)


# ---------------------------------------------------------------------------------------------------------------- superni


@pytest.fixture
def superni_folder(tmp_path) -> Path:
    folder = tmp_path / "natural-instructions"
    (folder / "splits" / "default").mkdir(parents=True)
    (folder / "tasks").mkdir()
    (folder / "splits" / "default" / "test_tasks.txt").write_text("task1_entail\ntask2_title\n", encoding="utf-8")
    entail = {
        "Definition": ["Say entailment or contradiction."], "Categories": ["Textual Entailment"],
        "Instances": [{"id": "e-0", "input": "A dog runs.", "output": ["entailment"]},
                      {"id": "e-1", "input": "No dog runs.", "output": ["contradiction", "Contradiction!"]},
                      {"id": "e-2", "input": "left out", "output": ["entailment"]}],
    }  # fmt: skip
    title = {"Definition": ["Give a title."], "Categories": ["Title Generation"],
             "Instances": [{"id": "t-0", "input": "Rain fell.", "output": ["a wet day", "rain on the roof"]}]}  # fmt: skip
    (folder / "tasks" / "task1_entail.json").write_text(json.dumps(entail), encoding="utf-8")
    (folder / "tasks" / "task2_title.json").write_text(json.dumps(title), encoding="utf-8")
    return folder


def test_superni_scores_by_hand(superni_folder):
    instances = read_instances(str(superni_folder), [], 2)
    assert [instance.number for instance in instances] == ["e-0", "e-1", "t-0"]
    assert instances[0].instruction == "Say entailment or contradiction.\n\nA dog runs."
    assert normalise(" It's  a Contradiction!\n") == "its a contradiction"
    predictions = ["entailment.", "entailment", "rain on a roof"]
    scores = [score(instance, prediction) for instance, prediction in zip(instances, predictions)]
    assert scores[0] == {"rouge_l": 1.0, "rouge_l_first": 1.0, "exact_match": 1.0}
    assert scores[1] == {"rouge_l": 0.0, "rouge_l_first": 0.0, "exact_match": 0.0}
    # Against "rain on the roof" three of four words in order, F1 3/4; against "a wet day" one of three and four, F1 2/7.
    assert scores[2] == {"rouge_l": pytest.approx(3 / 4), "rouge_l_first": pytest.approx(2 / 7), "exact_match": 0.0}
    summary = summarise(instances, scores)
    assert summary["by_task"]["task1_entail"]["rouge_l"] == {"mean": 50.0, "standard_error": pytest.approx(50.0)}
    assert summary["by_task"]["task2_title"]["rouge_l"] == {"mean": pytest.approx(75.0), "standard_error": None}
    assert "exact_match" not in summary["by_category"]["Title Generation"]
    overall = summary["overall"]
    assert (overall["tasks"], overall["instances"]) == (2, 3)
    # Over instances, (100 + 0 + 75) / 3. Deviations of the tasks' sums, 2 (50 - 175/3) and 75 - 175/3, are -50/3 and 50/3.
    error = (2 * ((50 / 3) ** 2 + (50 / 3) ** 2)) ** 0.5 / 3
    assert overall["rouge_l"] == {"mean": pytest.approx(175 / 3), "standard_error": pytest.approx(error)}
    assert overall["rouge_l_first"]["mean"] == pytest.approx((100 + 0 + 200 / 7) / 3)
    assert overall["exact_match"] == {"mean": 50.0, "standard_error": None}  # of one classification task


def test_superni_command(tiny_model, checkpoints, superni_folder):
    command = ["evaluation.py", f"--base_model_name={tiny_model}", "--peft_model_name", f"{checkpoints}/run_step_2", "--baseline_model_file=",
               "--batch_size=16", "--evaluations", "superni", f"--superni_dir={superni_folder}", "--overwrite=true"]  # fmt: skip
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "SuperNI: 2 tasks, 4 instances" in done.stdout and "ROUGE-L, best reference:" in done.stdout
    rows = json.loads((checkpoints / "run_step_2" / "superni-run_step_2.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in rows] == ["e-0", "e-1", "e-2", "t-0"]
    assert set(rows[0]) == {"task", "id", "prediction", "references", "rouge_l", "rouge_l_first", "exact_match"}
    meta = read_json(checkpoints / "run_step_2" / "superni-run_step_2.meta.json")
    assert meta["decoding"] == {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    assert meta["summary"]["overall"]["instances"] == 4


def test_superni_prompts_are_cut_at_the_end_of_the_input(tiny_model):
    from parts.chat_templates import load_template
    from parts.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    template = load_template("tokenizer", tokenizer)
    instance = Instance("t", "c", "1", "Say what is said.", "rain " * 2000, ("rain",))
    (tokens,) = superni_prompts([instance], template, tokenizer)
    assert 500 < len(tokens) <= 512
    text = tokenizer.decode(tokens)
    assert "Say what is said." in text and text.endswith("<|im_start|>assistant\n")
    short = Instance("t", "c", "1", "Say it.", "rain", ("rain",))
    (tokens,) = superni_prompts([short], template, tokenizer)
    assert tokenizer.decode(tokens) == template.render("Say it.\n\nrain")


def test_a_superni_definition_that_is_too_long_is_cut_too(tiny_model, capsys):
    """Every task of the default track has its prompts; the template's frame stays whole."""
    from parts.chat_templates import load_template
    from parts.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    template = load_template("tokenizer", tokenizer)
    instances = [Instance(task, "c", "1", definition, text, ("x",)) for task, definition, text in (
        ("long", "Count " * 900, "the rain"), ("long", "Count " * 900, "the snow"), ("wordy", "Count.", "rain " * 900), ("short", "Count.", "rain"),
    )]  # fmt: skip
    first, second, wordy, short = superni_prompts(instances, template, tokenizer)
    assert 500 < len(first) <= 512 and first == second and 500 < len(wordy) <= 512 > len(short)
    for tokens in (first, wordy):
        text = tokenizer.decode(tokens)
        assert "Count" in text and text.endswith("<|im_start|>assistant\n")
    assert capsys.readouterr().out.splitlines() == [
        "SuperNI, tokenizer: 3 of 4 prompts are cut to 512 tokens",
        "SuperNI, tokenizer: long: its definition is so long that nothing is left of the input of 2 instances",
    ]


def test_flags_of_decoding_are_alpaca_s_where_superni_runs_too():
    def read(*evaluations):
        settings = EvaluationSettings(base_model_name="m", evaluations=list(evaluations), temperature=0.7, max_new_tokens=30)
        return [(found.max_new_tokens, found.temperature) for found in (read_decoding(settings, name) for name in evaluations)]

    assert read("superni", "alpaca") == [(128, 0.0), (30, 0.7)]
    assert read("alpaca", "superni") == [(30, 0.7), (128, 0.0)]
    assert read("superni") == [(30, 0.7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "splits" / "default" / "test_tasks.txt").unlink(), "test_tasks.txt: no such file, expected a clone of"),
        (
            lambda folder: (folder / "tasks" / "task2_title.json").unlink(),
            "task2_title.json: no such file, expected the task 'task2_title'",
        ),
        (
            lambda folder: (folder / "tasks" / "task2_title.json").write_text('{"Definition": ["d"], "Categories": ["c"], "Instances": 3}'),
            "task2_title.json: field 'Instances' is int, expected a list of dict",
        ),
        (
            lambda folder: (folder / "tasks" / "task2_title.json").write_text(
                '{"Definition": ["d"], "Categories": ["c"], "Instances": [{"input": "x", "output": []}]}'
            ),
            "task2_title.json: instance 1: field 'output' is list, expected a list of texts",
        ),
    ],
)
def test_superni_folders_that_cannot_be_used(superni_folder, change, message):
    change(superni_folder)
    with pytest.raises(InputError, match=message):
        read_instances(str(superni_folder), [], 100)


def test_settings_of_decoding_and_checkpoints(checkpoints, tmp_path):
    settings = EvaluationSettings(base_model_name="x", peft_model_name=["y"], temperature=0.0)
    assert (read_decoding(settings, "alpaca").temperature, read_decoding(settings, "alpaca").max_new_tokens) == (0.0, 512)
    settings.temperature = -1.0
    assert read_decoding(settings, "alpaca").temperature == 0.7
    (tmp_path / "d.yaml").write_text("alpaca: {max_new_tokens: 5, heat: 3}\n", encoding="utf-8")
    settings.decoding = str(tmp_path / "d.yaml")
    with pytest.raises(InputError, match="d.yaml: expected decoding settings under 'alpaca'"):
        read_decoding(settings, "alpaca")
    assert [path.name for path in find_adapters([f"{checkpoints}/run_step_*"])] == ["run_step_2", "run_step_10"]
    with pytest.raises(InputError, match="matches no checkpoint folder"):
        find_adapters([f"{tmp_path}/none_*"])


def test_steps_sort_as_numbers_within_a_runs_name(tmp_path):
    names = ["42_step_100", "42_step_1000", "adapter", "full_step_0", "full_step_5_step_3", "full_step_500", "full_step_1000",
             "seed2_step_10", "seed10_step_2"]  # fmt: skip
    for name in reversed(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "full_step_x").mkdir()
    (tmp_path / "full_step_7").write_text("no folder", encoding="utf-8")
    found = find_adapters([f"{tmp_path}/*"])
    assert [point.name for point in found] == names
    assert [point.step for point in found] == [100, 1000, None, 0, 3, 500, 1000, 10, 2]
    assert [point.step for point in checkpoints_of(tmp_path / "full")] == [0, 500, 1000]
    assert find_adapters([str(tmp_path / "adapter"), f"{tmp_path}/a*"]) == [found[2]]


# ------------------------------------------------------------------------------------------------------------ alpaca_eval


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that prefers the first answer, by rank or by log-probability."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        choice = {"index": 0, "finish_reason": "stop"}
        if asked.get("logprobs"):
            top = [{"token": token, "logprob": value, "bytes": None} for token, value in (("m", -0.1), ("M", -2.4))]
            choice["message"] = {"role": "assistant", "content": "m"}
            choice["logprobs"] = {"content": [{"token": "m", "logprob": -0.1, "bytes": None, "top_logprobs": top}]}
        else:
            choice["message"] = {"role": "assistant", "content": "[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]"}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice],
                  "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}  # fmt: skip
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize(("annotators", "second"), [("alpaca_eval_gpt4", "False"), ("weighted_alpaca_eval_gpt4_turbo", "True")])
def test_the_alpaca_eval_command_takes_our_file(tmp_path, eval_file, judge, annotators, second):
    rows = [{"dataset": "tiny", "instruction": row["input"], "output": f"Well: {row['output']}", "generator": "run_step_2"} for row in ROWS]
    ours = tmp_path / "alpaca-eval-run_step_2.json"
    ours.write_text(json.dumps(rows), encoding="utf-8")
    environment = {**os.environ, "IS_ALPACA_EVAL_2": second, "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path),
                   "OPENAI_BASE_URL": f"http://127.0.0.1:{judge.server_port}/v1", "OPENAI_API_BASE": ""}  # fmt: skip
    environment.pop("OPENAI_API_BASE")
    command = [str(Path(sys.executable).with_name("alpaca_eval")), "--annotators_config", annotators, "--model_outputs", ours,
               "--reference_outputs", eval_file, "--output_path", tmp_path / "out", "--is_overwrite_leaderboard",
               "--caching_path", tmp_path / "cache.json",
               "--fn_metric", "get_winrate", "--sort_by", "win_rate"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(judge.asked) == len(ROWS)
    with (tmp_path / "out" / annotators / "leaderboard.csv").open(encoding="utf-8") as file:
        (line,) = (row for row in csv.DictReader(file) if row[""] == "run_step_2")
    annotations = json.loads((tmp_path / "out" / annotators / "annotations.json").read_text(encoding="utf-8"))
    preferences = [row["preference"] for row in annotations]
    assert float(line["win_rate"]) == pytest.approx(sum(preference - 1 for preference in preferences) / len(ROWS) * 100, abs=0.01)
    assert int(line["n_total"]) == len(ROWS)


def test_the_template_of_a_base_model(tiny_model, tmp_path, capsys):
    """Its record's, else its tokenizer's own, else alpaca; the flag before all of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    settings, point = EvaluationSettings(base_model_name=str(tiny_model)), BaseModel(tmp_path / "model", str(tiny_model))
    assert template_name(settings, point, tokenizer) == "tokenizer"
    told = f"{tiny_model}: no record names a chat template, prompts have its tokenizer's own (--chat_template_name names another)\n"
    assert capsys.readouterr().out == told
    assert template_name(EvaluationSettings(base_model_name="m", chat_template_name="vicuna"), point, tokenizer) == "vicuna"
    for record, expected in (
        ({"settings": {"chat_template_name": "llama-2"}}, "llama-2"),
        ({"template": "mistral", "settings": {}}, "mistral"),
    ):
        (tmp_path / "training_record.json").write_text(json.dumps(record), encoding="utf-8")
        assert template_name(settings, BaseModel(tmp_path / "model", str(tmp_path)), tokenizer) == expected
    assert template_name(settings, Checkpoint(tmp_path / "none"), tokenizer) == "alpaca"
    assert capsys.readouterr().out == ""
    tokenizer.chat_template = None
    assert template_name(settings, point, tokenizer) == "alpaca"
    assert "prompts have 'alpaca', since its tokenizer has none" in capsys.readouterr().out


def test_checkpoints_of_two_tokenizers_are_two_calls(tiny_model, eval_file, tmp_path):
    """One tokenizer serves a call: the second run's prompts and end tokens would be the first's. A copy is the same one."""
    copy, other = tmp_path / "copy", tmp_path / "other"
    for folder in (copy, other):
        shutil.copytree(tiny_model, folder)
    config = read_json(other / "tokenizer_config.json")
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "a"}), encoding="utf-8")
    for name, tokenizer in (("a_step_1", ""), ("b_step_1", str(copy)), ("c_step_1", str(other))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": "models/x"}), encoding="utf-8"
        )
        record = {"settings": {"tokenizer_name": tokenizer, "chat_template_name": "tokenizer"}}
        (folder / "training_record.json").write_text(json.dumps(record), encoding="utf-8")
    words = ["evaluation.py", f"--base_model_name={tiny_model}", f"--data_path={eval_file}", "--peft_model_name", tmp_path / "a_step_1"]
    done = run_script(*words, tmp_path / "c_step_1")
    said = f"{tmp_path}/a_step_1 was trained with the tokenizer {tiny_model}, {tmp_path}/c_step_1 with {other}"
    assert done.returncode == 2 and done.stderr == f"error: {said}, which is another one, expected a call for each\n"
    done = run_script(*words, tmp_path / "b_step_1")
    assert done.returncode == 2 and "no adapter_model.safetensors" in done.stderr  # what comes after it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_model_name": [""]}, "--peft_model_name is empty, expected checkpoints"),
        ({"engine": "vllm", "device": "cuda:1"}, "--device is for --engine hf: CUDA_VISIBLE_DEVICES says which GPU vLLM takes"),
    ],
)
def test_evaluation_settings_that_would_be_ignored(settings, message):
    with pytest.raises(InputError, match=message):
        EvaluationSettings(base_model_name="m", **settings)
