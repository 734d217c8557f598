"""Best-of-n: several samples a row, the estimator against every subset, the command from samples to table, and rejection sampling."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY, ROWS, run_script
from nltk.tokenize import wordpunct_tokenize
from test_processes import launcher

from eval_monotonicity import only_of, run_to_choose_by
from parts.best_of_n import best_of_n_weights, divergence, judge_all, rank_all, ranked_by, subset_sizes
from parts.best_of_n_command import sentences
from parts.designs import all_designs
from parts.errors import InputError, run_main
from parts.files import read_json
from parts.gold_models import load_gold_reward_model
from parts.models import load_tokenizer
from parts.relevance import load_encoder
from parts.rollouts import sample_rows
from parts.rows import read_rows
from parts.run_checks import check_start
from parts.samples import Samples, best_rows
from parts.sampling import Decoding, row_draws, sample
from parts.weight_samples import weight_sample
from reward_model import FULL_DESIGN, RewardSettings, repetition_penalty
from train_sft import SFTSettings

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
            (ids,) = sample(model, [prompt], Decoding(12), row_draws(42, [place], 12, "model", number), {tokenizer.eos_token_id})
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
    assert sorted(path.name for path in (tmp_path / "alone" / "model").glob("[!.]*")) == [  # but this process's locks
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


def test_two_processes_share_the_samples_out(tiny_model, sampled, eval_file, tmp_path):
    words = evaluation_words(tiny_model, eval_file, tmp_path / "two", SAMPLES, "--batch_size=5")
    done = run_script(*words, launcher=launcher("torchrun"))
    assert done.returncode == 0, done.stderr[-3000:]
    for file in (sampled, sampled.with_name("alpaca-eval-model.json")):
        assert (tmp_path / "two" / "model" / file.name).read_bytes() == file.read_bytes()


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


# --------------------------------------------------------------------------------------------------------- the estimator


def test_weights_of_four_samples():
    # Of the six pairs, the best is the fourth in three, the third in two, the second in one. With ties it is one of the two best in five.
    assert best_of_n_weights(np.array([[1.0, 2, 3, 4]]), [1, 2, 4])[:, 0] * 12 == pytest.approx(
        np.array([[3, 3, 3, 3], [0, 2, 4, 6], [0, 0, 0, 12]])
    )
    assert best_of_n_weights(np.array([[7.0, 1, 7, 1]]), [2])[0, 0] * 12 == pytest.approx([5, 1, 5, 1])
    assert np.ptp(best_of_n_weights(np.full((1, 5), 0.3), [1, 2, 4, 5])) == 0  # a constant proxy chooses as chance does, to the last bit


@pytest.mark.parametrize("proxy", [[3, 1, 2, 6, 5, 4], [2, 2, 1, 3, 3, 3], [1, 0, 0, 1, 0, 0], [5, 5, 5, 5, 5, 5]])
def test_the_estimator_is_the_mean_over_every_subset(proxy):
    gold = [0.5, -1.0, 2.0, 0.25, 4.0, -3.0]
    for n in range(1, 7):
        means = []
        for subset in itertools.combinations(range(6), n):
            best = max(proxy[place] for place in subset)
            means.append(np.mean([gold[place] for place in subset if proxy[place] == best]))  # equals share
        assert ranked_by(np.array([proxy]), np.array([gold]), [n])[0, 0] == pytest.approx(np.mean(means))
    assert ranked_by(np.array([proxy]), np.array([proxy]), [6])[0, 0] == pytest.approx(max(proxy))


def test_sizes_and_divergence():
    assert [subset_sizes(count) for count in (2, 6, 16)] == [[1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]
    assert [divergence(n) for n in (1, 2, 16)] == pytest.approx([0.0, 0.193147, 1.835089], abs=1e-6)


def test_what_is_said_of_a_ranking():
    """Two prompts whose gold rises with one proxy, and rises and falls with another: literal gains, errors, peaks."""
    up = np.array([[0.0, 1, 2, 3], [0, 1, 2, 3]])
    gold = {"gold": np.array([[0.0, 2, 4, 6], [0, 6, 3, 3]])}
    rankings = rank_all({"up": up, "same": np.ones((2, 4))}, gold, [1, 2, 4])
    found = judge_all([1, 2, 4], rankings, ["OPENENDED", "CONSTRAINED"])["gold"]
    assert list(found) == ["up", "same", "gold itself"]
    # n = 2: weights 0, 1, 2, 3 of 6: 28/6 and 21/6 against 3 and 3. n = 4: the last ones, 6 and 3.
    assert found["up"]["gold"] == pytest.approx([3.0, 49 / 12, 4.5])
    assert found["up"]["gain"] == pytest.approx([0.0, 13 / 12, 1.5])
    assert found["up"]["standard_error"] == pytest.approx([0.0, 7 / 12, 1.5])
    assert (found["up"]["spearman"], found["up"]["peak"], found["up"]["turning_point"]) == (pytest.approx(1.0), 4, None)
    second = found["up"]["by_qtype"]["CONSTRAINED"]
    assert second["gold"] == pytest.approx([3.0, 3.5, 3.0]) and second["standard_error"] == [None] * 3
    assert (second["peak"], second["turning_point"], second["rows"]) == (2, 2, 1)
    assert found["up"]["fall"] == {"difference": 0.0, "standard_error": 0.0} and second["fall"] is None
    scaling = found["up"]["scaling"]
    assert (scaling["form"], scaling["points"]) == ("best-of-n", 2) and "expected at least 4" in scaling["reason"]
    assert found["same"]["gain"] == [0.0] * 3 and found["same"]["spearman"] is None and found["same"]["interval"] is None
    assert found["gold itself"]["gold"][2] == pytest.approx(6.0)


def test_a_fall_is_said_as_strongly_as_its_error_allows():
    entry = {"proxy": [0.0, 1.0, 2.0], "peak": 2, "fall": {"difference": -0.5, "standard_error": 0.2}, "scaling": {}}
    weak = {**entry, "fall": {"difference": -0.5, "standard_error": 0.3}}
    idle, steady = {**entry, "proxy": [1.0, 1.0, 1.0]}, {**entry, "peak": 4, "fall": {"difference": 0.0, "standard_error": 0.0}}
    assert list(sentences([1, 2, 4], {"LI": entry, "LI * RP": weak, "1": idle, "gold itself": steady})) == [
        "LI: gold peaks at n = 2 and is lower by 0.50, SE 0.20 at n = 4, where the proxy is higher: the proxy is over-optimised",
        "LI * RP: gold peaks at n = 2 and is lower by 0.50, SE 0.30 at n = 4, where the proxy is higher: that is not told from noise",
    ]


# ----------------------------------------------------------------------------------------------------------- the command

LI_RP = ["--relevance_scaling=false", "--reward_branching=false"]


def test_from_samples_to_the_table(sampled, tiny_model, tiny_gold, tmp_path, monkeypatch, capsys):
    """The scores behind the table are those of the reward and of the gold alone; a second call scores nothing."""
    from parts.chat_templates import load_template
    from parts.models import load_tokenizer
    from reward_model import ReversedEngineeredRewardForInference

    words = ["eval_monotonicity.py", "--best_of_n", sampled, "--gold_model", tiny_gold, f"--output_dir={tmp_path}", *LI_RP]
    assert run_inside(monkeypatch, *words) == 0
    content = read_json(tmp_path / "model_best_of_n" / "best_of_n.json")
    rows = read_rows(sampled, {})
    texts = [[each["output"] for each in row["responses"]] for row in rows]
    batch = {"query": [row["instruction"] for row in rows for _ in range(SAMPLES)], "response": [text for own in texts for text in own]}
    template = load_template("tokenizer", load_tokenizer(str(tiny_model)))
    reward = ReversedEngineeredRewardForInference(template, repetition_penalty=True)
    proxy = np.array(reward.get_reward(batch)).reshape(6, SAMPLES)
    gold = np.array(load_gold_reward_model(str(tiny_gold), device="cpu").get_reward(batch)).reshape(6, SAMPLES)
    entry = content["golds"]["gold"]["LI * RP"]
    assert content["n"] == [1, 2, 4, 6] and entry["rows"] == 6
    assert entry["proxy"] == pytest.approx(ranked_by(proxy, proxy, [1, 2, 4, 6]).mean(axis=1))
    assert entry["gold"] == pytest.approx(ranked_by(proxy, gold, [1, 2, 4, 6]).mean(axis=1), rel=1e-4, abs=1e-6)
    assert content["golds"]["gold"]["gold itself"]["gold"][3] == pytest.approx(gold.max(axis=1).mean(), rel=1e-4)
    assert entry["by_qtype"]["OPENENDED"]["proxy"][3] == pytest.approx(proxy[1::2].max(axis=1).mean())
    assert (tmp_path / "model_best_of_n" / "best_of_n.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert f"LI * RP      {entry['gain'][1]:+.2f} ({entry['standard_error'][1]:.2f})" in said
    assert "0.00 at n = 1, 0.19 at n = 2, 0.64 at n = 4" in said
    kept = sampled.with_name("samples-model.scores.jsonl").read_text(encoding="utf-8")
    assert run_inside(monkeypatch, *words) == 0
    assert sampled.with_name("samples-model.scores.jsonl").read_text(encoding="utf-8") == kept


def test_all_designs_from_one_scoring(sampled, tiny_gold, tmp_path, monkeypatch):
    """Sixteen designs, some of them by name, and one by its flags say the same of the same design."""
    words = ["eval_monotonicity.py", "--best_of_n", sampled, "--gold_model", tiny_gold, f"--output_dir={tmp_path}",
             "--relevance_model_name=models/all-MiniLM-L6-v2"]  # fmt: skip
    found = {}
    for name, more in {"all": ["--all_designs=true"], "some": ["--designs", "LI * RP", "LI"], "one": LI_RP}.items():
        assert run_inside(monkeypatch, *words, *more) == 0
        found[name] = read_json(tmp_path / "model_best_of_n" / "best_of_n.json")["golds"]["gold"]
    assert len(found["all"]) == 17 and "LI * RP * relevance, branching" in found["all"]
    assert list(found["some"]) == ["LI * RP", "LI", "gold itself"] and list(found["one"]) == ["LI * RP", "gold itself"]
    assert found["all"]["LI * RP"] == found["some"]["LI * RP"] == found["one"]["LI * RP"]
    assert found["all"]["1"]["gain"] == [0.0] * 4 and found["all"]["1"]["spearman"] is None
    lines = [json.loads(line) for line in sampled.with_name("samples-model.scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len([line for line in lines if "facts" in line]) == 4  # the features of all designs, of LI and RP for two and for one, and gold


def test_samples_beside_a_run_of_ppo(sampled, tiny_gold, tmp_path, monkeypatch, capsys):
    """The run's own design chooses among the samples; both curves are in one file, one figure and one page."""
    settings = {"repetition_penalty": False, "relevance_scaling": False, "reward_branching": False, "logging_dir": str(tmp_path / "li"),
                "relevance_model_name": "models/all-MiniLM-L6-v2", "output_max_length": 77}  # fmt: skip
    for step in (1, 2, 3):
        folder = tmp_path / f"li_step_{step}"
        folder.mkdir()
        rows = [{"instruction": text, "output": f"{text} {'w ' * step}".strip()} for text in "abcd"]
        (folder / f"alpaca-eval-{folder.name}.json").write_text(json.dumps(rows), encoding="utf-8")
        (folder / "training_record.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
    (tmp_path / "li").mkdir()
    log = [json.dumps({"step": step, "objective/kl": step / 2}) for step in (1, 2, 3)]
    (tmp_path / "li" / "metrics.jsonl").write_text("\n".join(log) + "\n", encoding="utf-8")
    words = ["eval_monotonicity.py", f"--output_dir={tmp_path}", "--model_prefix=li", "--gold_model", tiny_gold, "--best_of_n", sampled]
    loads, loaders = [], {"parts.relevance.load_encoder": load_encoder, "parts.gold_models.load_gold_reward_model": load_gold_reward_model}
    for name, load in loaders.items():
        monkeypatch.setattr(name, lambda *given, load=load, **more: loads.append(load.__name__) or load(*given, **more))
    assert run_inside(monkeypatch, *words) == 0
    assert loads == ["load_gold_reward_model"]  # once; length alone needs no encoder
    written = read_json(tmp_path / "model_best_of_n" / "best_of_n.json")
    chosen, made = written["golds"]["gold"], written["provenance"]
    # The samples are scored by the run's encoder and length, as the run's own rollouts are.
    assert made["proxy"]["relevance_model_name"] == "models/all-MiniLM-L6-v2" and made["settings"]["output_max_length"] == 77
    assert list(chosen) == ["LI", "1", "gold itself"]  # what the runs' designs can be composed of
    folder = tmp_path / "li+best_of_n_monotonicity"
    assert "best-of-n" in (folder / "report.html").read_text(encoding="utf-8")
    content = read_json(folder / "monotonicity.json")
    assert [entry["design"] for entry in content["comparison"]["runs"]] == ["LI"]
    assert list(content["scaling"]) == ["li: LI", "best of n: LI"]
    fit = content["scaling"]["best of n: LI"]["gold"]
    assert fit == chosen["LI"]["scaling"] and fit["reason"].startswith("3 points")  # n = 2, 4 and 6
    assert "curve" in read_json(tmp_path / "li_monotonicity" / "monotonicity.json")  # the run's own stays
    said = capsys.readouterr().out
    assert "no curve of" not in said
    for name in loaders:
        monkeypatch.setattr(name, None)  # every row is scored
    assert run_inside(monkeypatch, *words, "--designs", "LI * RP") == 0
    assert "warning: --best_of_n has no curve of LI\n" in capsys.readouterr().out


def test_samples_of_a_trained_policy_do_not_stand_beside_its_run(tmp_path, capsys):
    """Their KL is not from where the run began."""
    rows = [{"instruction": name, "output": name} for name in "abc"]
    run = SimpleNamespace(name="full", checkpoints=[SimpleNamespace(rows=rows, meta={}, record={})])
    for step in (0, 5):
        folder = tmp_path / f"full_step_{step}"
        folder.mkdir()
        path = write_samples(folder / f"samples-full_step_{step}.jsonl")
        (folder / f"samples-full_step_{step}.meta.json").write_text(json.dumps({"rows": 3, "model": "m", "adapter": str(folder)}))
        if step:
            with pytest.raises(InputError, match="samples of full_step_5, expected those of the model that the runs start from"):
                check_start(Samples(path), [run])
        else:
            check_start(Samples(path), [run])
            assert capsys.readouterr().out == ""
            check_start(Samples(path), [SimpleNamespace(name="li", checkpoints=[SimpleNamespace(rows=rows[:2], meta={}, record={})])])
            assert capsys.readouterr().out == f"warning: {path} and the rollouts of li answer different prompts\n"


def test_samples_of_another_model_do_not_stand_beside_a_run(tmp_path, tiny_model, capsys):
    """By a few numbers of its weights where there are both, else a line asks."""
    path = write_samples(tmp_path / "samples-other.jsonl")
    meta = {"rows": 3, "model": str(tiny_model), "adapter": None, "template": "llama-2"}
    (tmp_path / "samples-other.meta.json").write_text(json.dumps(meta))
    rows = [{"instruction": name, "output": name} for name in "abc"]

    def run(base_sample: dict) -> SimpleNamespace:
        found = {"meta": {"template": "alpaca"}, "record": {"model": "a", "base_sample": base_sample}}
        return SimpleNamespace(name="li", checkpoints=[SimpleNamespace(rows=rows, **found)])

    own = weight_sample(str(tiny_model))
    check_start(Samples(path), [run(own)])
    assert capsys.readouterr().out == f"warning: {path} was made with another template than the rollouts of li\n"
    with pytest.raises(
        InputError, match=f"samples of {tiny_model}, and li started from a, expected those of the model that the runs start"
    ):
        check_start(Samples(path), [run({name: [value + 1 for value in numbers] for name, numbers in own.items()})])
    check_start(Samples(path), [run({})])
    assert f"{path} is of {tiny_model}, and li started from a: are they the same model?" in capsys.readouterr().out


def test_the_best_are_rows_for_fine_tuning(sampled, tiny_model, tmp_path, monkeypatch, capsys):
    """Without a gold; the reader of `train_sft.py` takes them."""
    from parts.chat_templates import load_template
    from parts.models import load_tokenizer
    from parts.sft_data import read_examples

    words = ["eval_monotonicity.py", "--best_of_n", sampled, *LI_RP, "--write_best", 4]
    for file in (tmp_path / "best.json", tmp_path / "lines.jsonl"):
        assert run_inside(monkeypatch, *words, file) == 0
        rows = read_rows(file, {"input": None, "output": None, "qtype": None})
        assert [set(row) for row in rows] == [{"input", "output", "qtype"}] * 6
    assert "best.json: 6 rows" in capsys.readouterr().out
    assert read_json(tmp_path / "best.meta.json")["n"] == 4
    samples = read_rows(sampled, {})
    for row, own in zip(rows, samples):
        outputs = [each["output"] for each in own["responses"]]
        totals = [len(wordpunct_tokenize(text)) / 100 * repetition_penalty(wordpunct_tokenize(text)) for text in outputs[:4]]
        assert row == {"input": own["instruction"], "output": outputs[int(np.argmax(totals))], "qtype": own["qtype"]}
    tokenizer = load_tokenizer(str(tiny_model))
    settings = SFTSettings(model_name=str(tiny_model), output_dir=str(tmp_path / "sft"))
    examples = read_examples(str(tmp_path / "best.json"), settings, tokenizer, load_template("tokenizer", tokenizer))
    assert [example["input"] for example in examples] == [row["input"] for row in ROWS]
    assert run_inside(monkeypatch, *words, tmp_path / "best.json") == 2
    assert "best.json exists already, expected the name of a new file" in capsys.readouterr().err


def test_an_empty_best_is_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [{"instruction": name, "responses": [{"output": ""}, {"output": "x"}]} for name in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = best_rows(Samples(path), [{}, {"qtype": "OPENENDED"}], np.array([[1.0, 0.5], [0.5, 0.5]]), 2)
    assert found == []
    assert best_rows(Samples(path), [{}, {"qtype": "OPENENDED"}], np.array([[1.0, 0.5], [0.5, 1.0]]), 2) == [
        {"input": "b", "output": "x", "qtype": "OPENENDED"}
    ]


def test_turns_stay_with_the_best(tmp_path):
    """A policy that was asked in turns is fine-tuned on the same turns."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Name a dog."}]
    asked = "User: Hi\n\nAssistant: Hello\n\nUser: Name a dog."
    rows = sample_rows([{"instruction": asked, "messages": turns}], ["Rex", "Bello"], [True, False], "m")
    assert rows[0]["messages"] == turns and [each["finish_reason"] for each in rows[0]["responses"]] == ["stop", "length"]
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    found = best_rows(Samples(path), [{}], np.array([[0.5, 1.0]]), 2)
    assert found == [{"input": asked, "output": "Bello", "messages": turns}]
    (tmp_path / "best.json").write_text(json.dumps(found), encoding="utf-8")
    assert read_rows(tmp_path / "best.json", {"input": None})[0]["messages"] == turns


def test_the_run_that_samples_are_chosen_by():
    """The encoder is one that a run was trained with, not the default in the record of a run that needs none."""

    def run(name: str, encoder: str, relevance: bool, length: int = 96) -> SimpleNamespace:
        proxy = RewardSettings(relevance_model_name=encoder, relevance_scaling=relevance, reward_branching=relevance)
        return SimpleNamespace(name=name, proxy=proxy, output_max_length=length)

    li, full = run("li", "facebook/contriever", False), run("full", "a/encoder", True)
    assert run_to_choose_by([li, full]) is full and run_to_choose_by([full, li]) is full and run_to_choose_by([li]) is li
    with pytest.raises(InputError, match="--best_of_n: relevance_model_name is a/encoder in full and b/encoder in other, expected one"):
        run_to_choose_by([li, full, run("other", "b/encoder", True)])
    with pytest.raises(InputError, match="--best_of_n: output_max_length is 96 in li and 48 in full, expected one for all"):
        run_to_choose_by([li, run("full", "a/encoder", True, 48)])


def test_a_function_that_gives_no_score_is_one_line(tmp_path, tiny_gold, monkeypatch, capsys):
    path = write_samples(tmp_path / "samples.jsonl")
    (tmp_path / "samples.meta.json").write_text(json.dumps({"rows": 3, "data_path": str(path)}), encoding="utf-8")
    (tmp_path / "f.py").write_text("def f(prompts, completions, **columns):\n    return [1.0, None] + [2.0] * (len(prompts) - 2)\n")
    words = ["eval_monotonicity.py", f"--gold_model={tiny_gold}", "--best_of_n", path, f"--reward_function={tmp_path}/f.py:f"]
    assert run_inside(monkeypatch, *words) == 2
    assert "samples.jsonl: row 2 has no score, expected one of every row to compare" in capsys.readouterr().err.splitlines()[-1]


def test_a_gold_that_cannot_be_loaded_is_told_before_anything_is_scored(tmp_path, tiny_gold, monkeypatch, capsys):
    path = write_samples(tmp_path / "samples.jsonl")
    monkeypatch.setattr("parts.gold_models.load_gold_reward_model", None)
    monkeypatch.setattr("parts.scores.Proxies.__call__", None)
    words = ["eval_monotonicity.py", *LI_RP, "--gold_model", tiny_gold, "nobody/gold", "--best_of_n", path]
    assert run_inside(monkeypatch, *words) == 2
    assert "error: nobody/gold: cannot be loaded as a reward model's tokenizer" in capsys.readouterr().err.splitlines()[-1]


def test_designs_are_composed_of_what_they_need():
    """By name among all designs; a length target goes with LI."""
    full = RewardSettings(**FULL_DESIGN)
    for names, on in (
        (["LI"], {"length_incentive"}),
        (["LI", "LI * RP"], {"length_incentive", "repetition_penalty"}),
        (["1"], {"length_incentive"}),
        (["1, branching"], {"length_incentive", "reward_branching"}),
        (["RP"], {"repetition_penalty"}),
        (["LI * RP * relevance, branching"], {"length_incentive", "repetition_penalty", "relevance_scaling", "reward_branching"}),
    ):
        some = only_of(full, names)
        assert set(some.switched_on.values()) == on and set(names) <= set(all_designs(some.switched_on))
    assert only_of(RewardSettings(**FULL_DESIGN, length_target=40), ["RP"]).length_target == 0
    with pytest.raises(InputError, match="--designs holds 'XX', expected some of LI"):
        only_of(full, ["XX"])


def write_samples(path: Path, instructions: str = "abc", count: int = 3, text: str = "same") -> Path:
    rows = [{"instruction": name, "responses": [{"output": text}] * count} for name in instructions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, ["--write_best", 4, "{folder}/new.json"], "--write_best is 4, expected at most 3, the samples of a row in"),
        (None, ["--write_best", "x"], "--write_best is 'x', expected n and a file"),
        (None, ["--write_best", 2, "{folder}/samples.jsonl"], "samples.jsonl exists already, expected the name of a new file"),
        (None, ["--write_best", 2, "{folder}/samples.json"], "samples.meta.json exists already, expected the name of a new file"),
        (None, ["--write_best", 2, "{folder}/new.json.gz"], "new.json.gz, expected a file that ends in .json or .jsonl"),
        (None, ["--steps", 2], "--steps and --include_start choose among a run's checkpoints, expected --model_prefix"),
        (None, ["--reward_function={folder}/f.py:f"], "--relevance_scaling: --best_of_n is judged by {folder}/f.py:f, which does not read it"),
        (None, ["--write_best", 2, "{folder}/new.json", "--all_designs=true"], "--write_best takes what one design chooses of one file"),
        (None, ["{folder}/other.jsonl"], "other.jsonl: row 2: another instruction, expected the prompts of"),
        (None, ["{folder}/samples.jsonl"], "samples.jsonl: samples of the name samples come twice, expected one file of each"),
        (None, ["--data_path={folder}/data.json"], "data.json: no row for row 2 of"),
        (None, [], "samples.jsonl: LI * RP is the same for all samples of a row, expected a proxy that can choose"),
        (None, ["--designs", "LI * PR"], "--designs holds 'LI * PR', expected some of LI * RP * relevance, branching; LI * RP"),
        (None, ["--reward_branching=true", "--relevance_scaling=true"], "samples.jsonl: row 1: field 'reference' is missing, expected text"),
        (None, ["--gold_scores=x.csv"], "--best_of_n asks gold for a score of every sample, expected --gold_model and no --gold_scores"),
        (None, ["{folder}/other.jsonl", "--model_prefix=run"], "--best_of_n beside --model_prefix is one policy's samples, expected one file"),
        (None, ["--rollouts=x.json"], "--rollouts are ranked by themselves, expected no --model_prefix and no --best_of_n with them"),
        (lambda text: text[:-20], [], "samples.jsonl: line 3: broken JSON"),
        (lambda text: text[: text.index("\n") + 1], [], "samples.jsonl: 1 rows, expected the 3 of its record: is the file whole?"),
        (lambda text: text.replace(', {"output": "same"}', "", 1), [], "samples.jsonl: row 2: 3 responses, expected 2 as in row 1"),
        (lambda text: text.replace(', {"output": "same"}', ""), [], "samples.jsonl: row 1: 1 responses, expected at least 2"),
        (lambda text: text.replace("output", "text"), [], "samples.jsonl: row 1: no field 'responses' of {output}"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_judged(change, words, message, tmp_path, tiny_gold, monkeypatch, capsys):
    """One line, and no model: none can be loaded."""
    path = write_samples(tmp_path / "samples.jsonl")
    write_samples(tmp_path / "other.jsonl", "axc")
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a"}, {"instruction": "c"}]), encoding="utf-8")
    (tmp_path / "f.py").write_text("def f(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n", encoding="utf-8")
    meta = {"rows": 3, "adapter": None, "model": "nobody/nothing", "template": "alpaca"}
    (tmp_path / "samples.meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if change:
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.setattr("parts.gold_models.load_gold_reward_model", None)
    monkeypatch.setattr("parts.relevance.RelevanceModel", None)
    words = [str(word).format(folder=tmp_path) for word in words]
    gold = [] if "--gold_scores=x.csv" in words else [f"--gold_model={tiny_gold}"]
    assert run_inside(monkeypatch, "eval_monotonicity.py", *LI_RP, *gold, "--best_of_n", path, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message.replace("{folder}", str(tmp_path)) in error
