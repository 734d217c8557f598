"""The house's own rules: who may import whom, scripts run from anywhere, and a feature is a function and a line."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, run_script

import parts

PARTS = {path.stem for path in (REPOSITORY / "parts").glob("*.py")} - {"__init__"}
DOORS = {path.stem for path in REPOSITORY.glob("*.py")}
DATA_COMMANDS = {path.stem for path in (REPOSITORY / "data").glob("*.py")}


def imports_of(path) -> set[str]:
    """The project's modules that a file imports anywhere, for types too: names of doors, and "parts.<name>"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "parts":
                found |= {f"parts.{alias.name}" for alias in node.names}
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in DOORS | DATA_COMMANDS | {"parts"} and name != "parts"}


def floors() -> list[list[str]]:
    """The modules of the map in `parts/__init__.py`, floor by floor."""
    found: list[list[str]] = []
    for line in inspect.getdoc(parts).splitlines():
        if line.startswith("floor "):
            found.append([])
        elif found and (match := re.fullmatch(r"    (\w+) {2,}\S.*", line)):
            found[-1].append(match[1])
    return found


def test_the_map_names_every_module_once():
    named = [name for floor in floors() for name in floor]
    assert sorted(named) == sorted(PARTS)


@pytest.mark.parametrize("name", sorted(PARTS))
def test_a_part_imports_only_from_lower_floors(name):
    height = {module: number for number, floor in enumerate(floors()) for module in floor}
    for imported in imports_of(REPOSITORY / "parts" / f"{name}.py"):
        assert imported.startswith("parts."), f"parts/{name}.py imports {imported}, which is no part"
        assert height[imported.removeprefix("parts.")] < height[name], f"parts/{name}.py imports {imported}, which is not below it"


@pytest.mark.parametrize("name", sorted(DOORS))
def test_a_script_imports_parts_and_the_reward_alone(name):
    others = {imported for imported in imports_of(REPOSITORY / f"{name}.py") if not imported.startswith("parts.")}
    assert others <= (set() if name == "reward_model" else {"reward_model"})


@pytest.mark.parametrize("name", sorted(DATA_COMMANDS))
def test_a_data_command_imports_parts_alone(name):
    assert all(imported.startswith("parts.") for imported in imports_of(REPOSITORY / "data" / f"{name}.py"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in DOORS | {"parts"}:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("script", [*sorted(DOORS), *(f"data/{name}" for name in sorted(DATA_COMMANDS))])
def test_every_script_runs_from_any_folder(tmp_path, script):
    done = subprocess.run([sys.executable, REPOSITORY / f"{script}.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_what_is_shipped_is_found_from_any_folder(tmp_path, tiny_model):
    """The default data and templates, and a model elsewhere, from an empty folder; results go to where one stands."""
    words = ["--overall_steps=1", "--save_freq=1", "--batch_size=2", "--mini_batch_size=1", "--gradient_accumulation_steps=1",
             "--ppo_epochs=1", "--output_max_length=4", "--log_with=none", "--chat_template_name=tokenizer", "--max_prompt_length=120",
             "--long_prompts=drop", "--dev_prompt_path=dev.json"]  # fmt: skip
    (tmp_path / "dev.json").write_text(json.dumps([{"input": "Name a river."}]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, REPOSITORY / "run_ppo.py", f"--model_name={tiny_model}", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "outputs" / "ppo_step_1" / "training_record.json").read_text(encoding="utf-8"))
    assert record["settings"]["dataset_path"] == str(REPOSITORY / "data" / "train.json")


# -------------------------------------------------------------------------------------------------------- the heart's promise


@pytest.fixture(scope="module")
def copy_with_feature(tmp_path_factory):
    """A copy of the scripts with the README's example applied."""
    copy = tmp_path_factory.mktemp("copy")
    for path in REPOSITORY.glob("*.py"):
        shutil.copy(path, copy)
    for folder in ("parts", "configs", "examples"):
        shutil.copytree(REPOSITORY / folder, copy / folder)
    subprocess.run(["git", "apply", "examples/damped_length.diff"], cwd=copy, check=True)
    return copy


def test_the_example_is_short_and_in_the_readme():
    diff = (REPOSITORY / "examples" / "damped_length.diff").read_text(encoding="utf-8")
    added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(added) <= 8 and not [line for line in diff.splitlines() if re.match("-(?!--)", line)]
    assert f"```diff\n{diff}```" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_a_feature_is_a_function_and_a_line(copy_with_feature, tmp_path, tiny_model, rows_file, eval_file):
    """The example applied: its flag trains two steps, and everything that names features names it."""
    copy = copy_with_feature
    shown = run_script(copy / "run_ppo.py", "--help").stdout
    assert "--damped_length" in shown and "log(1 + number of tokens / 100)" in " ".join(shown.split())
    done = run_script(
        copy / "run_ppo.py", f"--model_name={tiny_model}", "--chat_template_name=tokenizer", f"--dataset_path={rows_file}",
        f"--dev_prompt_path={rows_file}", f"--output_dir={tmp_path}/out/run", "--overall_steps=2", "--save_freq=1", "--batch_size=4",
        "--mini_batch_size=2", "--gradient_accumulation_steps=1", "--output_max_length=8", "--log_with=none",
        "--length_incentive=false", "--damped_length=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "run" / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["reward/total"] == pytest.approx(line["reward/damped_length"]) for line in lines)
    record = json.loads((tmp_path / "out" / "run_step_2" / "training_record.json").read_text(encoding="utf-8"))
    assert record["settings"]["damped_length"] is True and record["settings"]["length_incentive"] is False
    assert "damped_length=True" in (tmp_path / "out" / "run_step_2" / "README.md").read_text(encoding="utf-8")

    words = [eval_file, "--repetition_penalty=false", "--relevance_scaling=false", "--reward_branching=false", "--damped_length=true"]
    table = run_script(copy / "reward_model.py", *words)
    assert table.returncode == 0, table.stderr
    assert table.stdout.split()[:5] == ["file", "rows", "length", "repetition", "damped_length"]
    names = ["-c", "from reward_model import RewardSettings as R; from parts.designs import all_designs; "
                   "print(*all_designs(R(damped_length=True, repetition_penalty=True).switched_on), sep='; ')"]  # fmt: skip
    designs = subprocess.run([sys.executable, *names], cwd=copy, capture_output=True, text=True, check=True).stdout
    assert designs.split("; ")[:2] == ["LI * RP * damped_length", "LI * RP"]
    same = run_script("reward_model.py", eval_file, "--damped_length=true")
    assert same.returncode == 2 and "--damped_length" in same.stderr  # without the line there is no such flag


def test_scores_are_known_by_what_computes_them(copy_with_feature):
    """A docstring and a comment are nothing to a score, the encoder's code is."""
    copy = copy_with_feature

    def source() -> str:
        words = ["-c", "from reward_model import RewardSettings; print(RewardSettings().reward_source())"]
        return subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True, check=True).stdout

    first = source()
    heart, encoder = copy / "reward_model.py", copy / "parts" / "relevance.py"
    text = heart.read_text(encoding="utf-8")
    heart.write_text(
        text.replace('"""LI = number of tokens', '"""Length incentive = number of tokens') + "\n# a comment\n", encoding="utf-8"
    )
    assert "Length incentive" in heart.read_text(encoding="utf-8") and source() == first
    encoder.write_text(encoder.read_text(encoding="utf-8").replace('"mean"', '"cls"'), encoding="utf-8")
    assert source() != first
