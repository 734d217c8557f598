"""The monotonicity stage on files made by hand: which checkpoints count, what is refused, and the arithmetic."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from eval_monotonicity import (
    MonotonicitySettings,
    correlations,
    describe,
    find_checkpoints,
    paired_difference,
    read_gold_scores,
    warn_of_changed_code,
)
from records import InputError
from reward_model import proxy_of_run


def make_run(folder, steps, instructions=("a", "b")):
    for step in steps:
        checkpoint = folder / f"run_step_{step}"
        checkpoint.mkdir()
        rows = [{"instruction": text, "output": f"{text} {step}"} for text in instructions]
        (checkpoint / f"alpaca-eval-run_step_{step}.json").write_text(json.dumps(rows), encoding="utf-8")
    return MonotonicitySettings(output_dir=str(folder), model_prefix="run")


def test_paired_difference():
    mean, error = paired_difference([1.0, 2.0, 3.0], [2.0, 4.0, 3.0])
    assert mean == 1.0
    assert error == pytest.approx(1 / math.sqrt(3))  # the differences 1, 2, 0 have a sample standard deviation of 1


def test_checkpoints_are_found_by_number(tmp_path, capsys):
    settings = make_run(tmp_path, [0, 500, 1000, 1500, 10000])
    (tmp_path / "run_step_2000").mkdir()  # no rollouts
    (tmp_path / "run_step_x").mkdir()
    (tmp_path / "rerun_step_500").mkdir()
    assert [point.step for point in find_checkpoints(settings)] == [500, 1000, 1500, 10000]
    assert capsys.readouterr().out == "without rollouts, left out: steps 2000\n"
    settings.include_start = True
    assert [point.step for point in find_checkpoints(settings)] == [0, 500, 1000, 1500, 10000]
    settings.steps = [1500, 0, 500]
    assert [point.step for point in find_checkpoints(settings)] == [0, 500, 1500]
    settings.steps = [500, 1000, 2000]
    with pytest.raises(InputError, match="run_step_2000: no rollouts, expected them from evaluation.py"):
        find_checkpoints(settings)


def test_too_few_checkpoints(tmp_path):
    with pytest.raises(InputError, match="2 checkpoints of run with rollouts, expected at least 3"):
        find_checkpoints(make_run(tmp_path, [500, 1000]))


def test_rollouts_on_other_instructions_are_refused(tmp_path):
    settings = make_run(tmp_path, [500, 1000])
    make_run(tmp_path, [1500], instructions=("a", "c"))
    with pytest.raises(InputError, match="alpaca-eval-run_step_1500.json: row 2: another instruction than at step 500"):
        find_checkpoints(settings)
    (tmp_path / "run_step_1500" / "alpaca-eval-run_step_1500.json").write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8")
    with pytest.raises(InputError, match="1 rows, expected 2 as at step 500"):
        find_checkpoints(settings)


def test_the_proxy_is_the_runs_own(tmp_path):
    point = find_checkpoints(make_run(tmp_path, [1, 2, 3]))[0]
    assert proxy_of_run(point.trained, 4).reward_branching is True  # without a record: the paper's full design
    trained = {"repetition_penalty": False, "relevance_scaling": False, "length_target": 20, "output_max_length": 48}
    (point.folder / "training_record.json").write_text(json.dumps({"settings": trained}), encoding="utf-8")
    found = proxy_of_run(point.trained, 4)
    assert (found.repetition_penalty, found.relevance_scaling, found.length_target, found.reward_model_batch_size) == (False, False, 20, 4)


def test_changed_reward_code_is_said(tmp_path, capsys):
    point = find_checkpoints(make_run(tmp_path, [1, 2, 3]))[0]
    proxy = proxy_of_run(point.trained, 4)
    for digest, warned in ((proxy.reward_source()["reward_model.py"], False), ("0" * 64, True)):
        (point.folder / "training_record.json").write_text(json.dumps({"reward_source": {"reward_model.py": digest}}), encoding="utf-8")
        warn_of_changed_code(point, proxy)
        assert ("reward_model.py has changed since run_step_1 was trained" in capsys.readouterr().out) is warned


def test_a_run_against_a_reward_model_is_judged_by_the_full_design(tmp_path, capsys):
    point = find_checkpoints(make_run(tmp_path, [1, 2, 3]))[0]
    trained = {"reward_model_name": "owner/rm", "repetition_penalty": False, "relevance_scaling": False, "reward_branching": False,
               "relevance_model_name": "owner/encoder"}  # fmt: skip
    (point.folder / "training_record.json").write_text(json.dumps({"settings": trained}), encoding="utf-8")
    assert proxy_of_run(point.trained, 4).relevance_scaling is True
    assert "judged by the full proxy design" in capsys.readouterr().out


def test_curves_that_do_not_move_have_no_correlation(tmp_path):
    steps, proxy, gold = [1, 2, 3], np.array([[0.5, 0.5]] * 3), np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]])
    found = correlations(steps, proxy, gold, True, [None, None])
    assert found["spearman"] is None and found["pvalue"] is None and found["turning_point"] is None
    assert "SpearmanR is undefined" in describe(found, steps, True)


def test_what_is_said_of_two_curves():
    steps = [10, 20, 30]
    proxy = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [3.0, 4.0, 5.0]])
    gold = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [2.0, 4.0, 2.5]])
    found = correlations(steps, proxy, gold, True, ["OPENENDED", "OPENENDED", "CONSTRAINED"])
    assert found["spearman"] == pytest.approx(0.5) and found["exact_pvalue"] == 1.0 and found["kendall"] == pytest.approx(1 / 3)
    assert found["by_qtype"] == {
        "OPENENDED": {"spearman": pytest.approx(0.5), "rows": 2},
        "CONSTRAINED": {"spearman": pytest.approx(-0.5), "rows": 1},
    }
    assert found["agreement"] == {"share": pytest.approx(2 / 3), "rows": 3} and found["turning_point"] == 20
    said = describe(found, steps, True)
    assert said.startswith("SignificanceResult(statistic=0.5, pvalue=")
    assert "p over all orders of them 1, Kendall's tau 0.333" in said and "over-optimisation from there on" in said
    only_means = correlations(steps, proxy, gold.mean(axis=1, keepdims=True), False, [None] * 3)
    assert only_means["spearman"] == pytest.approx(0.5) and "interval" not in only_means


def test_rollouts_drawn_otherwise_are_refused(tmp_path):
    settings = make_run(tmp_path, [500, 1000, 1500])
    for step, temperature in ((500, 0.7), (1000, 0.7), (1500, 1.0)):
        meta = tmp_path / f"run_step_{step}" / f"alpaca-eval-run_step_{step}.meta.json"
        meta.write_text(json.dumps({"decoding": {"temperature": temperature}}), encoding="utf-8")
    with pytest.raises(
        InputError, match="run_step_1500.json: decoding is {'temperature': 1.0}, expected {'temperature': 0.7} as at step 500"
    ):
        find_checkpoints(settings)


def test_gold_tables(tmp_path):
    table = tmp_path / "gold.json"
    table.write_text('[{"step": 2, "gold": 0.5}, {"step": 1, "gold": "0.25"}]', encoding="utf-8")
    assert read_gold_scores(str(table), [1, 2]) == {1: 0.25, 2: 0.5}
    with pytest.raises(InputError, match="gold.json: no row for step 3"):
        read_gold_scores(str(table), [1, 2, 3])
    csv = tmp_path / "gold.csv"
    csv.write_text("\ufeffstep,gold\n1.0,0.5\n", encoding="utf-8")
    assert read_gold_scores(str(csv), [1]) == {1: 0.5}
    csv.write_text("step,gold\n1,0.5\n1,0.6\n", encoding="utf-8")
    with pytest.raises(InputError, match="row 2: step 1 comes twice"):
        read_gold_scores(str(csv), [1])
    table.write_text('[{"step": 1, "gold": null}]', encoding="utf-8")
    with pytest.raises(InputError, match="row 1: field 'gold' is None, expected a number"):
        read_gold_scores(str(table), [1])
