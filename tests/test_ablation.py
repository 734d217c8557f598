"""The ablation's driver: one cell end to end on a two-layer model, and its summary from literal numbers."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPOSITORY, run_script

from examples import ablation
from parts.files import read_json


def cell(design: str, seed: int, proxy: list[list[float]], gold: list[list[float]], tax: list[list[float]]) -> dict:
    """A kept file: rows' values at steps 0, 5 and 10."""
    steps = ("0", "5", "10")
    curve = [
        {
            "step": int(step),
            "proxy": sum(one) / 2,
            "gold": sum(two) / 2,
            "repetition": 1.0,
            "tokens": 10.0 * seed,
            "kl": float(step),
            "rows": 2,
        }
        for step, one, two in zip(steps, proxy, gold)
    ]
    return {
        "cell": {"design": design, "seed": seed},
        "name": f"{design}-{seed}",
        "curve": curve,
        "per_row": {"proxy": dict(zip(steps, proxy)), "gold": {"gold": dict(zip(steps, gold))}},
        "spearman": {"gold": {"spearman": {"LI": -1.0, "full": 1.0}[design]}},
        "constrained_rouge_l": dict(zip(steps, tax)),
        "eos_rate": dict(zip(steps, (1.0, 0.75, 0.5))),
    }


def test_the_summary_of_kept_cells(tmp_path):
    (tmp_path / "LI-1.json").write_text(
        json.dumps(cell("LI", 1, [[0, 0], [1, 1], [2, 4]], [[3, 3], [2, 2], [1, 1]], [[0.5], [0.4], [0.3]]))
    )
    (tmp_path / "LI-2.json").write_text(
        json.dumps(cell("LI", 2, [[0, 0], [1, 1], [4, 6]], [[3, 3], [2, 2], [-1, 1]], [[0.5], [0.4], [0.1]]))
    )
    (tmp_path / "full-1.json").write_text(
        json.dumps(cell("full", 1, [[0, 0], [1, 1], [2, 2]], [[3, 3], [4, 4], [5, 6]], [[0.5], [0.5], [0.5]]))
    )
    done = run_script("examples/ablation.py", "--status=true", f"--results_dir={tmp_path}", "--designs", "LI", "full", "--seeds", "1", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 of 4 cells are done; left: LI-3 full-3\n")  # the table has all seeds that are there
    length, full = read_json(tmp_path / "summary.json")["designs"]
    assert length["seeds"] == [1, 2] and full["seeds"] == [1]
    # Rows gained 2 and 4 with one seed, 4 and 6 with the other: 3 and 5 a row, 3 and 5 a seed.
    assert length["proxy"] == {"mean": 4.0, "over_prompts": 1.0, "over_seeds": 1.0}
    assert length["gold"] == {"mean": -2.5, "over_prompts": 0.5, "over_seeds": 0.5}
    assert length["spearman"]["gold"]["mean"] == -1.0 and length["spearman"]["gold"]["pvalue"] == pytest.approx(1 / 18, abs=0.003)
    assert full["gold"] == {"mean": 2.5, "over_prompts": 0.5, "over_seeds": None}
    assert length["last"]["tokens"] == 15.0 and length["last"]["eos_rate"] == 0.5 and length["last"]["kl"] == 10.0
    assert "| LI | 1 2 | +4.00 (1.00; 1.00) | -2.50 (0.50; 0.50) | -1.00 (0.00), p 0.0" in (tmp_path / "table.md").read_text(
        encoding="utf-8"
    )
    assert (tmp_path / "ablation.png").stat().st_size > 5000


def test_a_cell_from_ppo_to_what_is_kept(tiny_model, tiny_gold, rows_file, eval_file, tmp_path):
    config = {"model_name": str(tiny_model), "chat_template_name": "tokenizer", "dataset_path": str(rows_file), "dev_prompt_path": str(rows_file),
              "log_with": "none", "overall_steps": 2, "save_freq": 1, "output_max_length": 8, "batch_size": 2, "mini_batch_size": 2,
              "gradient_accumulation_steps": 1, "ppo_epochs": 1, "reward_model_batch_size": 8}  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    words = ("examples/ablation.py", f"--ppo_config={tmp_path / 'tiny.yaml'}", "--designs", "LI-RP", "--seeds", "5", "--gold_model", tiny_gold,
             f"--data_path={eval_file}", f"--output_dir={tmp_path / 'runs'}", f"--results_dir={tmp_path / 'kept'}", "--bf16=false")  # fmt: skip
    done = run_script(*words)
    assert done.returncode == 0, done.stderr + (tmp_path / "runs" / "LI-RP-5.log").read_text(encoding="utf-8")
    kept = read_json(tmp_path / "kept" / "LI-RP-5.json")
    assert kept["cell"]["design"] == "LI-RP" and kept["cell"]["seed"] == 5
    assert "--repetition_penalty=true --relevance_scaling=false --reward_branching=false" in kept["cell"]["commands"][0]
    assert [row["step"] for row in kept["curve"]] == [0, 1, 2] and len(kept["constrained_rouge_l"]["2"]) == 3
    texts = json.loads(gzip.decompress((tmp_path / "kept" / "LI-RP-5.rollouts.json.gz").read_bytes()))
    assert sorted(texts) == ["0", "2"] and len(texts["2"]) == 6
    assert run_script(*words).stdout.startswith("1 of 1 cells are done; left: none\n")
    assert kept["training_commit"] == read_json(tmp_path / "runs" / "LI-RP-5_step_2" / "training_record.json")["commit"]

    # Another setting is another cell: neither the kept one nor its training counts.
    refused = run_script(*words, "--bf16=true")
    said = f"error: {tmp_path}/kept/LI-RP-5.json: made with another --bf16 than True, expected another --results_dir\n"
    assert refused.returncode == 2 and refused.stderr == said
    kept["policy_sample"] = {name: [value + 1 for value in values] for name, values in kept["policy_sample"].items()}
    (tmp_path / "kept" / "LI-RP-5.json").write_text(json.dumps(kept), encoding="utf-8")
    refused = run_script(*words)
    assert refused.returncode == 2
    assert refused.stderr.endswith(f"LI-RP-5.json: trained from another model than {tiny_model} is now, expected another --results_dir\n")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**config, "learning_rate": 0.5}), encoding="utf-8")
    refused = run_script(*words, f"--results_dir={tmp_path / 'elsewhere'}")
    assert refused.returncode == 2
    assert "LI-RP-5_step_0: learning_rate was 1e-05 and is 0.5, expected another --output_dir" in refused.stderr


@pytest.fixture
def typed(monkeypatch):
    """The commands that the driver runs, each ending with 0 and doing nothing."""
    words = []
    monkeypatch.setattr(ablation.subprocess, "run", lambda command, **_: words.append(command) or SimpleNamespace(returncode=0))
    return words


def cells(folder, *seeds):
    settings = ablation.AblationSettings(ppo_config=str(REPOSITORY / "configs" / "ablation.yaml"), output_dir=str(folder))
    return [ablation.Cell("LI", seed, settings) for seed in seeds]


def test_a_training_that_was_stopped_is_not_judged(tmp_path, typed, capsys):
    """A signal ends run_ppo.py with 0: what would follow it is not run, and the next cell is."""
    failures = ablation.run_cells(cells(tmp_path, 1, 2), at_once=1, threads=1)
    told = [f"LI-{seed}: stopped while it trained; the same command resumes it" for seed in (1, 2)]
    assert [str(error) for error in failures] == told == capsys.readouterr().out.splitlines()
    assert [words[0] for words in typed] == ["accelerate", "accelerate"]


def test_nothing_begins_after_an_interruption(tmp_path, typed, monkeypatch):
    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablation.run_cells(cells(tmp_path, *range(50)), at_once=1, threads=1)
    assert len(typed) < 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--designs", "LI", "RP"], "--designs holds 'RP', expected some of LI, LI-RP, LI-RP-QR, full, learned, random-qtype, target"),
        (["--designs", "LI", "LI"], "--designs names one twice, expected each once"),
        (["--seeds", "1", "1"], "--seeds names one twice, expected each once"),
        (["--steps", "20", "30", "40"], "--steps is [20, 30, 40], expected at least three, and 0 among them"),
        (["--ppo_config=configs/paper.yaml"], "paper.yaml: no setting model_name, expected it for the cells"),
    ],
)
def test_settings_that_are_refused(words, message, tmp_path):
    done = run_script("examples/ablation.py", f"--results_dir={tmp_path}", f"--output_dir={tmp_path}", *words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.endswith(f"{message}\n")


def test_the_controls_differ_by_one_flag(tmp_path):
    """From the full design, and from length alone."""
    settings = ablation.AblationSettings(output_dir=str(tmp_path), results_dir=str(tmp_path))
    words = {design: set(ablation.commands(ablation.Cell(design, 1, settings))[0]) for design in ("LI", "full", *ablation.CONTROLS)}
    for control, like, flag in (("random-qtype", "full", "--random_qtypes=true"), ("target", "LI", "--length_target=40")):
        own = words[control] - words[like]
        assert {word for word in own if "name=" not in word and "output_dir=" not in word} == {flag} and len(own) == 3


def test_cells_of_other_steps_are_no_mean(tmp_path):
    """Gains to step 10 beside those to step 5."""
    table = [[0, 0], [1, 1], [2, 4]], [[3, 3], [2, 2], [1, 1]], [[0.5], [0.4], [0.3]]
    (tmp_path / "LI-1.json").write_text(json.dumps(cell("LI", 1, *table)))
    (tmp_path / "LI-2.json").write_text(json.dumps(cell("LI", 2, *(rows[:2] for rows in table))))
    done = run_script("examples/ablation.py", "--status=true", f"--results_dir={tmp_path}", "--designs=LI", "--seeds", "1", "2")
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path}: LI-2 has the steps [0, 5], expected [0, 5, 10] as LI-1 has\n"
    assert not (tmp_path / "table.md").exists()


def test_the_config_has_no_unknown_setting():
    from parts.cli import parse_settings
    from run_ppo import PPOSettings

    settings = parse_settings(PPOSettings, ["--config", str(REPOSITORY / "configs" / "ablation.yaml")])
    assert settings.overall_steps == 40 and settings.batch_size == 16


def test_another_gold_judges_the_kept_texts(tmp_path, tiny_gold, eval_file):
    """Gains of the kept texts are those of the gold model's own scores, and means over seeds are as by hand."""
    from conftest import ROWS

    from parts.gold_models import load_gold_reward_model

    ends = {name: {step: [f"{name} {step} {row}" for row in range(len(ROWS))] for step in ("0", "10")} for name in ("LI-1", "LI-2")}
    for name, texts in ends.items():
        (tmp_path / f"{name}.json").write_text(
            json.dumps(cell("LI", int(name[-1]), *[[[0, 0], [1, 2], [2, 4]]] * 2, [[0.5], [0.4], [0.3]]))
        )
        (tmp_path / f"{name}.rollouts.json.gz").write_bytes(gzip.compress(json.dumps(texts).encode()))
    words = ["--status=true", f"--results_dir={tmp_path}", "--designs=LI", "--seeds", "1", "2", f"--data_path={eval_file}", "--bf16=false",
             f"--output_dir={tmp_path / 'runs'}"]  # fmt: skip
    done = run_script("examples/ablation.py", *words, f"--judges={tiny_gold}")
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "judged.json")["gold_gains"]
    gold, means = load_gold_reward_model(str(tiny_gold), device="cpu"), []
    for name, texts in ends.items():
        first, last = (gold.get_reward({"query": [row["input"] for row in ROWS], "response": texts[step]}) for step in ("0", "10"))
        assert found[name][str(tiny_gold)] == pytest.approx([after - before for before, after in zip(first, last)], abs=2e-4)
        means.append(sum(last) / len(last) - sum(first) / len(first))
    rows = (tmp_path / "judged.md").read_text().splitlines()
    assert rows[-1] == f"| LI | mean (SE over seeds) | {sum(means) / 2:+.2f} ({abs(means[0] - means[1]) / 2:.2f}) |"

    (tmp_path / "LI-2.rollouts.json.gz").write_bytes(gzip.compress(json.dumps({"0": ["a"], "10": ["b"]}).encode()))
    done = run_script("examples/ablation.py", *words, f"--judges={tiny_gold}")
    assert done.returncode == 2
    assert done.stderr.endswith(f"LI-2.rollouts.json.gz: 1 responses of step 0, expected {len(ROWS)}, as {eval_file} has\n")
