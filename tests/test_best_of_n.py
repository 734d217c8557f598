"""Best-of-n: several samples a row, the estimator against every subset, the command from samples to table, and rejection sampling."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, ROWS

from parts.errors import run_main
from parts.files import read_json
from parts.generation import Decoding, row_draws, sample
from parts.rows import read_rows

SAMPLES = 6


def run_inside(monkeypatch, *words: object) -> int:
    """A command line run in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.chdir(REPOSITORY)
    try:
        run_main(importlib.import_module(Path(str(words[0])).stem).main)
    except SystemExit as ended:
        return ended.code
    return 0


def evaluation_words(model: Path, data: Path, output: Path, samples: int, *more: str) -> list[object]:
    return ["evaluation.py", f"--base_model_name={model}", f"--output_dir={output}", f"--data_path={data}", "--max_new_tokens=12",
            "--temperature=1", "--chat_template_name=tokenizer", f"--num_samples={samples}", *more]  # fmt: skip


@pytest.fixture
def sampled(tiny_model, eval_file, tmp_path, monkeypatch) -> Path:
    """The tiny base model's samples."""
    assert run_inside(monkeypatch, *evaluation_words(tiny_model, eval_file, tmp_path / "out", SAMPLES)) == 0
    return tmp_path / "out" / "model" / "samples-model.jsonl"


# ----------------------------------------------------------------------------------------------------------- the samples


def test_each_sample_is_its_own_and_the_first_is_the_alpaca_file(tiny_model, sampled, eval_file, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    from parts.chat_templates import encode_prompts, load_template
    from parts.models import load_tokenizer

    rows = read_rows(sampled, {"instruction": None})
    assert {name: value for name, value in rows[1].items() if name != "responses"} == {
        "dataset": "tiny", "instruction": ROWS[1]["input"], "reference": ROWS[1]["output"], "qtype": "OPENENDED", "generator": "model",
    }  # fmt: skip
    # Each alone, without padding, from its own draws.
    tokenizer = load_tokenizer(str(tiny_model))
    template = load_template("tokenizer", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for place, prompt in enumerate(encode_prompts(tokenizer, [template.render(row["input"]) for row in ROWS])):
        for number in range(SAMPLES):
            (ids,) = sample(model, [prompt], Decoding(12), row_draws(42, [place], 12, "model", number), tokenizer.eos_token_id)
            assert rows[place]["responses"][number] == {
                "output": tokenizer.decode(ids, skip_special_tokens=True).strip(),
                "finish_reason": "stop" if ids[-1] == tokenizer.eos_token_id else "length",
            }
    meta = read_json(sampled.with_name("samples-model.meta.json"))
    assert (meta["rows"], meta["samples"], meta["adapter"], meta["model"]) == (6, SAMPLES, None, str(tiny_model))

    # The first ones are what one sample alone gives, bit by bit; and it is what this call would make.
    beside = sampled.with_name("alpaca-eval-model.json").read_bytes()
    assert run_inside(monkeypatch, *evaluation_words(tiny_model, eval_file, tmp_path / "alone", 1)) == 0
    assert (tmp_path / "alone" / "model" / "alpaca-eval-model.json").read_bytes() == beside
    assert sorted(path.name for path in (tmp_path / "alone" / "model").iterdir()) == [
        "alpaca-eval-model.json",
        "alpaca-eval-model.meta.json",
    ]
    assert [row["output"] for row in json.loads(beside)] == [row["responses"][0]["output"] for row in rows]
    capsys.readouterr()
    assert run_inside(monkeypatch, *evaluation_words(tiny_model, eval_file, tmp_path / "out", 1)) == 0
    assert run_inside(monkeypatch, *evaluation_words(tiny_model, eval_file, tmp_path / "out", SAMPLES)) == 0
    assert capsys.readouterr().out.count("is there already, made as it would be now") == 2
    assert run_inside(monkeypatch, *evaluation_words(tiny_model, eval_file, tmp_path / "out", 3)) == 2
    assert "samples-model.jsonl: exists already, made otherwise" in capsys.readouterr().err


def test_samples_resume_and_fewer_are_the_first_of_more(tiny_model, sampled, eval_file, tmp_path, monkeypatch, capsys):
    """A call that stops on the way has its finished responses; the next one makes the others, and what is there of them already stays."""
    from parts import rollouts

    expected = sampled.read_text(encoding="utf-8")
    append, count = rollouts.JsonLines.append, []

    def stopping(self, *values):
        append(self, *values)
        count.append(values)
        if len(count) == 9:
            raise KeyboardInterrupt

    words = [*evaluation_words(tiny_model, eval_file, tmp_path / "out", SAMPLES), "--overwrite=true", "--batch_size=2"]
    monkeypatch.setattr(rollouts.JsonLines, "append", stopping)
    assert run_inside(monkeypatch, *words) == 130
    monkeypatch.undo()
    assert sampled.read_text(encoding="utf-8") == expected
    sampled.write_text("", encoding="utf-8")
    capsys.readouterr()
    assert run_inside(monkeypatch, *words) == 0
    assert f"samples-model.jsonl: 9 of {6 * SAMPLES} responses are known from an earlier start" in capsys.readouterr().out
    assert sampled.read_text(encoding="utf-8") == expected and not list(sampled.parent.glob("*.partial"))
    assert run_inside(monkeypatch, *evaluation_words(tiny_model, eval_file, tmp_path / "three", 3)) == 0
    fewer = read_rows(tmp_path / "three" / "model" / "samples-model.jsonl", {})
    assert [row["responses"] for row in fewer] == [json.loads(line)["responses"][:3] for line in expected.splitlines()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_samples=0"], "--num_samples is 0, expected at least 1"),
        (["--num_samples=2", "--temperature=0"], "--num_samples is 2 at temperature 0, expected a higher one"),
        (["--num_samples=2", "--evaluations=superni"], "--num_samples is 2, expected --evaluations alpaca with it"),
    ],
)
def test_samples_that_cannot_be(words, message, eval_file, monkeypatch, capsys):
    assert run_inside(monkeypatch, "evaluation.py", "--base_model_name=nobody/nothing", f"--data_path={eval_file}", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
