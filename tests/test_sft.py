"""Fine-tuning a backbone: what is learnt of a row, a merged model folder, resuming, two processes, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, ROWS, run_script
from safetensors.torch import load_file, save_file
from test_processes import launcher

from parts.chat_templates import load_template
from parts.errors import InputError
from parts.files import read_json
from parts.models import ModelFacts, load_tokenizer
from parts.sft_data import NOT_LEARNT, ByLength, collate, first_sentences, read_examples
from train_sft import SFTSettings


def words(model, rows, output, **settings) -> list[str]:
    given = {"chat_template_name": "tokenizer", "heldout_path": rows, "batch_size": 2, "epochs": 2, "learning_rate": 0.01, "bf16": "false",
             **settings}  # fmt: skip
    fixed = ["train_sft.py", f"--model_name={model}", f"--dataset_path={rows}", f"--output_dir={output}"]
    return fixed + [f"--{name}={value}" for name, value in given.items()]


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([[5, 6, 7, 8, 2]])).logits


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------------- data


def test_answers_are_learnt_and_prompts_are_not(tiny_model, rows_file):
    tokenizer = load_tokenizer(str(tiny_model))
    template = load_template("tokenizer", tokenizer)
    settings = SFTSettings(model_name=str(tiny_model))
    examples = read_examples(str(rows_file), settings, tokenizer, template)
    third = examples[2]  # "What is 2 + 3?", "5"
    assert tokenizer.decode(third["input_ids"]) == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    five, end = tokenizer("5")["input_ids"][0], tokenizer.eos_token_id
    assert third["labels"] == [-100] * (len(third["input_ids"]) - 2) + [five, end]
    assert third["input_ids"][-2:] == [five, end] and end == 2
    batch = collate([{"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}, {"input_ids": [5], "labels": [5]}], pad=2)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9], [5, -100, -100]]


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("It rains. It pours.", 2, "It rains."),
        ("It rains. It pours.", 3, "It rains."),
        ("It rains. It pours.", 4, "It rains. It pours."),
        ("It rains and it pours. Yes.", 4, None),
        ('He said "Go!" Then he left.', 4, 'He said "Go!"'),
        ("Mr. Fox met J. Hare. They ran.", 5, "Mr. Fox met J. Hare."),
        ("1. Wear a hat. 2. Go.", 4, "1. Wear a hat."),
        ("It is 3.5 e.g. here. Good.", 5, "It is 3.5 e.g. here."),
        ("no full stop", 3, "no full stop"),
        ("no full stop", 2, None),
    ],
)
def test_first_sentences(text, limit, expected):
    assert first_sentences(text, limit) == expected


def test_rows_that_are_left_out_are_counted(tiny_model, tmp_path, capsys):
    tokenizer = load_tokenizer(str(tiny_model))
    template = load_template("tokenizer", tokenizer)
    path = tmp_path / "rows.json"
    long = {"input": "word " * 200, "output": "Short."}
    path.write_text(json.dumps([*ROWS, {"input": "Say nothing.", "output": " "}, long]), encoding="utf-8")
    settings = SFTSettings(model_name="m", answer_words=7, max_length=100, empty_outputs="drop")
    examples = read_examples(str(path), settings, tokenizer, template)
    answers = [tokenizer.decode([label for label in row["labels"] if label != NOT_LEARNT]) for row in examples]
    assert answers == ["Paris<|im_end|>", "5<|im_end|>", "Call her Marmalade, for her orange coat.<|im_end|>", "geese<|im_end|>",
                       "You have come further than you think.<|im_end|>"]  # fmt: skip
    assert capsys.readouterr().out == (
        f"{path}: 3 of 8 rows are left out (1: output is empty; 1: first sentence has more than 7 words; "
        "1: prompt and answer have more than 100 tokens)\n"
    )
    with pytest.raises(InputError, match=r"no row is left to learn from \(8: prompt and answer have more than 3 tokens\)"):
        path.write_text(json.dumps([*ROWS, *ROWS[:2]]), encoding="utf-8")
        read_examples(str(path), SFTSettings(model_name="m", max_length=3), tokenizer, template)


def test_batches_hold_rows_of_similar_length():
    lengths = [place * 7 % 50 for place in range(50)]
    sampler = ByLength(lengths, batch=4, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again and sorted(first) == list(range(50))
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(50))
    spreads = [max(part) - min(part) for start in range(0, 48, 4) for part in [[lengths[place] for place in first[start : start + 4]]]]
    assert max(spreads) <= 4


# --------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("rank", [4, 0])
def test_a_model_folder_that_every_stage_takes(tiny_model, rows_file, tmp_path, rank):
    output = tmp_path / "sft"
    done = run_script(*words(tiny_model, rows_file, output, lora_r=rank, epochs=6, bf16="true" if rank == 0 else "false"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 rows to learn from" in done.stdout and not (tmp_path / "sft.unfinished").exists()
    record = read_json(output / "training_record.json")
    assert record["after"] < record["before"] - 0.1 and record["steps"] == 18
    assert record["dtype"] == ("bf16" if rank == 0 else "float32")
    assert {"commit", "packages", "command", "seed", "settings", "history", "data"} <= set(record)
    assert f"{record['before']:.3f} before, {record['after']:.3f} after" in (output / "README.md").read_text(encoding="utf-8")
    assert not (output / "adapter_config.json").exists()
    assert load_tokenizer(str(output)).chat_template == load_tokenizer(str(tiny_model)).chat_template
    assert (logits(output) - logits(tiny_model)).abs().max() > 0.1
    config, base = read_json(output / "config.json"), read_json(tiny_model / "config.json")
    assert {name for name in config if config[name] != base.get(name)} <= {"transformers_version", "_name_or_path"}
    # The same command again: nothing to do. Another one is refused.
    done = run_script(*words(tiny_model, rows_file, output, lora_r=rank, epochs=6, bf16="true" if rank == 0 else "false"))
    assert done.returncode == 0 and "is there already, made as it would be now" in done.stdout
    done = run_script(*words(tiny_model, rows_file, output, lora_r=rank, epochs=5))
    assert done.returncode == 2 and "exists already, made otherwise (--overwrite=true replaces it)" in done.stderr
    # What this command did not make is not replaced.
    done = run_script(*words(tiny_model, rows_file, tmp_path, lora_r=rank, overwrite="true"))
    assert done.returncode == 2 and "is there and is no model of this command, expected another place" in done.stderr and output.is_dir()


def test_the_losses_and_the_merged_folder_are_those_of_model_and_adapter(tiny_model, rows_file, tmp_path):
    """The held-out loss at the start is the base model's; at the end it is the folder's; the folder is base and adapter."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from train_sft import write_model

    output = tmp_path / "sft"
    done = run_script(*words(tiny_model, rows_file, output, lora_r=4))
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer = load_tokenizer(str(tiny_model))
    examples = read_examples(str(rows_file), SFTSettings(model_name="m"), tokenizer, load_template("tokenizer", tokenizer))

    def loss(folder: Path) -> float:
        model, losses = AutoModelForCausalLM.from_pretrained(folder).eval(), []
        for row in examples:
            with torch.no_grad():
                found = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(dim=-1)
            losses += [-found[place, label].item() for place, label in enumerate(row["labels"][1:]) if label != NOT_LEARNT]
        return sum(losses) / len(losses)

    record = read_json(output / "training_record.json")
    assert record["before"] == pytest.approx(loss(tiny_model), abs=1e-4)
    assert record["after"] == pytest.approx(loss(output), abs=1e-4)

    # An adapter, merged by the same function.
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    settings = SFTSettings(model_name=str(tiny_model), output_dir=str(tmp_path / "merged"))
    write_model(tmp_path / "adapter", settings, tokenizer, {"record": 1}, "card")
    with torch.no_grad():
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter").eval()
        expected = whole(torch.tensor([[5, 6, 7, 8, 2]])).logits
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_kept_alone_is_that_of_the_merged_model(tiny_model, rows_file, tmp_path):
    """--merge=false and merge_adapter.py make the folder of --merge=true, as near as LoRA in bf16 is."""
    whole, alone, merged = (tmp_path / name for name in ("whole", "alone", "merged"))
    for output, merge in ((whole, "true"), (alone, "false")):
        done = run_script(*words(tiny_model, rows_file, output, lora_r=4, bf16="true", merge=merge))
        assert done.returncode == 0, done.stderr[-3000:]
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "training_record.json"]
    assert sorted(file.name for file in alone.iterdir()) == files
    assert {matrix.dtype for matrix in load_file(alone / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert "an adapter, of which `merge_adapter.py` makes a model folder" in (alone / "README.md").read_text(encoding="utf-8")
    done = run_script("merge_adapter.py", alone, f"--output_dir={merged}")
    assert done.returncode == 0 and done.stdout.endswith(f"{merged}\n"), done.stderr
    assert load_tokenizer(str(merged)).chat_template == load_tokenizer(str(tiny_model)).chat_template
    record = read_json(merged / "training_record.json")["trained_on"]
    assert record["dataset_path"] == str(rows_file) and len(record["data"]["dataset_path"]) == 64
    moved = (logits(whole) - logits(tiny_model)).abs().max()
    assert (logits(merged) - logits(whole)).abs().max() <= 0.02 * moved
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    done = run_script("merge_adapter.py", alone, f"--output_dir={tmp_path}/x", f"--base_model_name={other}")
    assert done.returncode == 2 and f"trained on {tiny_model}, whose weights were others than those of {other}" in done.stderr


@pytest.mark.parametrize("rank", [4, 0])
def test_a_resumed_training_equals_an_uninterrupted_one(tiny_model, rows_file, tmp_path, rank):
    settings = {"lora_r": rank, "lora_dropout": 0.1, "epochs": 40, "save_steps": 10, "batch_size": 1, "gradient_accumulation_steps": 2}
    done = run_script(*words(tiny_model, rows_file, tmp_path / "whole", **settings))
    assert done.returncode == 0, done.stderr[-3000:]
    command = words(tiny_model, rows_file, tmp_path / "sft", **settings)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    unfinished, deadline = tmp_path / "sft.unfinished", time.monotonic() + 200
    while not any((path / "trainer_state.json").is_file() for path in unfinished.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (unfinished / "checkpoint-9999").mkdir()  # one that a kill left unfinished
    other = run_script(*words(tiny_model, rows_file, tmp_path / "sft", **{**settings, "epochs": 3}))
    assert other.returncode == 2 and "sft.unfinished: a training with other settings, rows or processes" in other.stderr
    done = run_script(*command)
    assert done.returncode == 0 and f"resumes from {unfinished}/checkpoint-" in done.stdout, done.stderr[-3000:]
    assert weights(tmp_path / "sft") == weights(tmp_path / "whole")
    losses = [[(row["step"], row.get("loss"), row.get("eval_loss")) for row in read_json(tmp_path / name / "training_record.json")["history"]
               if "train_loss" not in row] for name in ("sft", "whole")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) > 40


def test_a_training_that_ended_before_its_last_measurement_measures_on_resuming(tiny_model, rows_file, tmp_path, monkeypatch):
    """The Trainer saves the last step before it measures the epoch's loss: what resumes from there has no step left."""
    import train_sft

    def run(output: Path) -> int | str | None:
        monkeypatch.setattr(sys, "argv", words(tiny_model, rows_file, output, epochs=2, save_steps=1))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        train_sft.main()

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train_sft, "write_model", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "sft")
    (checkpoint,) = (tmp_path / "sft.unfinished").glob("checkpoint-*")
    state = read_json(checkpoint / "trainer_state.json")
    assert state["global_step"] == state["max_steps"] > max(row["step"] for row in state["log_history"] if "eval_loss" in row)
    run(tmp_path / "sft")
    run(tmp_path / "whole")
    found, expected = (read_json(tmp_path / name / "training_record.json") for name in ("sft", "whole"))
    assert (found["before"], found["after"]) == (expected["before"], expected["after"])
    assert found["after"] != found["before"]


@pytest.mark.parametrize("launch", ["ddp-cpu", "zero2-bf16-cpu"])
def test_two_processes_train_one_model(tiny_model, rows_file, tmp_path, launch):
    settings = {"lora_r": 4 if launch == "ddp-cpu" else 0, "batch_size": 1, "epochs": 6}
    done = run_script(*words(tiny_model, rows_file, tmp_path / "two", **settings), launcher=launcher(launch))
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_json(tmp_path / "two" / "training_record.json")
    assert record["processes"] == 2 and record["steps"] == 18
    assert record["after"] < record["before"] - 0.1
    assert done.stdout.count("6 rows to learn from") == 1  # one writer
    if launch == "ddp-cpu":  # two processes with one row each learn what one with two does
        done = run_script(*words(tiny_model, rows_file, tmp_path / "one", **{**settings, "batch_size": 2}))
        assert done.returncode == 0, done.stderr[-3000:]
        assert record["after"] == pytest.approx(read_json(tmp_path / "one" / "training_record.json")["after"], abs=2e-3)
    else:
        assert record["dtype"] == "bf16"


def test_a_loss_that_is_not_finite_stops_the_training(tiny_model, rows_file, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = run_script(*words(broken, rows_file, tmp_path / "sft"))
    assert done.returncode == 1 and "error: the held-out loss is nan" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "sft").exists()
    done = run_script(*words(tiny_model, rows_file, tmp_path / "sft", learning_rate=1e30))
    assert done.returncode == 1 and "error: the loss is nan at step" in done.stderr and "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line(tiny_model, rows_file, tmp_path):
    def refused(message: str, model: Path | str = tiny_model, rows: Path = rows_file, **settings) -> None:
        done = run_script(*words(model, rows, tmp_path / "sft", **settings))
        assert done.returncode == 2, done.stderr[-2000:]
        assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "sft.unfinished").exists()

    rows = tmp_path / "bad.json"
    rows.write_text(json.dumps([ROWS[0], {"input": "No answer."}]), encoding="utf-8")
    refused("bad.json: row 2: field 'output' is missing, expected text", rows=rows)
    rows.write_text(json.dumps([ROWS[0], {"input": "No answer.", "output": "\n"}]), encoding="utf-8")
    refused("bad.json: row 2: field 'output' is empty, expected an answer (--empty_outputs=drop leaves such rows out)", rows=rows)
    refused("no row is left to learn from (6: prompt and answer have more than 4 tokens)", max_length=4)
    refused("no rows left to train on or to hold out", heldout_path="", heldout_share=1e-9)
    refused("nowhere.json: no such file", rows=tmp_path / "nowhere.json")
    refused("no such folder, expected a model's folder or its hub name", model="./nowhere")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}', encoding="utf-8")
    refused("adapter is an adapter, expected a whole model", model=adapter)
    refused("unknown chat template 'klingon'", chat_template_name="klingon")
    for source, message in [
        ("{{ raise_exception('a system turn comes first') }}", "it cannot be rendered (TemplateError: a system turn comes first)"),
        ("{% for x in %}", "it cannot be rendered (TemplateSyntaxError"),
        ("Hello", "a prompt holds the instruction 0 times, expected once"),
        ("", "this tokenizer has no chat template of its own"),
    ]:
        model = tmp_path / "model"
        shutil.copytree(tiny_model, model, dirs_exist_ok=True)
        (model / "chat_template.jinja").write_text(source, encoding="utf-8")
        if not source:
            (model / "chat_template.jinja").unlink()
        refused(message, model=model)
    refused("is the model to train, expected another folder", model=tiny_model, output_dir=tiny_model)
    refused("--lora_r is -1, expected 0 or more", lora_r=-1)
    refused("--merge is false and --lora_r is 0, expected LoRA to keep alone", lora_r=0, merge="false")


def test_rows_that_the_model_has_no_room_for():
    model = ModelFacts("m", 6, 400, None)
    model.require_fit([[1, 399], [5] * 6], 512)
    with pytest.raises(
        InputError, match="m: it has 6 positions, and the longest row has 7 tokens: --max_length is 512, expected at most 6"
    ):
        model.require_fit([[5] * 7], 512)
    with pytest.raises(InputError, match="m: the tokenizer gives id 400, expected less than the model's vocabulary of 400"):
        model.require_fit([[5, 400]], 512)
