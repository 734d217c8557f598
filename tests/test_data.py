"""Our own rows: schema, numbers, balance, lengths, and no prompt twice, nor nearly twice."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest
from conftest import REPOSITORY

from parts.rows import QTYPES, read_rows

DATA = REPOSITORY / "data"
PAIR = {"input": None, "output": None, "qtype": QTYPES}
EVALUATION = {"dataset": None, "instruction": None, "output": None, "generator": None, "qtype": QTYPES}


@pytest.fixture(scope="module")
def rows():
    """Training, development and evaluation rows."""
    return read_rows(DATA / "train.json", PAIR), read_rows(DATA / "dev.json", PAIR), read_rows(DATA / "eval.json", EVALUATION)


@pytest.fixture(scope="module")
def prompts(rows):
    """All prompts of the three files."""
    train, dev, evaluated = rows
    return [row["input"] for row in train + dev] + [row["instruction"] for row in evaluated]


def test_our_rows(rows):
    train, dev, evaluated = rows
    assert (len(train), len(dev), len(evaluated)) == (600, 128, 128)
    assert all(set(row) == {"input", "output", "qtype"} for row in train + dev)
    for texts in ([row[field] for row in part for field in row] for part in rows):
        assert all(text.strip() == text != "" for text in texts)
        assert not any(re.search(r"[ \t]$", text, re.MULTILINE) for text in texts)


def test_half_of_the_rows_are_of_either_kind(rows):
    assert [Counter(row["qtype"] for row in part)["OPENENDED"] for part in rows] == [301, 64, 64]
    # Training reads the file in order where it is not shuffled: the shares hold throughout it.
    hundreds = [rows[0][start : start + 100] for start in range(0, 600, 100)]
    assert all(40 <= Counter(row["qtype"] for row in part)["OPENENDED"] <= 60 for part in hundreds)


def test_no_prompt_comes_twice(prompts):
    assert len({prompt.lower() for prompt in prompts}) == len(prompts) == 856
    assert sum("\n\n### Input:\n" in prompt for prompt in prompts) == 265
    # A cheap stand-in for the embeddings of data/README.md: no two prompts share half of their words (the most is 0.39).
    words = [set(re.findall(r"\w+", prompt.lower())) for prompt in prompts]
    assert max(len(a & b) / len(a | b) for a, b in combinations(words, 2)) < 0.5


def test_prompts_that_the_demo_trains_on(rows):
    """As many as data/README.md says have fewer tokens than `max_prompt_length` of configs/demo.yaml."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "models" / "SmolLM2-135M-Instruct")
    chats = [[[{"role": "user", "content": row.get("input") or row["instruction"]}] for row in part] for part in rows]
    tokens = [tokenizer.apply_chat_template(part, add_generation_prompt=True, return_dict=False) for part in chats]
    assert [sum(len(prompt) < 80 for prompt in part) for part in tokens] == [472, 99, 128]
