"""Our own rows: schema, numbers, balance, and no prompt in two files."""

from __future__ import annotations

from collections import Counter

from conftest import REPOSITORY

from records import QTYPES, read_rows

DATA = REPOSITORY / "data"


def test_our_rows():
    pair = {"input": None, "output": None, "qtype": QTYPES}
    evaluation = {"dataset": None, "instruction": None, "output": None, "generator": None, "qtype": QTYPES}
    train, dev = read_rows(DATA / "train.json", pair), read_rows(DATA / "dev.json", pair)
    evaluated = read_rows(DATA / "eval.json", evaluation)
    assert (len(train), len(dev), len(evaluated)) == (346, 64, 64)
    for rows in (train, dev, evaluated):
        share = Counter(row["qtype"] for row in rows)["OPENENDED"] / len(rows)
        assert 0.45 <= share <= 0.55
        assert all(row["output"].strip() == row["output"] != "" for row in rows)
    prompts = [row["input"] for row in train + dev] + [row["instruction"] for row in evaluated]
    assert len({prompt.lower() for prompt in prompts}) == len(prompts) == 474
    assert sum("\n\n### Input:\n" in prompt for prompt in prompts) > 100
    assert all(set(row) == {"input", "output", "qtype"} for row in train + dev)
