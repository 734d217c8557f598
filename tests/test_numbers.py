"""Numbers that nobody looks at, foreign files, and what users' functions return: the right value, or one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script

from parts.errors import InputError
from parts.files import write_json
from parts.preferences import read_pairs
from parts.rewards import FunctionReward, filled, load_functions, load_reward_function
from parts.runs import Checkpoint, read_kl
from parts.sampling import Decoding
from reward_model import RewardSettings, proxy_of_run

# ------------------------------------------------------------------------------------------------------------- equal rewards


@pytest.fixture
def scaled():
    """Batches of scores as TRL's trainer scales them, one after the other."""
    from trl.trainer.utils import RunningMoments

    from parts.ppo_trainer import FastPPOTrainer

    trainer = FastPPOTrainer.__new__(FastPPOTrainer)
    trainer.config = SimpleNamespace(use_score_scaling=True, use_score_norm=True, score_clip=10.0)
    trainer.running = RunningMoments(SimpleNamespace(use_distributed=False))
    return lambda scores: trainer._scaled(torch.tensor(scores), None).tolist()


@pytest.mark.parametrize("rows", [2, 4, 6, 7, 8, 12, 50])
@pytest.mark.parametrize("value", [55.57, 0.1, 0.0, -3.3, 1e6, 1e-7])
def test_equal_rewards_are_none(scaled, rows, value):
    for _ in range(3):
        assert scaled([value] * rows) == [0.0] * rows


def test_rewards_that_differ_are_scaled_as_trl_does(scaled):
    assert scaled([1.0, 2.0, 3.0, 4.0]) == pytest.approx([-1.161895, -0.387298, 0.387298, 1.161895], abs=1e-6)
    assert scaled([55.57, 55.58]) != [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------- numbers in files


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number, at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": 8, "temperature": "hot"}, "temperature is 'hot', expected a number, at least 0"),
        ({"max_new_tokens": 8, "temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 8, "top_p": 2}, "top_p is 2, expected a number above 0, at most 1"),
        ({"max_new_tokens": 8, "top_k": -1}, "top_k is -1"),
    ],
)
def test_a_decoding_file_is_checked_as_the_flags_are(tmp_path, values, told):
    from evaluation import EvaluationSettings, read_decoding

    (tmp_path / "d.yaml").write_text(json.dumps({"alpaca": values}).replace("NaN", ".nan"), encoding="utf-8")
    settings = EvaluationSettings(base_model_name="m", peft_model_name=["x"], decoding=str(tmp_path / "d.yaml"))
    with pytest.raises(InputError, match=rf"d.yaml: expected decoding settings under 'alpaca' \({re.escape(told)}"):
        read_decoding(settings, "alpaca")
    assert Decoding(8, 0, 1, 0).top_p == 1


@pytest.mark.parametrize(
    ("trained", "told"),
    [
        ({"length_target": "ten"}, "the run's record: --length_target is 'ten', expected int"),
        ({"length_target": -1}, "the run's record: --length_target is -1, expected 0 (off)"),
        ({"relevance_scaling": "yes"}, "--relevance_scaling is 'yes', expected bool"),
        ({"relevance_model_name": None}, "--relevance_model_name is None, expected str"),
        ({"reward_weights": [float("inf")], "reward_function": ["a.py:f"]}, "--reward_weights is inf, expected a finite number"),
    ],
)
def test_a_record_is_checked_as_the_flags_are(trained, told):
    with pytest.raises(InputError, match=re.escape(told)):
        proxy_of_run(trained)


# ------------------------------------------------------------------------------------------------------------- foreign files


def pairs_of(tmp_path: Path, *preferences: object):
    rows = [{"instruction": "a b", "output_1": "x y z", "output_2": "u v w", "preference": preference} for preference in preferences]
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-8")
    return [pair.chosen[0] for pair in read_pairs(str(tmp_path / "p.json"))]


def test_preferences_of_alpaca_eval(tmp_path, capsys):
    assert pairs_of(tmp_path, 1, 2, 1.0, 2.0) == ["x", "u", "x", "u"]
    assert capsys.readouterr().out == ""
    assert pairs_of(tmp_path, 1.35, None, 1.5, 0, float("nan"), 1.51, 2) == ["x", "u", "u"]
    said = capsys.readouterr().out
    assert "p.json: 3 of 7 pairs; left out: 2 without a preference, 2 a tie; 2 between 1 and 2 count for their nearer side" in said


def test_a_generator_that_is_no_name(tmp_path):
    row = {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1, "generator_1": {"name": "x"}}
    (tmp_path / "p.json").write_text(json.dumps([row]), encoding="utf-8")
    with pytest.raises(InputError, match="p.json: row 1: a generator is dict, expected a name"):
        read_pairs(str(tmp_path / "p.json"))


@pytest.mark.parametrize("preference", [True, False, "1", 3, -1, 0.5, 2.5, [1], {}])
def test_what_is_no_preference(tmp_path, preference):
    with pytest.raises(InputError, match=rf"p.json: row 2: field 'preference' is {re.escape(repr(preference))}, expected 1 or 2"):
        pairs_of(tmp_path, 1, preference)


def test_no_preference_at_all(tmp_path):
    with pytest.raises(InputError, match=r"p.json: no row prefers an answer \(1 without a preference, 1 a tie\)"):
        pairs_of(tmp_path, None, 0)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{}", "adapter_config.json: 'base_model_name_or_path' is None, expected the model that the adapter is for"),
        ('{"base_model_name_or_path": null}', "'base_model_name_or_path' is None"),
        ('{"base_model_name_or_path": "/gone/model"}', "adapter_config.json: its base model: /gone/model: no such folder"),
        ('{"base_model_name_or_path": ', "adapter_config.json: broken JSON"),
        ("[1]", "adapter_config.json: expected a JSON object, found list"),
    ],
)
def test_an_adapter_without_its_base(tmp_path, config, told):
    from parts.models import check_model_name

    (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(told)):
        check_model_name(str(tmp_path))


@pytest.mark.parametrize(
    ("record", "told"),
    [('{"settings": 3}', "'settings' is int"), ('{"settings": {', "broken JSON"), ("3", "found int"), ("\xff", "UTF-8")],
)
def test_a_broken_record_is_named(tmp_path, record, told):
    (tmp_path / "training_record.json").write_text(record, encoding="latin-1")
    with pytest.raises(InputError, match=f"training_record.json: .*{told}"):
        _ = Checkpoint(tmp_path).trained
    (tmp_path / "training_record.json").write_text("{}", encoding="utf-8")
    assert Checkpoint(tmp_path).trained == {}


def test_a_metrics_line_that_was_cut_short_is_no_kl(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "objective/kl": 2.0}\n{"step": 2, "objective/kl": null}\n{"step": 3, "obj', encoding="utf-8"
    )
    for step in (0, 1):
        (tmp_path / f"run_step_{step}").mkdir()
        write_json(tmp_path / f"run_step_{step}" / "training_record.json", {"settings": {"logging_dir": str(tmp_path)}})
    assert read_kl([Checkpoint(tmp_path / f"run_step_{step}") for step in (0, 1)])[0] == [0.0, 2.0]


# ---------------------------------------------------------------------------------------------------------------- user code

DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
Path(__file__).with_suffix(".log").open("a").write("run ")
@dataclass
class Weights:
    length: float = 0.01
def reward(completions, **columns):
    return [Weights().length * len(text) for text in completions]
"""
POOL = """
from concurrent.futures import ProcessPoolExecutor
def one(text):
    return float(len(text))
def reward(completions, **columns):
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(one, completions))
"""
BATCH = {"query": ["a", "b", "c"], "response": ["x", "xy", "xyz"], "level": [1, 2, 3]}


def test_a_dataclass_a_pool_a_neighbour(tmp_path):
    (tmp_path / "own_reward.py").write_text(DATACLASS, encoding="utf-8")
    (tmp_path / "pool.py").write_text(POOL, encoding="utf-8")
    (tmp_path / "json.py").write_text("def reward(completions, **c):\n    import own_reward\n    return own_reward.reward(completions)\n",
                                      encoding="utf-8")  # fmt: skip
    settings = RewardSettings(reward_function=f"{tmp_path}/own_reward.py:reward")
    settings.check_reward()
    assert settings.load_reward(None, 1, "cpu").get_reward(BATCH) == pytest.approx([0.01, 0.02, 0.03])
    assert load_functions([f"{tmp_path}/../{tmp_path.name}/pool.py:reward"]).get_reward(BATCH) == [1.0, 2.0, 3.0]
    assert load_functions([f"{tmp_path}/json.py:reward"]).get_reward(BATCH) == pytest.approx([0.01, 0.02, 0.03])
    assert (tmp_path / "own_reward.log").read_text(encoding="utf-8") == "run "  # once
    assert json.loads("1") == 1  # a file named as a module of the library hides nothing


RETURNS = {
    "none_one": ("[None, 1.0, 2]", [None, 1.0, 2.0]),
    "tensor": ("torch.ones(len(completions))", [1.0, 1.0, 1.0]),
    "column": ("torch.arange(len(completions))[:, None].float()", [0.0, 1.0, 2.0]),
    "numpy_int": ("np.arange(len(completions))", [0.0, 1.0, 2.0]),
    "bools": ("[True, False, True]", [1.0, 0.0, 1.0]),
    "tuple": ("(0.5, 1, 2)", [0.5, 1.0, 2.0]),
    "text_numbers": ('["0.5" for _ in completions]', "total: row 1 has the text '0.5', expected a finite number"),
    "one_text": ('[0.5, "high", 1.0]', "total: row 2 has the text 'high', expected a finite number"),
    "strdict": ('{"total": ["1" for _ in completions]}', "total: row 1 has the text '1', expected a finite number"),
    "one_value": ("[1.0]", "1 values in total, expected 3"),
    "scalar": ("1.0", "returned float for total, expected a float a row"),
    "scalar_tensor": ("torch.tensor(1.0)", "returned Tensor for total, expected a float a row"),
    "nothing": ("None", "returned NoneType for total"),
    "gen": ("(1.0 for _ in completions)", "returned generator for total"),
    "text": ('"abc"', "returned str for total"),
    "nan": ("[1.0, None, float('nan')]", "row 3 has the value nan"),
    "lists": ("[[1.0, 2.0]] * 3", "row 1 has the value [1.0, 2.0]"),
    "crash": ("completions['solution']", "fails (TypeError: list indices must be integers or slices, not str; "),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_functions_return(tmp_path, name):
    body, expected = RETURNS[name]
    path = tmp_path / f"{name}_.py"
    path.write_text(f"import numpy as np, torch\ndef {name}(completions, **c): return {body}\n", encoding="utf-8")
    reward = FunctionReward(load_reward_function(f"{path}:{name}"), name)
    if isinstance(expected, list):
        assert reward.get_reward(BATCH) == expected
    else:
        with pytest.raises(InputError) as caught:
            reward.get_reward(BATCH)
        assert str(caught.value).startswith(f"reward function {name}") and expected in str(caught.value) and "\n" not in str(caught.value)


def test_async_and_any_signature(tmp_path):
    (tmp_path / "several.py").write_text(
        "async def later(completions, **c):\n    import asyncio\n    await asyncio.sleep(0)\n    return [1.0 for _ in completions]\n"
        "def args(*args, **kwargs): return [float(n) for n in kwargs['level']]\n"
        "def named(completions): return {'total': [2.0] * 3, 'note': ['x'] * 3, 'half': [1, None, 1]}\n"
        "def rare(completions): return [None, None, 5]\n"
        "def never(completions): return [None] * 3\n",
        encoding="utf-8",
    )
    spec = f"{tmp_path}/several.py:"
    assert load_functions([spec + "later"]).get_reward(BATCH) == [1.0, 1.0, 1.0]
    assert load_functions([spec + "args"]).get_reward(BATCH) == [1.0, 2.0, 3.0]
    both = load_functions([spec + "args", spec + "named"], [1.0, 0.5])
    assert both.score(BATCH) == {"args": [1.0, 2.0, 3.0], "named": [2.0] * 3, "named.note": ["x"] * 3, "named.half": [1.0, None, 1.0],
                                 "total": [2.0, 3.0, 4.0]}  # fmt: skip
    assert load_functions([spec + "args", spec + "rare"], [2, -1]).get_reward(BATCH) == [2.0, 4.0, 1.0]
    assert load_functions([spec + "rare", spec + "never"]).get_reward(BATCH) == [None, None, 5.0]
    assert load_functions([spec + "rare"], [3.0]).get_reward(BATCH) == [None, None, 15.0]
    assert filled([None, 1.0, 4.0]) == [2.5, 1.0, 4.0] and filled([None, None]) == [0.0, 0.0]
    for specs, weights, told in (([spec + "args"], [1, 2], "--reward_weights has 2 numbers, expected one for each of 1"),
                                 ([spec + "args"] * 2, [], "names 'several.py:args' twice")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            load_functions(specs, weights)
    with pytest.raises(InputError, match="--reward_weights are for --reward_function"):
        RewardSettings(reward_weights=[1.0])


def test_two_functions_in_a_run(tiny_model, rows_file, tmp_path):
    from test_pipeline import metrics, ppo_words

    (tmp_path / "a.py").write_text("def f(completions, **c): return [None if i == 0 else len(t) / 10 for i, t in enumerate(completions)]\n")
    (tmp_path / "b.py").write_text("async def g(completions, reference, **c): return [1.0] * len(completions)\n")
    words = ppo_words(tiny_model, rows_file, tmp_path / "two", overall_steps=1, save_freq=1)
    more = ["--reward_function", f"{tmp_path}/a.py:f", f"{tmp_path}/b.py:g", "--reward_weights", "1", "0.5"]
    done = run_script(*words, *more)
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path / "two")
    assert line["reward/g"] == 1.0 and line["reward/total"] == pytest.approx(line["reward/f"] * 3 / 4 + 0.5)
    card = (tmp_path / "two_step_1" / "README.md").read_text(encoding="utf-8")
    assert f"1 * {tmp_path}/a.py:f + 0.5 * {tmp_path}/b.py:g" in card
    again = run_script(*words, *more, "--resume_from_checkpoint=auto", "--overall_steps=2")
    assert again.returncode == 0 and "at step 1" in again.stdout, again.stderr
