"""The proxy reward: literal numbers for every feature, worked cases where the real data is at hand, and its error lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from chat_templates import load_template
from records import InputError
from reward_model import (
    ReversedEngineeredRewardForInference,
    length_incentive,
    load_relevance_model,
    query_text,
    relevance,
    repetition_penalty,
    rescale,
)

MINILM = str(REPOSITORY / "models" / "all-MiniLM-L6-v2")
FULL = {"repetition_penalty": True, "relevance_scaling": True, "reward_branching": True}
REAL_DATA = os.environ.get("RER_REAL_DATA")
BATCH = {
    "query": ["Name the capital of France.", "Write a line about rain.", "What is 2 + 3?"],
    "response": ["Paris is the capital.", "Rain, rain, rain on the roof all night long.", "5"],
    "qtype": ["CONSTRAINED", "OPENENDED", "CONSTRAINED"],
    "reference": ["Paris", "Rain drums softly on the tin roof all night.", "5"],
}


@pytest.mark.parametrize(
    ("tokens", "length", "repetition"),
    [
        ([], 0.0, 1.0),
        (["a"], 0.01, 1.0),
        (["a", "b"], 0.02, 1.0),
        (["a", "b", "c"], 0.03, 1.0),
        (["na"] * 10, 0.10, 1 / 8),
        (["a", "b", "a", "b", "a"], 0.05, 2 / 3),
        (["x", "y", "z"] * 100, 3.0, 3 / 298),
    ],
)
def test_length_incentive_and_repetition_penalty(tokens, length, repetition):
    assert length_incentive(tokens) == pytest.approx(length, abs=1e-12)
    assert repetition_penalty(tokens) == pytest.approx(repetition, abs=1e-12)


def test_rescale_maps_three_and_a_half_to_the_length_limit():
    assert rescale(3.5, 512) == pytest.approx(5.12)
    assert rescale(7.0, 256) == pytest.approx(5.12)
    assert rescale(-3.5, 512) == pytest.approx(-5.12)  # linear, not clipped


def test_relevance_is_a_raw_dot_product():
    anchors, responses = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[4.0, 5.0], [-1.0, 9.0]])
    assert relevance(anchors, responses) == [14.0, -3.0]


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("Say hi.", "Say hi."),
        ("Fix it.\n\n### Input:\nteh cat", "Fix it. teh cat"),
        ("A : B ratio </s> now", "A B ratio now"),
        ("text with ### Instruction inside", "text with inside"),
        ("by following these steps:", "by following these steps"),
        (load_template("alpaca").render("Fix it.\n\n### Input:\nteh cat"), "Fix it. teh cat"),
    ],
)
def test_query_text(query, text):
    assert query_text(query, load_template("alpaca")) == text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.05, 0.11, 0.01]),
        ({"length_incentive": False, "repetition_penalty": True}, [1.0, 7 / 9, 1.0]),
        ({"repetition_penalty": True}, [0.05, 0.11 * 7 / 9, 0.01]),
    ],
)
def test_composition_without_relevance(settings, expected):
    batch = {"response": ["Paris is the capital.", "rain , rain , rain , on the tin roof tonight", "5"]}
    assert ReversedEngineeredRewardForInference("alpaca", **settings).get_reward(batch) == pytest.approx(expected)


@pytest.fixture(scope="module")
def full_reward():
    return ReversedEngineeredRewardForInference("alpaca", relevance_model_name=MINILM, device="cpu", **FULL)


def test_composition_with_relevance_and_branching(full_reward):
    """Against embeddings made by transformers alone: mean over the mask, no normalisation."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(MINILM), AutoModel.from_pretrained(MINILM)

    def embed(text):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).last_hidden_state[0].mean(dim=0)

    anchors = ["Paris", "Write a line about rain.", "5"]
    rel = [float(embed(anchor) @ embed(response)) for anchor, response in zip(anchors, BATCH["response"])]
    table = full_reward.score(BATCH)
    assert table["branch"] == ["CONSTRAINED", "OPENENDED", "CONSTRAINED"]
    assert table["query_relevance"] == [None, pytest.approx(rel[1], rel=1e-4), None]
    assert table["reference_relevance"] == [pytest.approx(rel[0], rel=1e-4), None, pytest.approx(rel[2], rel=1e-4)]
    # "Rain , rain , rain on the roof all night long ." has 12 tokens and 10 trigrams, all different.
    assert table["total"] == pytest.approx([rel[0] / 3.5 * 5.12, 0.12 * rel[1], rel[2] / 3.5 * 5.12], rel=1e-4)
    assert full_reward.get_reward(BATCH) == table["total"]


def test_a_row_scores_the_same_alone_and_in_any_order(full_reward):
    together = full_reward.get_reward(BATCH)
    alone = [full_reward.get_reward({name: [values[row]] for name, values in BATCH.items()})[0] for row in range(3)]
    reverse = full_reward.get_reward({name: values[::-1] for name, values in BATCH.items()})[::-1]
    assert alone == pytest.approx(together, rel=1e-5)
    assert reverse == pytest.approx(together, rel=1e-5)


def test_a_rendered_prompt_scores_as_its_instruction(full_reward):
    template = load_template("alpaca")
    rendered = {**BATCH, "query": [template.render(query) for query in BATCH["query"]]}
    assert full_reward.get_reward(rendered) == full_reward.get_reward(BATCH)


def test_texts_are_truncated_on_the_left():
    model = load_relevance_model(MINILM, "cpu")
    assert model.max_seq_length == 512
    tail = " ".join(["apple"] * 600)
    both = model.encode([f"{' '.join(['stone'] * 600)} {tail}", tail], convert_to_tensor=True)
    assert torch.allclose(both[0], both[1], atol=1e-5)  # 510 apples are all that either keeps


def test_responses_are_cut_at_stop_strings_for_counting_only():
    response = "one two three\n\n### Instruction:\nfour five"
    cut = ReversedEngineeredRewardForInference("alpaca").get_reward({"response": [response]})
    uncut = ReversedEngineeredRewardForInference("alpaca", do_strip=False).get_reward({"response": [response]})
    assert cut == [0.03]
    assert uncut == [0.08]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qtype": None}, "column 'qtype' is missing"),
        ({"reference": ["Paris"]}, "column 'reference' has 1 rows, expected 3"),
        ({"qtype": ["CONSTRAINED", "OPEN", "CONSTRAINED"]}, "row 2: qtype is 'OPEN', expected OPENENDED or CONSTRAINED"),
    ],
)
def test_bad_batches_name_the_row(full_reward, change, message):
    with pytest.raises(InputError, match=message):
        full_reward.score({**BATCH, **change})


def test_a_score_that_is_not_finite_names_the_row(full_reward, monkeypatch):
    monkeypatch.setattr(full_reward, "_relevances", lambda batch, branch: [1.0, float("nan"), 1.0])
    with pytest.raises(InputError, match="proxy reward: row 2 has the value nan"):
        full_reward.score(BATCH)


def test_branching_without_relevance_warns_and_changes_nothing():
    with pytest.warns(UserWarning, match="changes nothing"):
        reward = ReversedEngineeredRewardForInference("alpaca", repetition_penalty=True, reward_branching=True)
    assert reward.get_reward({"response": ["a b c"]}) == [0.03]
    assert reward.required_columns == ["response"]


WORKED_SETTINGS = {
    "LI": {},
    "LI_RP": {"repetition_penalty": True},
    "LI_RP_QR": {"repetition_penalty": True, "relevance_scaling": True},
    "full": FULL,
    "QR_only": {"length_incentive": False, "relevance_scaling": True},
    "RP_only": {"length_incentive": False, "repetition_penalty": True},
    "branch_no_rel": {"repetition_penalty": True, "reward_branching": True},
    "full_nostrip": {**FULL, "do_strip": False},
    "full_256": {**FULL, "max_sequence_length": 256},
}


@pytest.mark.skipif(not REAL_DATA, reason="RER_REAL_DATA does not point to the worked cases")
@pytest.mark.filterwarnings("ignore:reward_branching without")
@pytest.mark.parametrize("name", WORKED_SETTINGS)
def test_worked_cases(name):
    rows = json.loads((Path(REAL_DATA) / "oracles" / "reward_cases.json").read_text(encoding="utf-8"))
    settings = WORKED_SETTINGS[name]
    if settings.get("relevance_scaling"):
        settings = {**settings, "relevance_model_name": MINILM, "device": "cpu"}
    reward = ReversedEngineeredRewardForInference("alpaca", **settings)
    values = reward.get_reward({column: [row[column] for row in rows] for column in ("query", "response", "qtype", "reference")})
    tolerance = 1e-3 if settings.get("relevance_scaling") else 1e-12
    assert len(rows) == 316
    assert values == pytest.approx([row["expected"][name] for row in rows], rel=tolerance, abs=1e-6)
