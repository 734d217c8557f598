"""The monotonicity stage on files made by hand: which checkpoints count, what is refused, and what is scored only once."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROWS, run_script

from eval_monotonicity import (
    OF_THE_REWARD,
    MonotonicitySettings,
    choose_checkpoints,
    design_name,
    name_designs,
    read_references,
    read_run,
    scored_run,
    short_names,
)
from parts.chat_templates import load_template
from parts.designs import all_designs
from parts.errors import InputError
from parts.files import read_json, write_json
from parts.rank_statistics import ScoredRun, curve, gains, table_text
from parts.run_checks import warn_of_changed_code, warn_of_other_draws, warn_of_other_training
from parts.runs import Checkpoint, read_kl
from parts.scores import ScoreStore, gold_columns, proxy_columns, read_gold_scores, score_rows
from reward_model import ProxySettings, ReversedEngineeredRewardForInference, RewardSettings, proxy_of_run


def make_run(folder, steps, instructions=("a", "b"), name="run"):
    for step in steps:
        checkpoint = folder / f"{name}_step_{step}"
        checkpoint.mkdir()
        rows = [{"instruction": text, "output": f"{text} {'w ' * step}".strip()} for text in instructions]
        (checkpoint / f"alpaca-eval-{name}_step_{step}.json").write_text(json.dumps(rows), encoding="utf-8")
    return MonotonicitySettings(output_dir=str(folder), model_prefix=[name])


def test_checkpoints_are_found_by_number(tmp_path, capsys):
    settings = make_run(tmp_path, [0, 500, 1000, 1500, 10000])
    (tmp_path / "run_step_2000").mkdir()  # no rollouts
    (tmp_path / "run_step_x").mkdir()
    (tmp_path / "rerun_step_500").mkdir()
    assert [point.step for point in choose_checkpoints(settings, "run")] == [500, 1000, 1500, 10000]
    assert capsys.readouterr().out == "without rollouts, left out: run, steps 2000\n"
    settings.include_start = True
    assert [point.step for point in choose_checkpoints(settings, "run")] == [0, 500, 1000, 1500, 10000]
    settings.steps = [1500, 0, 500]
    assert [point.step for point in choose_checkpoints(settings, "run")] == [0, 500, 1500]
    settings.include_start = False
    settings.steps = [1500, 500, 1000]
    assert [point.step for point in choose_checkpoints(settings, "run")] == [500, 1000, 1500]
    settings.include_start = True
    assert [point.step for point in choose_checkpoints(settings, "run")] == [0, 500, 1000, 1500]
    settings.steps = [500, 1000, 2000]
    with pytest.raises(InputError, match="run_step_2000: no rollouts, expected them from evaluation.py"):
        choose_checkpoints(settings, "run")


def test_too_few_checkpoints(tmp_path):
    with pytest.raises(InputError, match="2 checkpoints of run with rollouts, expected at least 3"):
        choose_checkpoints(make_run(tmp_path, [500, 1000]), "run")


def test_rollouts_on_other_instructions_are_refused(tmp_path):
    settings = make_run(tmp_path, [500, 1000])
    make_run(tmp_path, [1500], instructions=("a", "c"))
    with pytest.raises(InputError, match="alpaca-eval-run_step_1500.json: row 2: another instruction than at step 500"):
        choose_checkpoints(settings, "run")
    (tmp_path / "run_step_1500" / "alpaca-eval-run_step_1500.json").write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8")
    with pytest.raises(InputError, match="1 rows, expected 2 as at step 500"):
        choose_checkpoints(settings, "run")


def test_rollouts_drawn_otherwise_are_refused(tmp_path):
    settings = make_run(tmp_path, [500, 1000, 1500])
    for step, temperature in ((500, 0.7), (1000, 0.7), (1500, 1.0)):
        meta = tmp_path / f"run_step_{step}" / f"alpaca-eval-run_step_{step}.meta.json"
        meta.write_text(json.dumps({"decoding": {"temperature": temperature}}), encoding="utf-8")
    with pytest.raises(
        InputError, match="run_step_1500.json: decoding is {'temperature': 1.0}, expected {'temperature': 0.7} as at step 500"
    ):
        choose_checkpoints(settings, "run")
    meta.write_text(json.dumps({"decoding": {"temperature": 0.7}, "common_draws": True}), encoding="utf-8")
    with pytest.raises(InputError, match="run_step_1500.json: common_draws is True, expected None as at step 500"):
        choose_checkpoints(settings, "run")


def test_the_proxy_is_the_runs_own_unless_a_flag_says_otherwise(tmp_path):
    point = choose_checkpoints(make_run(tmp_path, [1, 2, 3]), "run")[0]
    assert point.record == {} and proxy_of_run({}, 4).reward_branching is True  # without a record: the paper's full design
    trained = {"repetition_penalty": False, "relevance_scaling": False, "length_target": 20, "output_max_length": 48}
    found = proxy_of_run(trained, 4)
    assert (found.repetition_penalty, found.relevance_scaling, found.length_target, found.reward_model_batch_size) == (False, False, 20, 4)
    found = proxy_of_run(trained, 4, {"repetition_penalty": True, "length_target": None, "output_dir": "x"})
    assert (found.repetition_penalty, found.relevance_scaling, found.length_target) == (True, False, 20)


def test_changed_reward_code_is_said(tmp_path, capsys):
    point = choose_checkpoints(make_run(tmp_path, [1, 2, 3]), "run")[0]
    proxy = proxy_of_run({}, 4)
    for digest, warned in ((proxy.reward_source()["reward_model.py"], False), ("0" * 64, True)):
        (point.folder / "training_record.json").write_text(json.dumps({"reward_source": {"reward_model.py": digest}}), encoding="utf-8")
        assert len(warn_of_changed_code(point, proxy.reward_source())) == warned
        assert ("reward_model.py has changed since run_step_1 was trained" in capsys.readouterr().out) is warned


def test_a_run_against_a_reward_model_is_judged_by_the_full_design(capsys):
    trained = {"reward_model_name": "owner/rm", "repetition_penalty": False, "relevance_scaling": False, "reward_branching": False,
               "relevance_model_name": "owner/encoder"}  # fmt: skip
    assert proxy_of_run(trained, 4).relevance_scaling is True
    assert "judged by the full proxy design" in capsys.readouterr().out


def test_gold_tables(tmp_path):
    table = tmp_path / "gold.json"
    table.write_text('[{"step": 2, "gold": 0.5}, {"step": 1, "gold": "0.25"}]', encoding="utf-8")
    assert read_gold_scores(str(table), [1, 2]) == {"gold": [[0.25], [0.5]]}
    with pytest.raises(InputError, match="gold.json: no row for step 3"):
        read_gold_scores(str(table), [1, 2, 3])
    csv = tmp_path / "gold.csv"
    csv.write_text("\ufeffstep,human,note,gpt4\n1.0,0.5,first,3\n", encoding="utf-8")
    assert read_gold_scores(str(csv), [1]) == {"human": [[0.5]], "gpt4": [[3.0]]}
    csv.write_text("step,gold\n1,0.5\n1,0.6\n", encoding="utf-8")
    with pytest.raises(InputError, match="row 2: step 1 comes twice"):
        read_gold_scores(str(csv), [1])
    csv.write_text("step,gold\n1,0.5\n2,\n", encoding="utf-8")
    with pytest.raises(InputError, match="row 2: field 'gold' is '', expected a number"):
        read_gold_scores(str(csv), [1, 2])
    csv.write_text("step,gold\n1,nan\n2,0.5\n", encoding="utf-8")
    with pytest.raises(InputError, match="row 1: field 'gold' is 'nan', expected a number"):
        read_gold_scores(str(csv), [1])
    table.write_text('[{"step": 1, "gold": null}]', encoding="utf-8")
    with pytest.raises(InputError, match="gold.json: no column of numbers besides 'step'"):
        read_gold_scores(str(table), [1])


def checkpoints(folder, development: dict[int, dict], settings: dict | None):
    """Checkpoints of a run `folder`/full with records, or without where there are no settings."""
    points = []
    for step, means in development.items():
        points.append(Checkpoint(folder / f"full_step_{step}"))
        points[-1].folder.mkdir(parents=True, exist_ok=True)
        if settings is not None:
            write_json(points[-1].folder / "training_record.json", {"development": means, "settings": settings})
    return points


def write_metrics(folder, lines: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_kl_is_that_of_the_steps_after_a_checkpoint(tmp_path):
    logs = tmp_path / "full" / "logs"
    settings = {"output_dir": str(tmp_path / "full"), "logging_dir": str(logs)}
    write_metrics(logs, [{"step": step, "objective/kl": float(step)} for step in range(1, 9)])
    # checkpoint 4: steps 3 to 7; checkpoint 8: steps 7 and 8, the last ones there are; checkpoint 20: none
    points = checkpoints(tmp_path, {0: {}, 4: {}, 8: {}, 20: {}}, settings)
    assert read_kl(points) == ([0.0, 5.0, 7.5, None], "training rollouts")
    assert read_kl(checkpoints(tmp_path / "bare", {0: {}, 4: {}}, None)) == ([None, None], "")
    # That of the development rollouts, where each checkpoint has it.
    measured = {0: {"dev/objective/kl": 0.0}, 4: {"dev/objective/kl": 4.25}, 8: {"dev/objective/kl": 8.5}}
    assert read_kl(checkpoints(tmp_path, measured, settings)) == ([0.0, 4.25, 8.5], "development rollouts")
    assert read_kl(checkpoints(tmp_path, {**measured, 4: {}}, settings)) == ([0.0, 5.0, 7.5], "training rollouts")


def test_kl_of_another_run_is_not_taken(tmp_path, capsys):
    """A run's folder was moved, and another run was trained in its old place: only the rewards in the metrics tell them apart."""
    means = {0: {"dev/total": 1.0}, 4: {"dev/total": 1.5}}
    settings = {"output_dir": str(tmp_path / "old" / "full"), "logging_dir": str(tmp_path / "old" / "full" / "logs")}
    points = checkpoints(tmp_path / "new", means, settings)
    write_metrics(tmp_path / "old" / "full" / "logs", [{"step": 4, "objective/kl": 99.0, "dev/total": 7.0}])
    assert read_kl(points) == ([None, None], "")
    assert capsys.readouterr().out == (
        f"warning: {tmp_path}/old/full/logs/metrics.jsonl is of another run than {tmp_path}/new/full_step_4, and says nothing of its KL\n"
    )
    write_metrics(tmp_path / "new" / "full" / "logs", [{"step": 4, "objective/kl": 3.0, "dev/total": 1.5}])
    assert read_kl(points) == ([0.0, 3.0], "training rollouts")
    assert capsys.readouterr().out == ""


def test_names_of_golds():
    assert short_names(["assets/demo_gold_rm"]) == ["gold"]
    assert short_names(["a/one", "b/two"]) == ["one", "two"]
    assert short_names(["a/one", "b/one"]) == ["a/one", "b/one"]
    with pytest.raises(InputError, match="names a model twice"):
        short_names(["a", "a"])


def test_a_gold_table_of_several_runs(tmp_path, capsys):
    table = tmp_path / "gold.csv"
    table.write_text("run,step,human\none,1,1\ntwo,1,3\none,2,2\n", encoding="utf-8")
    assert read_gold_scores(str(table), [1, 2], "one", is_lone=False) == {"human": [[1.0], [2.0]]}
    with pytest.raises(InputError, match="gold.csv: no row for step 2 of run 'two'$"):
        read_gold_scores(str(table), [1, 2], "two", is_lone=False)
    table.write_text("run,step,human\nother,1,1\nother,2,3\n", encoding="utf-8")
    assert read_gold_scores(str(table), [1, 2], "one") == {"human": [[1.0], [3.0]]}
    assert capsys.readouterr().err == f"{table}: no row of run 'one'; taken for it are those of 'other'\n"
    table.write_text("step,human\n1,1\n2,3\n", encoding="utf-8")
    with pytest.raises(
        InputError, match="gold.csv: no column 'run', expected one with the names of --model_prefix where there are several$"
    ):
        read_gold_scores(str(table), [1, 2], "one", is_lone=False)


def test_a_gold_table_of_single_responses(tmp_path):
    table = tmp_path / "gold.csv"
    table.write_text("step,row,judge\n1,2,0.2\n1,1,0.1\n2,1,0.3\n2,2,0.4\n", encoding="utf-8")
    assert read_gold_scores(str(table), [1, 2], "one", responses=2) == {"judge": [[0.1, 0.2], [0.3, 0.4]]}
    with pytest.raises(InputError, match="gold.csv: no row for step 1, row 3$"):
        read_gold_scores(str(table), [1, 2], "one", responses=3)
    with pytest.raises(InputError, match="gold.csv: row 1: step 1, row 2, expected the rollouts' 1 rows alone$"):
        read_gold_scores(str(table), [1, 2], "one", responses=1)
    table.write_text("step,row,judge\n1,1,0.2\n1,1,0.1\n", encoding="utf-8")
    with pytest.raises(InputError, match="gold.csv: row 2: step 1, row 1 comes twice$"):
        read_gold_scores(str(table), [1], "one", responses=1)
    table.write_text("step,row,judge\n1,,0.2\n", encoding="utf-8")
    with pytest.raises(InputError, match="gold.csv: row 1: field 'row' is '', expected a number$"):
        read_gold_scores(str(table), [1], "one", responses=1)


@pytest.mark.parametrize(("column", "what"), [("gold", "another gold"), ("proxy", "what is no gold"), ("length", "what is no gold")])
def test_a_gold_has_a_name_of_its_own(tmp_path, tiny_gold, column, what):
    make_run(tmp_path, [1, 2, 4])
    table = tmp_path / "table.csv"
    table.write_text(f"step,{column}\n1,1\n2,3\n4,2\n", encoding="utf-8")
    done = run_script("eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix=run", "--relevance_scaling=false",
                      "--reward_branching=false", f"--gold_model={tiny_gold}", f"--gold_scores={table}")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"error: a gold is called '{column}', as {what} is, expected another column in --gold_scores or another folder\n"


def test_tables_are_aligned():
    assert table_text([{"design": "LI", "x": 0.5}, {"design": "1", "x": None}]) == "design       x\nLI      0.5000\n1            -"


def test_gains_of_a_run():
    proxy = np.array([[0.0, 0.0], [5.0, 5.0], [1.0, 3.0]])
    run = ScoredRun("run", [1, 2, 3], [], [], [], [], np.zeros((3, 2)), {}, proxy, {"a": -proxy, "means": proxy[:, :1]}, [None] * 3)
    # Differences 1 and 3: mean 2, standard deviation sqrt(2), standard error 1. A gold known by its means alone has none.
    gain = {"difference": 2.0, "standard_error": pytest.approx(1.0)}
    assert gains(run) == {"proxy": gain, "a": {**gain, "difference": -2.0}}


# ------------------------------------------------------------------------------------------------------ kept row by row


def test_what_is_scored_is_not_scored_again(tmp_path):
    path = tmp_path / "x.scores.jsonl"
    calls = []

    def score(places):
        for place in places:
            calls.append(place)
            yield [place], [place + 0.5]

    texts = [{"t": "a"}, {"t": "b"}, {"t": "a"}]
    done = []
    assert score_rows(ScoreStore(path, {"gold": "one"}), texts, score, done.append) == [0.5, 1.5, 0.5]
    assert calls == [0, 1] and sum(done) == 3  # equal rows are scored once
    assert score_rows(ScoreStore(path, {"gold": "one"}), [*texts, {"t": "c"}], score, done.append) == [0.5, 1.5, 0.5, 3.5]
    assert calls == [0, 1, 3]
    assert score_rows(ScoreStore(path, {"gold": "two"}), texts[:1], score, done.append) == [0.5]  # another scorer, the same file
    assert calls == [0, 1, 3, 0]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["facts"] for line in lines if "facts" in line] == [{"gold": "one"}, {"gold": "two"}]
    assert [line["row"] for line in lines if "text" in line] == [1, 2, 4, 1]


def test_an_interruption_loses_one_batch(tmp_path):
    path = tmp_path / "x.scores.jsonl"
    texts = [{"t": name} for name in "abcd"]

    def interrupted(places):
        yield places[:2], [1.0, 2.0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_rows(ScoreStore(path, {}), texts, interrupted, len_of := [].append)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + '{"scorer": "torn', encoding="utf-8")
    store = ScoreStore(path, {})
    store.add([])  # the first addition cuts off what was torn
    assert sorted(store.found.values()) == [1.0, 2.0] and path.read_text(encoding="utf-8") == whole
    rest = []
    score_rows(store, texts, lambda places: iter([(places, rest.extend(places) or [3.0, 4.0])]), len_of)
    assert rest == [2, 3]
    path.write_text(whole + "[]\n", encoding="utf-8")
    with pytest.raises(InputError, match="x.scores.jsonl: line 4 is no score"):
        ScoreStore(path, {})


def test_rows_of_several_files_are_scored_together(tmp_path):
    """Each text once, whichever files it is in; every file keeps its own rows, and those another file knew."""
    calls = []

    class Gold:
        def iter_rewards(self, batch):
            calls.append(batch["response"])
            yield [1, 0], [float(len(batch["response"][1])), float(len(batch["response"][0]))]

    def stores():
        return [ScoreStore(tmp_path / name, {"gold": "one"}) for name in ("a", "b")]

    files = [(["q", "q", "q"], ["x", "known", "x"]), (["q", "q"], ["long", "x"])]
    before = stores()
    gold_columns(Gold(), before[:1], [(["q", "q"], ["known", "zz"])], int)
    calls.clear()
    done = []
    assert gold_columns(Gold(), stores(), files, done.append) == [[1.0, 5.0, 1.0], [4.0, 1.0]]
    assert calls == [["x", "long"]] and sum(done) == 5
    found = [[line["row"] for line in map(json.loads, (tmp_path / name).read_text().splitlines()) if "text" in line] for name in ("a", "b")]
    assert found == [[1, 2, 1], [1, 2]]
    calls.clear()
    assert gold_columns(Gold(), stores(), files, int) == [[1.0, 5.0, 1.0], [4.0, 1.0]] and calls == []


def test_a_kept_text_may_hold_any_character(tmp_path):
    texts = [{"t": "a"}]
    for _ in range(2):
        store = ScoreStore(tmp_path / "s", {})
        assert score_rows(store, texts, lambda places: iter([(places, ["one\u2028two\x85\ud83d"])]), int) == ["one\u2028two\x85\ud83d"]


def test_proxy_components_are_kept(tmp_path):
    reward = ReversedEngineeredRewardForInference(load_template("alpaca"), repetition_penalty=True)
    batch = {"query": ["q", "q"], "response": ["one two three one two three one two three", "four"]}
    first = proxy_columns(lambda: reward, ScoreStore(tmp_path / "s", {"x": 1}), batch, int)
    assert first == reward.score(batch) and first["total"] == [pytest.approx(0.09 * 3 / 7), 0.01]
    assert proxy_columns(None, ScoreStore(tmp_path / "s", {"x": 1}), batch, int) == first


# ---------------------------------------------------------------------------------------------------------------- whole


def test_components_that_differ_between_rows_are_refused(tmp_path):
    """A function's columns may depend on the rows that it is called with, and those of one call are not those of another."""

    class Reward:
        def score(self, batch):
            return {"total": [1.0] * len(batch["response"]), **({"long": [1.0]} if batch["response"] == ["b"] else {})}

    for text in "ab":
        proxy_columns(Reward, ScoreStore(tmp_path / "scores.jsonl", {}), {"response": [text]}, lambda rows: None)
    with pytest.raises(InputError, match="reward: columns total, long of some rows and total of others, expected the same of all"):
        proxy_columns(Reward, ScoreStore(tmp_path / "scores.jsonl", {}), {"response": ["a", "b"]}, lambda rows: None)


def test_a_column_of_the_data_set_is_found_by_the_record(tmp_path):
    """A feature that reads a column of its own finds it in the file that the rollouts were made from."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "a", "keywords": "x"}]), encoding="utf-8")
    point = SimpleNamespace(rows=[{"instruction": "a"}], meta={"data_path": str(data)}, rollouts=tmp_path / "rollouts.json")
    proxy = SimpleNamespace(dataset_fields={"keywords": None}, reads_besides=lambda *known: set(proxy.dataset_fields) - set(known))
    assert read_references(SimpleNamespace(data_path=""), [point], proxy) == [{"instruction": "a", "keywords": "x"}]
    proxy.dataset_fields = {"qtype": None}
    assert read_references(SimpleNamespace(data_path=""), [point], proxy) == [{"qtype": None}]


def test_a_run_as_one_value(tmp_path):
    settings = make_run(tmp_path, [1, 2, 4], instructions=("a", "b", "c"))
    typed = {"relevance_scaling": False, "repetition_penalty": False}
    with pytest.warns(UserWarning, match="changes nothing"):
        run = read_run(settings, typed, "run")
        reward = run.proxy.load_reward(run.template, 512, None)
    tables = [reward.score({"query": ["a", "b", "c"], "response": [row["output"] for row in point.rows]}) for point in run.checkpoints]
    scored = scored_run(run, tables, {"gold": np.array([[1.0], [3.0], [2.0]])})
    np.testing.assert_allclose(scored.proxy, [[0.02] * 3, [0.03] * 3, [0.05] * 3])
    assert list(scored.components) == ["length", "repetition"] and scored.tokens.tolist() == [[2] * 3, [3] * 3, [5] * 3]
    assert scored.found["gold"]["spearman"] == pytest.approx(0.5) and scored.found["gold"]["turning_point"] == 2
    assert curve(scored)[1] == {
        "step": 2, "proxy": pytest.approx(0.03), "gold": 3.0, "length": pytest.approx(0.03), "repetition": 1.0, "tokens": 3.0, "rows": 3,
    }  # fmt: skip


def test_several_runs_and_golds_from_the_command_line(tmp_path, tiny_gold):
    """Two seeds, a gold model and a table of another gold; the second time nothing is scored."""
    for name in ("one", "two"):
        make_run(tmp_path, [1, 2, 4], instructions=[row["input"] for row in ROWS], name=name)
    table = tmp_path / "human.csv"
    table.write_text("run,step,human\none,1,1\none,2,3\none,4,2\ntwo,4,2\ntwo,1,1\ntwo,2,3\n", encoding="utf-8")
    words = ["eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix", "one", "two", "--relevance_scaling=false",
             "--reward_branching=false", f"--gold_model={tiny_gold}", f"--gold_scores={table}", "--gold_batch_tokens=64"]  # fmt: skip
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    assert "gold human: mean SpearmanR 0.500 over 2 runs, standard error 0.000" in done.stdout
    assert "the golds among themselves: SpearmanR" in done.stdout
    alone = read_json(tmp_path / "one_monotonicity" / "monotonicity.json")
    assert alone["spearman"]["human"]["spearman"] == pytest.approx(0.5)
    # "Write a line about rain. w w w w": ten tokens, seven different trigrams of eight
    assert alone["per_row"]["proxy"]["4"][1] == pytest.approx(0.1 * 7 / 8)
    both = read_json(tmp_path / "one+two_monotonicity" / "monotonicity.json")["together"]
    assert both["human"]["runs"] == {"one": pytest.approx(0.5), "two": pytest.approx(0.5)}
    # Of the 36 pairs of orders 1 has the correlations 1, 1, 4 have 1, 0.5 and 4 have 0.5, 0.5; as many are as far below zero.
    assert both["human"]["pvalue"] == pytest.approx(18 / 36, abs=0.01)
    for folder in ("one_monotonicity", "one+two_monotonicity"):
        assert (tmp_path / folder / "report.html").is_file()

    from parts.gold_models import load_gold_reward_model

    rows = read_rows_of(tmp_path / "two_step_2" / "alpaca-eval-two_step_2.json")
    gold = load_gold_reward_model(str(tiny_gold), device="cpu")
    expected = gold.get_reward({"query": [row["instruction"] for row in rows], "response": [row["output"] for row in rows]})
    found = read_json(tmp_path / "two_monotonicity" / "monotonicity.json")["per_row"]["gold"]
    assert found == {"gold": {"1": [pytest.approx(value, rel=1e-4, abs=1e-5) for value in found["gold"]["1"]], **{
        "2": [pytest.approx(value, rel=1e-4, abs=1e-5) for value in expected]}, "4": found["gold"]["4"]}}  # fmt: skip
    kept = {path: path.read_bytes() for path in tmp_path.glob("*_step_*/*.scores.jsonl")}
    assert len(kept) == 6
    done = run_script(*words)
    assert done.returncode == 0 and {path: path.read_bytes() for path in kept} == kept


def test_a_design_in_symbols():
    assert list(all_designs(ProxySettings(length_target=50).switched_on)) == ["LI (target 50)", "1"]
    paper = ProxySettings(repetition_penalty=True, relevance_scaling=True, reward_branching=True).switched_on
    assert len(all_designs(paper)) == 16
    for name, switches in all_designs(paper).items():
        assert design_name(ProxySettings(**switches)) == name
    assert design_name(RewardSettings(length_target=60, rouge_l=True)) == "LI (target 60) * rouge_l"
    assert design_name(RewardSettings(reward_function="my.py:score")) == "my.py:score"


def record(folder, steps, name, **settings):
    """A training record for each checkpoint of a run that `make_run` made, and a log with the KL."""
    settings = {
        "repetition_penalty": False,
        "relevance_scaling": False,
        "reward_branching": False,
        "logging_dir": str(folder / name),
        **settings,
    }
    for step in steps:
        (folder / f"{name}_step_{step}" / "training_record.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    (folder / name).mkdir()
    lines = [{"step": step, "objective/kl": float(step)} for step in range(1, 9)]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_a_run_knows_its_design(tmp_path, capsys):
    trained = {"li": {}, "target": {"length_target": 20}, "learned": {"reward_model_name": "owner/rm", "relevance_model_name": "owner/one"},
               "near": {"relevance_scaling": True, "relevance_model_name": "owner/one"},
               "far": {"relevance_scaling": True, "relevance_model_name": "owner/two"}}  # fmt: skip
    for name, settings in trained.items():
        make_run(tmp_path, [1, 2, 4], name=name)
        record(tmp_path, [1, 2, 4], name, **settings)
    make_run(tmp_path, [1, 2, 4], name="unrecorded")
    settings = MonotonicitySettings(output_dir=str(tmp_path), model_prefix=["li"])
    typed = {"relevance_scaling": False, "reward_branching": False}
    runs = {name: read_run(settings, {}, name) for name in ("li", "target")}
    runs |= {name: read_run(settings, typed, name) for name in ("learned", "unrecorded")}
    assert [run.design for run in runs.values()] == ["LI", "LI (target 20)", "reward model rm (proxy: LI * RP)", "LI * RP"]
    assert [run.own for run in runs.values()] == [True, True, False, False]  # without a record nobody knows
    assert read_run(settings, {"repetition_penalty": True}, "li").own is False
    assert read_run(replace(settings, output_max_length=64), {}, "li").own is False
    assert read_run(replace(settings, chat_template_name="alpaca"), {}, "li").own is True
    assert name_designs([runs["li"], runs["unrecorded"]]) == ["LI", "LI * RP"]
    near, far = (
        replace(runs["li"], proxy=proxy_of_run(trained[name] | {"repetition_penalty": False, "reward_branching": False}))
        for name in ("near", "far")
    )
    assert near.design == far.design == "LI * relevance" and name_designs([near, near]) == ["LI * relevance"] * 2
    assert (
        name_designs([near, far])[1]
        == "length_incentive=True, relevance_scaling=True, relevance by `owner/two`, alpaca prompts, responses of 512 tokens at most"
    )
    longer = replace(runs["li"], output_max_length=1024)
    assert name_designs([runs["li"], longer])[1].endswith("alpaca prompts, responses of 1024 tokens at most")


def test_other_seeds_that_were_trained_otherwise_are_named(tmp_path, capsys):
    for name, more in (("one", {"seed": 1}), ("two", {"seed": 2, "output_dir": "b"}), ("three", {"seed": 3, "learning_rate": 1e-4})):
        settings = make_run(tmp_path, [1, 2, 4], name=name)
        record(tmp_path, [1, 2, 4], name, **{"learning_rate": 1e-5, **more})
    runs = [read_run(settings, {}, name) for name in ("one", "two", "three")]
    warn_of_other_training(runs, name_designs(runs), OF_THE_REWARD)
    assert capsys.readouterr().out == "warning: three counts as another seed of one, and was trained with another learning_rate\n"


def test_designs_that_were_trained_otherwise_are_named(tmp_path, capsys):
    """By settings besides the reward's, and by the weights, the rows and the processes that records know."""
    more = {"base_sample": {"w": [1.0]}, "data": {"dataset_path": "x"}, "processes": 1}
    for name, reward, settings, record_of in (
        ("li", False, {"learning_rate": 1e-5, "model_name": "a", "dataset_path": "a.json"}, more),
        ("rp", True, {"learning_rate": 1e-5, "model_name": "copy/of/a", "dataset_path": "b.json"}, more),
        ("other", True, {"learning_rate": 1e-3, "model_name": "a", "dataset_path": "a.json"},
         {"base_sample": {"w": [2.0]}, "data": {"dataset_path": "y"}, "processes": 2}),
    ):  # fmt: skip
        found = make_run(tmp_path, [1, 2, 4], name=name)
        record(tmp_path, [1, 2, 4], name, **{**settings, "repetition_penalty": reward})
        for step in (1, 2, 4):
            path = tmp_path / f"{name}_step_{step}" / "training_record.json"
            path.write_text(json.dumps({**read_json(path), **record_of}), encoding="utf-8")
    runs = [read_run(found, {}, name) for name in ("li", "rp", "other")]
    capsys.readouterr()
    warn_of_other_training(runs[:2], name_designs(runs[:2]), OF_THE_REWARD)
    assert capsys.readouterr().out == ""
    warn_of_other_training([runs[0], runs[2]], ["LI", "LI * RP"], OF_THE_REWARD)
    assert capsys.readouterr().out == (
        "warning: other is compared with li, and was trained with another dataset_path, learning_rate, model_name, number of processes\n"
    )


def test_checkpoints_of_two_trainings_are_not_one_run(tmp_path, capsys):
    settings = make_run(tmp_path, [1, 2, 4, 8])
    record(tmp_path, [1, 2, 4, 8], "run", learning_rate=1e-5)
    for step in (1, 2):
        path = tmp_path / f"run_step_{step}" / "training_record.json"
        kept = read_json(path)
        path.write_text(
            json.dumps({"settings": {**kept["settings"], "learning_rate": 1e-4, "repetition_penalty": step == 1}}), encoding="utf-8"
        )
    run = read_run(settings, {}, "run")
    assert capsys.readouterr().out == (
        "warning: run_step_1 was trained with another learning_rate, repetition_penalty than run_step_8\n"
        "warning: run_step_2 was trained with another learning_rate than run_step_8\n"
    )
    assert not run.own  # gold beside a proxy that it was not trained on in part
    assert replace(run, one_training=True).own


def test_two_folders_of_one_step_are_an_error(tmp_path):
    settings = make_run(tmp_path, [1, 2, 4])
    (tmp_path / "run_step_04").mkdir()
    with pytest.raises(
        InputError, match="run_step_4 and run_step_04 are both step 4 of run|run_step_04 and run_step_4 are both step 4 of run"
    ):
        choose_checkpoints(settings, "run")
    done = run_script("eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix", "run/")
    assert done.returncode == 2 and "--model_prefix: run/, expected the beginning of folders' names in --output_dir" in done.stderr


def test_the_template_of_rollouts_without_a_record_is_that_which_made_them(tmp_path):
    settings = make_run(tmp_path, [1, 2, 4])
    for step in (1, 2, 4):
        (tmp_path / f"run_step_{step}" / f"alpaca-eval-run_step_{step}.meta.json").write_text('{"template": "llama-2"}', encoding="utf-8")
    typed = {"relevance_scaling": False, "reward_branching": False}
    run = read_run(settings, typed, "run")
    assert run.template.name == "llama-2" and run.template.strip_response("fine [INST] more") == "fine"
    assert read_run(replace(settings, chat_template_name="alpaca"), typed, "run").template.name == "alpaca"


def test_checkpoints_with_other_columns_are_one_line(tmp_path):
    """A user's function that adds a column only where a response is long."""
    make_run(tmp_path, [1, 2, 4])
    (tmp_path / "f.py").write_text(
        "def f(prompts, completions, **columns):\n"
        "    long = {'extra': [1.0] * len(prompts)} if len(completions[0].split()) > 4 else {}\n"
        "    return {'total': [float(len(text)) for text in completions], **long}\n",
        encoding="utf-8",
    )
    (tmp_path / "gold.csv").write_text("step,gold\n1,1\n2,2\n4,3\n", encoding="utf-8")
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": text} for text in "ab"]), encoding="utf-8")
    words = ("eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix=run", f"--gold_scores={tmp_path}/gold.csv")
    done = run_script(*words, f"--data_path={tmp_path}/data.json", f"--reward_function={tmp_path}/f.py:f")
    told = "error: reward: columns total, extra in run_step_4 and total in run_step_1, expected the same of all checkpoints"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, told)


def test_rollouts_of_designs_that_were_drawn_otherwise_are_named(tmp_path, capsys):
    for name, temperature in (("one", 0.7), ("two", 0.7), ("three", 1.0)):
        settings = make_run(tmp_path, [1, 2, 4], name=name)
        for step in (1, 2, 4):
            meta = tmp_path / f"{name}_step_{step}" / f"alpaca-eval-{name}_step_{step}.meta.json"
            meta.write_text(json.dumps({"decoding": {"temperature": temperature}}), encoding="utf-8")
    typed = {"relevance_scaling": False, "reward_branching": False}
    warn_of_other_draws([read_run(settings, typed, name) for name in ("one", "two", "three")])
    assert capsys.readouterr().out == "warning: the rollouts of three were made with another decoding than those of one\n"


def test_two_designs_from_the_command_line(tmp_path, tiny_gold):
    """LI's own run and LI * RP's: one comparison, with the gains that literal counts of words give."""
    for name, repetition in (("li", False), ("rp", True)):
        make_run(tmp_path, [1, 2, 4], instructions=[row["input"] for row in ROWS], name=name)
        record(tmp_path, [1, 2, 4], name, repetition_penalty=repetition)
    done = run_script("eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix", "li", "rp", f"--gold_model={tiny_gold}")
    assert done.returncode == 0, done.stderr
    assert "together" not in done.stdout and "warning: the rollouts" not in done.stdout
    said = done.stdout.split("what each reward did to gold")[1]
    assert "LI: the proxy rises by 0.03 (the same on every prompt) and gold " in said
    assert "Gold does not tell LI from LI * RP (+0.00, the same on every prompt), paired by prompt." in said
    content = read_json(tmp_path / "li+rp_monotonicity" / "monotonicity.json")
    one, two = content["comparison"]["runs"]
    assert (one["design"], two["design"], one["own"], two["own"]) == ("LI", "LI * RP", True, True)
    assert one["proxy"]["difference"] == pytest.approx(0.03) and one["kl"] == [2.5, 5.0] and one["steps"] == [1, 4]
    assert content["comparison"]["pairs"] == [
        {"runs": ["li", "rp"], "golds": {"gold": {"difference": pytest.approx(0, abs=1e-5), "standard_error": pytest.approx(0, abs=1e-5)}}}
    ]
    assert content["provenance"]["proxy"]["rp"]["repetition_penalty"] is True
    assert content["provenance"]["warnings"] == []
    for name in ("monotonicity.png", "report.html"):
        assert (tmp_path / "li+rp_monotonicity" / name).is_file()
    # Other prompts in one of them, and a third run of a design that is there already.
    make_run(tmp_path, [1, 2, 4], instructions=["Another prompt.", "And one more, longer."], name="third")
    record(tmp_path, [1, 2, 4], "third", repetition_penalty=True)
    done = run_script(
        "eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix", "li", "rp", "third", f"--gold_model={tiny_gold}"
    )
    assert done.returncode == 0, done.stderr
    assert "together: LI * RP\n" in done.stdout
    assert "LI and third (LI * RP) answered different prompts, so their gains are not paired." in done.stdout
    assert len(read_json(tmp_path / "li+rp+third_monotonicity" / "monotonicity.json")["comparison"]["pairs"]) == 1


def read_rows_of(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_designs_on_outputs_of_systems(tmp_path):
    """Longer systems win on this board, and the longest repeats itself."""
    texts = {"short": "one two", "middle": "one two three four five", "long": "a b c a b c a b c a b c a b c a b c"}
    for name, text in texts.items():
        rows = [{"instruction": row["input"], "output": text, "generator": name} for row in ROWS]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    board = tmp_path / "board.csv"
    board.write_text("generator,longest,plain,mode\nshort,1,2,x\nmiddle,2,3,x\nlong,3,1,x\n", encoding="utf-8")
    words = ["eval_monotonicity.py", "--rollouts", *(tmp_path / f"{name}.json" for name in texts), f"--gold_scores={board}",
             f"--output_dir={tmp_path}"]  # fmt: skip
    done = run_script(*words, "--relevance_scaling=false", "--reward_branching=false", "--repetition_penalty=false")
    assert done.returncode == 0, done.stderr
    assert "longest: SpearmanR 1.000 for as set, n = 3 systems, permutation p 0.3333" in done.stdout
    content = read_json(tmp_path / "designs" / "designs.json")
    assert content["means"]["long"]["as set"] == pytest.approx(0.18)
    assert content["designs"]["as set"]["plain"]["spearman"] == pytest.approx(-0.5)
    done = run_script(*words[:4], f"--gold_scores={board}", "--relevance_scaling=false", "--reward_branching=false")
    assert done.returncode == 2 and "fewer than 3 of the systems in every column" in done.stderr
    done = run_script(*words, "--all_designs=true")
    assert done.returncode == 2 and "--data_path is missing" in done.stderr
