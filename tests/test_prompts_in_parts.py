"""Rows whose prompt is spread over fields: joined the same way wherever rows are read, and said once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import CHATML, REPOSITORY, run_script
from test_pipeline import ppo_words

from parts import rows as rows_module
from parts.annotators import rows_and_instructions
from parts.chat_templates import ChatTemplate, load_template
from parts.data_checks import examine, index_prompts
from parts.errors import InputError
from parts.ppo_data import read_prompts
from parts.rewards import reward_batch
from parts.rows import match_rows, one_prompt, read_rows

# As Stanford's format has it (and alpaca_eval, issue 48).
ALPACA = [
    {"instruction": "Translate the sentence to French.", "input": "Good morning, everyone.", "output": "Bonjour."},
    {"instruction": "Give the antonym.", "input": "hot", "output": "cold"},
    {"instruction": "Name a river.", "input": "", "output": "Loire"},
    {"instruction": "Name a cat.", "input": None, "output": "Tom"},
]
WHOLE = ["Translate the sentence to French.\n\n### Input:\nGood morning, everyone.", "Give the antonym.\n\n### Input:\nhot", "Name a river.",
         "Name a cat."]  # fmt: skip
CHAT = [
    {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "Loire"}]},
    {
        "messages": [
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Name a cat."},
        ]
    },
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a dog."}], "output": "Rex"},
]
ASKED = ["Name a river.", "User: Hi.\n\nAssistant: Hello.\n\nUser: Name a cat.", "System: Be brief.\n\nUser: Name a dog."]


@pytest.fixture(autouse=True)
def nothing_said():
    rows_module._said.clear()


@pytest.fixture
def alpaca(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(ALPACA), encoding="utf-8")
    return path


def test_alpaca_rows_wherever_rows_are_read(alpaca, capsys):
    assert [row["input"] for row in read_rows(alpaca, {"input": None})] == WHOLE
    assert [row["instruction"] for row in read_rows(alpaca, {"instruction": None})] == WHOLE
    assert capsys.readouterr().err == f"{alpaca}: 4 prompts are put together from 'instruction' and 'input', or from 'messages'\n"
    assert rows_and_instructions(str(alpaca))[1] == WHOLE
    assert [row["output"] for row in match_rows(alpaca, WHOLE[::-1], {"output": None}, "x")] == ["Tom", "Loire", "cold", "Bonjour."]
    assert len(index_prompts(alpaca).held_by(index_prompts(alpaca))[0]) == 4
    report = examine(alpaca)
    assert report.rows == 4 and not report.errors and report.warnings == {"joined prompts": 1}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "a", "input": "b"}, "a\n\n### Input:\nb"),
        ({"instruction": "a", "input": " \n"}, "a"),
        ({"instruction": "", "input": "b"}, "b"),
        ({"instruction": "a", "input": "a"}, "a"),
        ({"instruction": "a", "input": "a\n\n### Input:\nb"}, "a\n\n### Input:\nb"),  # joined already
        ({"input": "b"}, "b"),
        ({"instruction": "a", "input": ["b"]}, ["b"]),  # refused where the field is checked
    ],
)
def test_one_prompt(row, prompt):
    whole = one_prompt(row, 1)
    assert whole.get("input") == prompt and one_prompt(whole, 1) == whole


def test_messages(tmp_path, tiny_model):
    from parts.models import load_tokenizer

    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHAT), encoding="utf-8")
    rows = read_rows(path, {"instruction": None})
    assert [row["instruction"] for row in rows] == ASKED
    assert [row.get("output") for row in rows] == ["Loire", None, "Rex"]
    assert one_prompt({**CHAT[0], "output": None}, 1)["output"] == "Loire"  # as pandas writes an empty cell
    tokenizer = load_tokenizer(str(tiny_model))
    own = load_template("tokenizer", tokenizer)
    prompts = read_prompts(str(path), {}, tokenizer, own, 512)
    expected = [
        tokenizer.apply_chat_template(rows[place]["messages"], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        for place in range(3)
    ]
    assert [prompt.tokens for prompt in prompts] == expected
    mistral = load_template("mistral")
    assert mistral.render_row(rows[1], "instruction") == "[INST] Hi. [/INST] Hello.</s>[INST] Name a cat. [/INST]"
    assert mistral.render_row(rows[2], "instruction") == "[INST] Be brief.\n\nName a dog. [/INST]"
    assert mistral.render_row(rows[0], "instruction") == "[INST] Name a river. [/INST]"
    turns = [
        ("system", "Be brief."),
        ("assistant", "Hello."),
        ("user", "Hi."),
        ("assistant", "Yes?"),
        ("system", "It is late."),
        ("user", "Time?"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in turns], "instruction": ""}
    assert load_template("alpaca").render_row(row, "instruction").split("\n\n", 1)[1] == (
        "### Response:\nHello.\n\n### Instruction:\nBe brief.\n\nHi.\n\n### Response:\nYes?\n\n"
        "### Instruction:\nIt is late.\n\nTime?\n\n### Response:"
    )


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("hello", "row 1: field 'messages' is no list of {role, content}, expected texts"),
        ([{"role": "user", "content": None}], "row 1: field 'messages' is no list"),
        ([{"role": "assistant", "content": "a"}], "row 1: field 'messages' has the roles ['assistant'], expected system, user, assistant"),
        ([{"role": "tool", "content": "a"}, {"role": "user", "content": "a"}], "has the roles ['tool', 'user']"),
        ([], "has the roles []"),
    ],
)
def test_messages_that_are_none(tmp_path, messages, told):
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": messages}]), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / "chat.json", {"input": None})
    assert told in str(caught.value)


def test_a_template_with_several_turns_is_the_tokenizer_s():
    template = ChatTemplate("tokenizer", CHATML, ("<|im_end|>",), ("<|im_start|>",))
    assert template.render_row(one_prompt(CHAT[2], 1), "input") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a dog.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_rows_that_differ_are_said(tmp_path, capsys):
    path = tmp_path / "eval.json"
    rows = [{"instruction": "a", "output": "1"}, {"instruction": "b", "output": "2"}, {"instruction": "a", "output": "3"}]
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert [row["output"] for row in match_rows(path, ["b", "a"], {"output": None}, "x")] == ["2", "3"]
    assert "1 instructions come twice and differ in output: the last row of each counts" in capsys.readouterr().err
    assert match_rows(path, ["b", "a"], {}, "x")[1]["output"] == "3"  # a reward function reads all columns
    assert "1 instructions come twice and differ in other columns: the last row of each counts" in capsys.readouterr().err
    assert match_rows(path, ["b"], {"output": None}, "x")[0]["output"] == "2"
    assert match_rows(path, ["a", "b", "a"], {"output": None}, "x") == rows  # in the file's own order nothing is ambiguous
    assert capsys.readouterr().err == ""


def test_columns_named_as_ours(capsys):
    batch = reward_batch(["q"], ["r"], [{"input": "q", "response": "theirs", "prompts": "x", "level": 3}])
    assert batch == {"query": ["q"], "response": ["r"], "level": [3]}
    said = capsys.readouterr().err
    assert "the rows' column 'response' is left out" in said and "the rows' column 'prompts' is left out" in said
    with pytest.raises(InputError, match="row 2: fields 'reference' and 'output' differ"):
        reward_batch(["q", "p"], ["r", "s"], [{"output": "a", "reference": "a"}, {"output": "a", "reference": "b"}])


def test_the_commands_ask_the_whole_prompt(alpaca, tiny_model, tmp_path):
    """PPO used to train on the input alone, and evaluation to ask the instruction without it."""
    shown = subprocess.run([sys.executable, REPOSITORY / "data" / "prepare_data.py", alpaca, f"--output={tmp_path}/x.json"],
                           capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert shown.returncode == 0 and "4 prompts are put together" in shown.stderr, shown.stderr
    assert [row["input"] for row in json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))] == WHOLE
    done = run_script(*ppo_words(tiny_model, alpaca, tmp_path / "alp", overall_steps=1, save_freq=1))
    assert done.returncode == 0 and done.stderr.count("4 prompts are put together") == 1, done.stderr
    seen = json.loads((tmp_path / "alp_step_1" / "development_rollouts.json").read_text(encoding="utf-8"))
    assert [row["input"] for row in seen] == WHOLE
    done = run_script("evaluation.py", f"--base_model_name={tiny_model}", "--peft_model_name", tmp_path / "alp_step_1", f"--data_path={alpaca}",
                      "--max_new_tokens=4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rollouts = json.loads((tmp_path / "alp_step_1" / "alpaca-eval-alp_step_1.json").read_text(encoding="utf-8"))
    assert [row["instruction"] for row in rollouts] == WHOLE
