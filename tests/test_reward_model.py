"""The proxy reward: literal numbers for every feature, worked cases where the real data is at hand, and its error lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, ROWS, run_script

from parts.chat_templates import load_template
from parts.errors import InputError
from parts.files import read_json
from parts.overlap import bleu, rouge_l
from parts.relevance import EmbeddingStore, RelevanceModel
from parts.rewards import FunctionReward, ensemble_total, load_reward_function, member_columns, reward_batch, reward_name
from parts.score_files import ScoreFileSettings, how_made
from reward_model import (
    ReversedEngineeredRewardForInference,
    RewardSettings,
    length_incentive,
    proxy_of_run,
    query_relevance,
    query_text,
    reference_relevance,
    repetition_penalty,
    rescale,
    targeted_length,
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
    assert query_relevance(anchors, responses) == reference_relevance(anchors, responses) == [14.0, -3.0]


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
    model = RelevanceModel(MINILM, "cpu")
    assert model.encoder.max_seq_length == 512
    tail = " ".join(["apple"] * 600)
    both = model.embed([f"{' '.join(['stone'] * 600)} {tail}", tail])
    assert torch.allclose(both[0], both[1], atol=1e-5)  # 510 apples are all that either keeps


def test_responses_are_cut_at_stop_strings_for_counting_only():
    response = "one two three\n\n### Instruction:\nfour five"
    cut = ReversedEngineeredRewardForInference("alpaca").get_reward({"response": [response]})
    uncut = ReversedEngineeredRewardForInference("alpaca", do_strip=False).get_reward({"response": [response]})
    assert cut == [0.03]
    assert uncut == [0.08]


def test_positional_arguments_mean_what_they_meant():
    """The published order: do_strip is the seventh. What came later is given by name."""
    response = ["one two three\n\n### Instruction:\nfour five"]
    assert ReversedEngineeredRewardForInference("alpaca", 512, True, False, False, False, False).get_reward({"response": response}) == [
        0.08
    ]
    assert ReversedEngineeredRewardForInference("alpaca", 512, True, False, False, False, True).get_reward({"response": response}) == [0.03]
    with pytest.raises(TypeError):
        ReversedEngineeredRewardForInference("alpaca", 512, True, False, False, False, True, 10)
    with pytest.raises(TypeError, match="length_targt"):
        ReversedEngineeredRewardForInference("alpaca", length_targt=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qtype": None}, "column 'qtype' is missing"),
        ({"reference": ["Paris"]}, "column 'reference' has 1 rows, expected 3"),
        ({"qtype": ["CONSTRAINED", "OPEN", "CONSTRAINED"]}, "row 2: qtype is 'OPEN', expected OPENENDED or CONSTRAINED"),
        ({"response": ["Paris", "rain", None]}, "row 3: response is NoneType, expected text"),
        ({"reference": [None, "rain", "5"]}, "row 1: reference is NoneType, expected text"),
    ],
)
def test_bad_batches_name_the_row(full_reward, change, message):
    with pytest.raises(InputError, match=message):
        full_reward.score({**BATCH, **change})


def test_a_score_that_is_not_finite_names_the_row(full_reward, monkeypatch):
    unlike = {BATCH["response"][1]: torch.full((384,), float("nan"))}
    monkeypatch.setattr(
        full_reward.relevance_model, "embed", lambda texts: torch.stack([unlike.get(text, torch.ones(384)) for text in texts])
    )
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


# --------------------------------------------------------------------------------------------- edges, further features


@pytest.mark.parametrize(
    ("response", "length", "repetition"),
    [
        ("", 0.0, 1.0),
        (" \n\t ", 0.0, 1.0),
        ("\n\n", 0.0, 1.0),
        ("a", 0.01, 1.0),
        ("é", 0.01, 1.0),
        ("Don't stop!", 0.05, 1.0),  # Don ' t stop !
        ("日本語 です。", 0.03, 1.0),  # 日本語 です 。
        ("🙂🙂 ok", 0.02, 1.0),  # a run of symbols is one token
        ("### Response: more", 0.0, 1.0),  # cut at its very start
        ("word " * 50_000, 500.0, 1 / 49_998),
    ],
)
def test_any_response_has_a_value(full_reward, response, length, repetition):
    batch = {"query": ["Say it."], "response": [response], "reference": ["It."]}
    table = full_reward.score({**batch, "qtype": ["OPENENDED"]})
    assert table["length"] == [pytest.approx(length, abs=1e-12)]
    assert table["repetition"] == [pytest.approx(repetition, abs=1e-12)]
    assert table["total"] == [pytest.approx(length * table["query_relevance"][0] * repetition)]
    constrained = full_reward.score({**batch, "qtype": ["CONSTRAINED"]})
    assert constrained["total"] == [pytest.approx(constrained["reference_relevance"][0] / 3.5 * 5.12 * repetition)]
    if not response.strip():  # the encoder's special tokens alone, which has a length of about 5, not 0
        assert (
            constrained["reference_relevance"]
            == full_reward.score({**batch, "response": [""], "qtype": ["CONSTRAINED"]})["reference_relevance"]
        )


def test_a_formula_sees_only_what_is_in_use(full_reward):
    """So a sum, say, is right without knowing which switches are off."""

    class Sum(ReversedEngineeredRewardForInference):
        def compose(self, row):
            return sum(self.in_use(row).values())

    batch = {"response": ["a b c a b c"]}  # LI 0.06, RP 3 / 4
    assert Sum("alpaca", repetition_penalty=True).get_reward(batch) == [pytest.approx(0.81)]
    assert Sum("alpaca", length_incentive=False, repetition_penalty=True).get_reward(batch) == [pytest.approx(0.75)]
    row = {"length": 0.5, "repetition": 0.75, "query_relevance": 2.0, "reference_relevance": 7.0}
    assert full_reward.in_use({**row, "branch": "OPENENDED"}) == {"length": 0.5, "repetition": 0.75, "query_relevance": 2.0}
    assert full_reward.in_use({**row, "branch": "CONSTRAINED"}) == {"repetition": 0.75, "reference_relevance": pytest.approx(10.24)}


def test_no_rows_have_no_rewards(full_reward):
    table = full_reward.score({name: [] for name in BATCH})
    assert table["total"] == [] and table["query_relevance"] == []


@pytest.mark.parametrize("name", ["alpaca", "llama-2", "mistral", "tulu", "vicuna_v1.1", "zephyr"])
def test_stop_strings_are_literal_text(name):
    template = load_template(name)
    for stop in template.stop_strings:
        assert template.strip_response(f"I NST one{stop}two") == "I NST one"
    assert template.strip_response("INST is a word, so is S") == "INST is a word, so is S"


@pytest.mark.parametrize(("words", "value"), [(0, 0.0), (5, 0.5), (10, 1.0), (15, 0.5), (20, 0.0), (30, -1.0)])
def test_targeted_length(words, value):
    assert targeted_length(["w"] * words, 10) == pytest.approx(value)
    reward = ReversedEngineeredRewardForInference("alpaca", length_target=10)
    assert reward.get_reward({"response": ["w " * words]}) == [pytest.approx(value)]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    assert rouge_l("the cat sat", "the cat sat") == 1.0
    # "the" and "mat" in common order: precision 2/4, recall 2/3, F1 4/7.
    assert rouge_l("the big mat", "on the small mat") == pytest.approx(4 / 7)
    assert rouge_l("runs", "running") == 1.0  # stems
    assert rouge_l("Paris", "") == 0.0


def test_bleu_counts_ngrams():
    import math

    assert bleu("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(1.0)
    # Unigrams 3/4, bigrams 2/3, trigrams 1/2, four-grams none: smoothed to 1/2 of 1; the length penalty is exp(1 - 6/4).
    value = math.exp(1 - 6 / 4) * (3 / 4 * 2 / 3 * 1 / 2 * 0.5) ** 0.25
    assert bleu("the cat sat on the mat", "the cat sat down") == pytest.approx(value)
    assert bleu("the cat", "") == 0.0


def test_matches_with_the_reference_multiply_and_branch():
    batch = {
        "response": ["the cat sat", "the cat sat"], "reference": ["the cat", "the cat"], "qtype": ["CONSTRAINED", "OPENENDED"], "query": ["q", "q"],
    }  # fmt: skip
    f1, li = 2 * (2 / 3) / (2 / 3 + 1), 0.03
    assert ReversedEngineeredRewardForInference("alpaca", rouge_l=True).get_reward(batch) == pytest.approx([li * f1, li * f1])
    branching = ReversedEngineeredRewardForInference("alpaca", rouge_l=True, reward_branching=True)
    assert branching.required_columns == ["response", "qtype", "reference"]
    table = branching.score(batch)
    assert table["total"] == pytest.approx([f1, li])
    assert table["rouge_l"] == [pytest.approx(f1), None]
    both = ReversedEngineeredRewardForInference("alpaca", rouge_l=True, bleu=True).score(batch)
    assert both["total"] == pytest.approx([li * f1 * bleu("the cat", "the cat sat")] * 2)


def test_every_feature_fills_what_a_branch_does_not_use(full_reward):
    table, everything = full_reward.score(BATCH), full_reward.score(BATCH, every_feature=True)
    assert everything["total"] == pytest.approx(table["total"], rel=1e-6)
    assert None not in everything["query_relevance"] + everything["reference_relevance"]
    assert everything["query_relevance"][1] == pytest.approx(table["query_relevance"][1], rel=1e-5)


# ------------------------------------------------------------------------------------------------------- embeddings kept


def test_queries_and_references_are_embedded_once():
    reward = ReversedEngineeredRewardForInference("alpaca", relevance_model_name=MINILM, device="cpu", batch_size=2, **FULL)
    seen, encode = [], reward.relevance_model._encode

    def counted(texts):
        assert len(texts) <= 2  # batch_size
        seen.extend(texts)
        return encode(texts)

    reward.relevance_model._encode = counted
    first = reward.get_reward(BATCH)
    assert sorted(seen) == sorted(["Paris", "Write a line about rain.", "5", *BATCH["response"]])
    seen.clear()
    assert reward.get_reward(BATCH) == pytest.approx(first, rel=1e-6)
    assert sorted(seen) == sorted(BATCH["response"])


def test_embeddings_are_kept_in_a_file_by_model_and_text(tmp_path):
    cache = tmp_path / "embeddings.sqlite"
    settings = {"device": "cpu", "embedding_cache": str(cache)}
    first = RelevanceModel(MINILM, **settings)
    kept = first.embed_once(["Paris", "rain", "Paris"])
    assert torch.equal(kept[0], kept[2])
    second = RelevanceModel(MINILM, **settings)
    second._encode = None  # anything not found would fail here
    assert torch.equal(second.embed_once(["rain", "Paris"]), kept[[1, 0]])
    assert EmbeddingStore(str(cache), "another model").get(["Paris"]) == [None]
    (tmp_path / "notes.txt").write_text("not a database, and longer than its header would be " * 9, encoding="utf-8")
    with pytest.raises(InputError, match="notes.txt: cannot be used as an embedding cache"):
        EmbeddingStore(str(tmp_path / "notes.txt"), "model")


def test_length_sorted_batches_give_every_row_its_own_embedding():
    model = RelevanceModel(MINILM, "cpu", batch_size=3)
    texts = ["a", "a much longer text about rain " * 40, "", "rain", "two words", "x " * 900, "rain"]
    together = model.embed(texts)
    for row, text in enumerate(texts):
        assert torch.allclose(together[row], model.embed([text])[0], rtol=1e-5, atol=1e-5)
    batches = list(model.batches(texts))
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert max(map(len, batches)) == 3


# ---------------------------------------------------------------------------------------------------- rewards of one's own


def reward_file(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_reward_function_gets_the_columns_by_name(tmp_path):
    path = reward_file(
        tmp_path,
        "def mine(prompts, completions, reference, weight, **columns):\n"
        "    assert sorted(columns) == ['qtype']\n"
        "    return [len(p) + len(c) + len(r) * w for p, c, r, w in zip(prompts, completions, reference, weight)]\n",
    )
    rows = [
        {"input": "ab", "output": "xyz", "qtype": "OPENENDED", "weight": 10},
        {"input": "abc", "output": "x", "qtype": "O", "weight": 20},
    ]
    batch = reward_batch(["ab", "abc"], ["12345", ""], rows)
    settings = RewardSettings(reward_function=f"{path}:mine")
    reward = settings.load_reward(load_template("alpaca"), 512, "cpu")
    assert reward.get_reward(batch) == [2 + 5 + 30, 3 + 0 + 20]
    assert reward.required_columns == ["query", "response", "reference", "weight"]
    parts = {f"parts/{name}.py" for name in ("features", "relevance", "chat_templates", "overlap")}
    assert set(settings.reward_source()) == {"reward_model.py", "mine.py", *parts}
    with pytest.raises(InputError, match="asks for column 'weight', the rows have query, reference, response"):
        reward.score({"query": ["a"], "response": ["b"], "reference": ["c"]})


def test_a_reward_function_may_name_its_columns(tmp_path):
    path = reward_file(tmp_path, "def mine(completions):\n    n = [len(c) for c in completions]\n    return {'size': n, 'total': n}\n")
    reward = FunctionReward(load_reward_function(f"{path}:mine"), "mine")
    assert reward.score({"query": ["a", "b"], "response": ["xx", ""]}) == {"size": [2, 0], "total": [2.0, 0.0]}


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "mine", "mine.py: no such file, expected the reward function's"),
        ("import no_such_package_anywhere\n", "mine", "mine.py: its import fails .ModuleNotFoundError: No module named"),
        ("def mine(:\n", "mine", "mine.py: its import fails .SyntaxError"),
        ("def yours(prompts): return []\n", "mine", "mine.py: no function 'mine' in it, found yours"),
        ("mine = 3\n", "mine", "mine.py: no function 'mine' in it, found none"),
    ],
)
def test_a_reward_function_that_cannot_be_loaded(tmp_path, text, name, message):
    path = reward_file(tmp_path, text) if text is not None else tmp_path / "mine.py"
    with pytest.raises(InputError, match=message):
        RewardSettings(reward_function=f"{path}:{name}").check_reward()


def test_a_target_without_li_is_refused_and_in_a_record_it_is_idle():
    with pytest.raises(InputError, match="--length_target is 50 and --length_incentive is off, expected it on: it takes LI's place"):
        RewardSettings(length_incentive=False, length_target=50, repetition_penalty=True)
    trained = {"length_incentive": False, "length_target": 50, "repetition_penalty": True}
    assert proxy_of_run(trained).length_target == 0
    # What an older run recorded and its proxy never read.
    assert proxy_of_run({"reward_offload": True, "uwo_coefficient": 0.5, "repetition_penalty": False}).repetition_penalty is False
    assert proxy_of_run({"length_target": 50}, typed={"length_incentive": False}).length_target == 0
    assert proxy_of_run({"length_target": 50}).length_target == 50
    with pytest.raises(InputError, match="--length_target is 40 and --length_incentive is off"):
        proxy_of_run(trained, typed={"length_target": 40})
    for idle in ({"uwo_coefficient": 0.7}, {"reward_offload": True}, {"length_incentive": False, "length_target": 3}):
        with pytest.raises(InputError, match="expected"):
            proxy_of_run({}, typed=idle)


def test_another_reward_takes_nothing_of_the_recorded_one(capsys):
    """Neither its weights nor its kind; what judges is what the user named."""
    functions = {"reward_function": ["x.py:f", "y.py:g"], "reward_weights": [1, -5]}
    assert proxy_of_run(functions).reward_weights == [1, -5]
    found = proxy_of_run(functions, typed={"reward_function": ["z.py:h", "w.py:k"]})
    assert (found.reward_weights, found.functions) == ([], "1 * z.py:h + 1 * w.py:k")
    assert proxy_of_run(functions, typed={"reward_function": ["z.py:h"], "reward_weights": [2.0]}).functions == "2 * z.py:h"
    assert proxy_of_run(functions, typed={"reward_model_name": ["a/b"]}).named == "a/b"
    learned = {"reward_model_name": "a/b", "reward_ensemble": "mean"}
    assert proxy_of_run(learned, typed={"reward_function": ["z.py:h"]}).functions == "z.py:h"
    assert capsys.readouterr().out == ""
    assert proxy_of_run(learned).relevance_scaling and "judged by the full proxy design" in capsys.readouterr().out


def test_a_reward_function_needs_a_file_and_a_name():
    with pytest.raises(InputError, match="--reward_function is 'mine.py', expected path/to/file.py:name"):
        load_reward_function("mine.py")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "1 values in total, expected 2"),
        ("return [float('inf'), 0.0]", "row 1 has the value inf"),
        ("return {'size': [1, 2]}", "returned columns size, expected 'total'"),
        ("pass", "returned NoneType for total, expected a float a row"),
        ("return 3.0", "returned float for total, expected a float a row"),
        ("return {'size': [1, float('nan')], 'total': [1, 2]}", "size: row 2 has the value nan"),
    ],
)
def test_what_a_reward_function_returns_is_checked(tmp_path, body, message):
    path = reward_file(tmp_path, f"def mine(**columns):\n    {body}\n")
    with pytest.raises(InputError, match=message):
        FunctionReward(load_reward_function(f"{path}:mine"), "mine").get_reward({"query": ["a", "b"], "response": ["c", "d"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_function": "a.py:b", "reward_model_name": "owner/rm"}, "are both set, expected one reward"),
        ({"reward_model_name": ["owner/rm", "owner/rm"]}, "--reward_model_name names owner/rm twice"),
        ({"reward_model_name": ["./a", "a"]}, "--reward_model_name names ./a twice"),
        ({"reward_model_name": ["owner/rm"], "reward_ensemble": "wco"}, "--reward_ensemble is wco, expected at least two"),
        ({"reward_model_name": ["a", "b"], "uwo_coefficient": 0.5}, "--uwo_coefficient is 0.5 and --reward_ensemble is mean, expected uwo"),
        ({"reward_offload": True}, "--reward_offload=true is for reward models, expected --reward_model_name with it"),
        ({"reward_model_name": ["a", "b"], "uwo_coefficient": -0.1}, "--uwo_coefficient is -0.1, expected at least 0"),
        ({"reward_model_name": ["a", "b"], "reward_ensemble": "worst"}, "--reward_ensemble is 'worst', expected mean or wco or uwo"),
        ({"length_incentive": False}, "every part of the proxy reward is off"),
        ({"length_target": -1}, "--length_target is -1, expected 0"),
    ],
)
def test_reward_settings_that_make_no_sense(settings, message):
    with pytest.raises(InputError, match=message):
        RewardSettings(**settings)


def test_how_an_ensemble_becomes_one_reward():
    scores = [[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]  # three members, two rows: means 3 and 1, variances 14 / 3 and 2
    assert ensemble_total(scores, "mean", 0.5) == [3.0, 1.0]
    assert ensemble_total(scores, "wco", 0.5) == [1.0, 0.0]
    assert ensemble_total(scores, "uwo", 0.5) == pytest.approx([3 - 7 / 3, 0.0])
    assert member_columns(["a/one", "b/two", "c/two", "d/total"]) == {
        "one": "a/one",
        "b/two": "b/two",
        "c/two": "c/two",
        "d/total": "d/total",
    }
    assert reward_name({"reward_model_name": "owner/rm"}) == "owner/rm" and reward_name({}) == ""  # a record of an earlier version
    several = RewardSettings(reward_model_name=["a", "b"], reward_ensemble="uwo", uwo_coefficient=0.5)
    assert several.named == "uwo 0.5 of a, b" and not several.is_proxy


def test_the_worked_example():
    function = load_reward_function(f"{REPOSITORY}/examples/my_reward.py:hedging")
    table = FunctionReward(function, "hedging").score(
        {"query": ["q", "q"], "response": ["Perhaps it is so."] * 2, "qtype": ["CONSTRAINED", "OPENENDED"]}
    )
    assert table["plainness"] == [0.5, 0.5]
    assert table["total"] == pytest.approx([0.025, 0.05])


# ------------------------------------------------------------------------------------------------------------ the command


def test_scoring_command(tmp_path, eval_file):
    rollouts = tmp_path / "system.json"
    rows = [{"instruction": row["input"], "output": f"{row['output']} and more", "generator": "x"} for row in ROWS]
    rollouts.write_text(json.dumps(rows), encoding="utf-8")
    words = ["reward_model.py", rollouts, eval_file, "--data_path", eval_file, "--relevance_model_name", MINILM]
    done = run_script(*words, "--output", tmp_path / "scores.json", "--rouge_l=true", "--bleu=true")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "file",
        "rows",
        "length",
        "repetition",
        "query_relevance",
        "reference_relevance",
        "rouge_l",
        "bleu",
        "total",
    ]
    assert [line.split()[:2] for line in lines[1:]] == [[str(rollouts), "6"], [str(eval_file), "6"]]
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    row = content["rows"][str(eval_file)][0]
    assert (row["row"], row["instruction"], row["branch"], row["rouge_l"]) == (1, ROWS[0]["input"], "CONSTRAINED", 1.0)
    assert content["provenance"]["reward_source"]["reward_model.py"]
    assert len(content["rows"][str(rollouts)]) == 6

    machine = run_script(*words, "--json=true")
    means = json.loads(machine.stdout)
    reward = ReversedEngineeredRewardForInference("alpaca", relevance_model_name=MINILM, device="cpu", **FULL)
    batch = reward_batch([row["input"] for row in ROWS], [row["output"] for row in rows], ROWS)
    assert means[str(rollouts)]["total"] == pytest.approx(sum(reward.get_reward(batch)) / 6, rel=1e-5)
    assert means[str(rollouts)]["rows"] == 6

    without = run_script("reward_model.py", rollouts, "--relevance_scaling=false", "--reward_branching=false")
    assert without.returncode == 0 and without.stdout.split()[:5] == ["file", "rows", "length", "repetition", "total"]
    own = run_script("reward_model.py", rollouts, "--data_path", eval_file, "--reward_function=examples/my_reward.py:hedging")
    assert own.returncode == 0 and "plainness" in own.stdout.splitlines()[0]


def test_a_file_is_scored_as_its_record_says(tmp_path, tiny_model):
    """alpaca's stop strings would cut the text at the rule; the run had its tokenizer's own template, and responses of 96 tokens."""
    folder = tmp_path / "run_step_2"
    folder.mkdir()
    rows = [{"instruction": "Plan.", "output": "Here is a plan.\n\n---\n\n1. Do this."}]
    (folder / "rollouts.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ["reward_model.py", folder / "rollouts.json", "--relevance_scaling=false", "--reward_branching=false", "--json=true"]

    def length(*more: str) -> float:
        done = run_script(*words, *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[str(folder / "rollouts.json")]["length"]

    assert length() == 0.05
    (folder / "rollouts.meta.json").write_text(json.dumps({"template": "tokenizer", "model": str(tiny_model)}), encoding="utf-8")
    (folder / "training_record.json").write_text(json.dumps({"settings": {"output_max_length": 96}}), encoding="utf-8")
    assert length(f"--output={tmp_path}/scores.json") == pytest.approx(0.11)
    assert read_json(tmp_path / "scores.json")["provenance"]["template"] == {str(folder / "rollouts.json"): "tokenizer"}
    assert how_made(ScoreFileSettings(), str(folder / "rollouts.json"))[1] == 96
    assert length("--chat_template_name=alpaca") == 0.05
    done = run_script(*words, f"--output={folder}/rollouts.json")
    assert done.returncode == 2 and "rollouts.json, which is read, expected another file" in done.stderr
    (folder / "rollouts.meta.json").unlink()
    assert how_made(ScoreFileSettings(), str(folder / "rollouts.json"))[1] == 96  # of the run, where the file has no record
    done = run_script(*words, "--chat_template_name=tokenizer")
    assert done.returncode == 2 and "names the model, expected a template by name" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward_function=examples/my_reward.py:hedging", "--length_target=100"], "--length_target: examples/my_reward.py:hedging does not read it"),
        ([], "--data_path is missing, expected the rows' qtype and reference"),
        (["--data_path=nowhere.json"], "nowhere.json: no such file"),
        (["--relevance_scaling=false", "--reward_branching=false", "--reward_function=examples/my_reward.py:nothing"], "no function 'nothing' in it"),
        (["--relevance_model_name=models/none", "--reward_branching=false"], "models/none: no such folder"),
        (["--relevance_model_name=owner/unreachable", "--reward_branching=false"], "owner/unreachable: cannot be loaded as a relevance model"),
    ],
)  # fmt: skip
def test_scoring_command_says_what_is_wrong(eval_file, words, message):
    done = run_script("reward_model.py", eval_file, *words)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and message in done.stderr


def test_an_encoder_that_cannot_be_loaded_is_told_at_the_start(tmp_path):
    """Before a run begins, which may remove an earlier one's checkpoints; later only where that is asked for."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    settings = {"relevance_scaling": True, "relevance_model_name": str(tmp_path), "device": "cpu"}
    with pytest.raises(InputError, match="cannot be loaded as a relevance model"):
        ReversedEngineeredRewardForInference("alpaca", **settings)
    assert ReversedEngineeredRewardForInference("alpaca", lazy=True, **settings).relevance_model is not None


def test_a_mean_over_some_rows_says_so(tmp_path):
    """A function may leave rows without a reward; the number of those with one stands beside their mean."""
    (tmp_path / "f.py").write_text(
        "def f(prompts, completions, **columns):\n    return [None, 3.0, None, 5.0][: len(prompts)]\n", encoding="utf-8"
    )
    rows = [{"instruction": f"row {number}", "output": "text"} for number in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    done = run_script("reward_model.py", tmp_path / "rows.json", f"--reward_function={tmp_path}/f.py:f", "--json=true")
    assert json.loads(done.stdout) == {f"{tmp_path}/rows.json": {"rows": 4, "scored_rows": 2, "total": 4.0}}, done.stderr
    assert f"{tmp_path}/rows.json: 2 of 4 rows have a reward, whose mean is over these" in done.stderr
