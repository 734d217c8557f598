"""One path in several spellings is one path, and nothing of the user's is replaced or removed unasked."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, ROWS, run_script
from test_pipeline import ppo_words

from parts.cli import found_path, normal_path, parse_settings
from parts.errors import InputError
from parts.files import JsonLines, atomic_path, clear_folder, clear_leftovers, remove_folder, write_json
from parts.models import model_identity
from parts.ppo_checkpoints import find_start, make_room
from parts.runs import find_adapters
from run_ppo import PPOSettings


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "inner")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("out/slash/", "out/slash"), ("out//slash", "out/slash"), ("out/./slash", "out/slash"), ("out/x/../slash", "out/slash"),
        ("~/x", "{home}/x"), ("~/x/", "{home}/x"), ("./model", "model"), ("model/", "model"), ("./model/.", "model"),
        ("./absent/", "./absent"), ("owner/name", "owner/name"), ("/", "/"), (".", "{here}"), ("elsewhere/..", "{here}"), ("..", "{parent}"),
        ("link/../model", "link/../model"), ("../x", "../x"), ("step_[0-9]*", "step_[0-9]*"), ("a.py:f", "a.py:f"), ("./a/../a.py:f", "./a.py:f"),
    ],
)  # fmt: skip
def test_one_spelling(here, typed, expected):
    assert normal_path(typed) == expected.format(home=here / "home", here=here, parent=here.parent)


def test_what_is_read_may_be_the_repository_s_and_what_is_written_never_is(here):
    assert found_path("data//train.json") == str(REPOSITORY / "data" / "train.json")
    settings = parse_settings(
        PPOSettings, ["--model_name=m/", "--output_dir=assets/demo_run/", "--logging_dir=~/logs", "--dataset_path=data/./dev.json"]
    )
    assert settings.output_dir == "assets/demo_run" and settings.logging_dir == f"{here}/home/logs"
    assert settings.model_name == "m" and settings.dataset_path == str(REPOSITORY / "data" / "dev.json")


def test_every_setting_that_is_a_path_is_normalised():
    """By its name or its help: whoever adds one says so."""
    import importlib

    from test_settings import SCRIPTS

    commands = {"data.validate": "ValidationSettings", "data.annotate_data": "AnnotationSettings", "data.prepare_data": "DataSettings"}
    seen = 0
    for module, cls in {**SCRIPTS, **commands}.items():
        for name, field in getattr(importlib.import_module(module), cls).__dataclass_fields__.items():
            told = field.metadata["help"]
            is_path = name.endswith(("_path", "_dir", "_file", "_cache", "_model_name")) or told.startswith(("file", "folder"))
            if is_path or name in ("model_name", "output", "files", "gold_scores"):
                seen += 1
                assert field.metadata["rules"]["path"] or field.metadata["rules"]["written"], f"{module}: {name}"
    assert seen > 30


def test_a_model_is_known_by_its_content(here, tiny_model):
    shutil.copytree(tiny_model, here / "copy")
    same = {model_identity(spelled) for spelled in ("copy", "./copy", f"{here}/copy", str(tiny_model), "link/../../copy")}
    assert len(same) == 1
    (here / "copy" / "chat_template.jinja").write_text("other", encoding="utf-8")
    assert model_identity("copy") not in same
    assert model_identity("owner/name") == "owner/name"


def test_names_with_pattern_characters_are_names_first(here):
    for name in ("run[1]_step_2", "run1_step_2", "a?_step_1"):
        (here / name).mkdir()
        write_json(here / name / "adapter_config.json", {})
    assert [point.name for point in find_adapters(["run[1]_step_2"])] == ["run[1]_step_2"]
    assert [point.name for point in find_adapters(["run[1]_step_?"])] == ["run1_step_2"]
    assert [point.name for point in find_adapters(["a?_step_1", f"{here}/a?_step_1"])] == ["a?_step_1"]  # once
    os.chdir(here / "run1_step_2")
    assert [point.name for point in find_adapters([found_path(".")])] == ["run1_step_2"]


# ------------------------------------------------------------------------------------------------- what a run may remove


def state(folder: Path, step: int, rank0: bool = True) -> Path:
    """A checkpoint as far as `find_start` reads it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name in ("adapter_model", "value_head", *(["trainer_state_rank0"] if rank0 else [])):
        save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors")
    settings = PPOSettings(model_name="m", output_dir=str(folder.parent / "run"))
    from dataclasses import asdict

    from parts.files import file_digest

    record = {"step": step, "processes": 1, "settings": asdict(settings), "reward_source": settings.reward_source(), "start": {},
              "data": {name: file_digest(getattr(settings, name)) for name in ("dataset_path", "dev_prompt_path")}}  # fmt: skip
    write_json(folder / "training_record.json", record)
    return folder


def begin(output: object, resume: object = "", **more: object):
    return find_start(PPOSettings(model_name="m", output_dir=str(output), resume_from_checkpoint=str(resume), **more))


def test_the_state_that_is_resumed_from_is_never_removed(here):
    state(here / "out" / "run_step_0", 0)
    stopped = state(here / "out" / "run_interrupted", 3)
    for output, resume in (("out/run", f"{here}/out/run_interrupted"), (f"{here}/out/run", "out/run_interrupted"), ("out/run/", "auto"),
                           ("./out/run", "./out/../out/run_interrupted/")):  # fmt: skip
        start = begin(output, resume)
        make_room(start)
        assert start.step == 3 and start.in_the_way == [] and stopped.is_dir()


def test_a_later_state_is_removed_only_when_asked(here):
    first = state(here / "out" / "run_step_0", 0)
    later = state(here / "out" / "run_interrupted", 3)
    with pytest.raises(InputError, match="run_interrupted: exists already"):
        begin("out/run", "out/run_step_0")
    shutil.move(first, here / "kept")
    with pytest.raises(InputError, match="run_interrupted: exists already"):  # a new run where only an interrupted one is
        begin("out/run")
    shutil.move(here / "kept", first)
    start = begin("out/run", "out/run_step_0", overwrite=True)
    make_room(start)
    assert first.is_dir() and not later.exists() and sorted(path.name for path in (here / "out").iterdir()) == ["run_step_0"]


@pytest.mark.parametrize("name", ["run_step_2", "run_interrupted"])
def test_a_folder_of_the_user_s_is_not_replaced(here, name):
    (here / "out" / name).mkdir(parents=True)
    begin("out/run")  # an empty folder is nobody's
    (here / "out" / name / "thesis.txt").write_text("mine", encoding="utf-8")
    for more in ({}, {"overwrite": True}):
        with pytest.raises(InputError, match=f"{name}: no checkpoint \\(it has no training_record.json\\), and in the way of one"):
            begin("out/run", **more)
    (here / "out" / "run_step_notes").mkdir()
    (here / "out" / "run2_step_2").mkdir()
    begin("out/run2")


def test_metrics_of_another_run_stay(here):
    write_json(here / "logs" / "run.json", {"settings": {"output_dir": "out/first"}})
    begin("out/first/", logging_dir="logs")
    with pytest.raises(InputError, match=r"logs/run.json: of another run"):
        begin("out/second", logging_dir="logs")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "training_record.json").write_text("{}"), "'step' is missing"),
        (lambda folder: (folder / "training_record.json").write_text('{"step": 4, "settings"'), "broken JSON"),
        (lambda folder: (folder / "training_record.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda folder: (folder / "value_head.safetensors").write_bytes(b"cut"), "value_head.safetensors"),
        (lambda folder: os.truncate(folder / "trainer_state_rank0.safetensors", 70), "trainer_state_rank0.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(here, capsys, damage, told):
    for step in (0, 2, 4):
        state(here / "out" / f"run_step_{step}", step)
    damage(here / "out" / "run_step_4")
    start = begin("out/run", "auto")
    assert start.step == 2 and start.in_the_way == []
    said = capsys.readouterr().out
    assert "out/run_step_4: left out, it is broken" in said and told in said
    with pytest.raises(InputError, match="run_step_4: cannot be resumed from"):
        begin("out/run", "out/run_step_4")


# ------------------------------------------------------------------------------------------------------ kills, full disks


def test_a_killed_exchange_of_folders_ends_whole(tmp_path):
    """A kill between the two renames: the new folder is whole, and takes its place; one before them leaves the old."""
    target = tmp_path / "run_interrupted"
    (tmp_path / ".run_interrupted.abcdefgh.unfinished" / "replaced").mkdir(parents=True)
    (tmp_path / ".run_interrupted.abcdefgh.unfinished" / "run_interrupted").mkdir()
    clear_leftovers(target)
    assert target.is_dir() and names_in(tmp_path) == ["run_interrupted"]
    (target / "old").touch()
    (tmp_path / ".run_interrupted.12345678.unfinished" / "run_interrupted").mkdir(parents=True)
    (tmp_path / ".run_interrupted.old.abcdefgh.unfinished").mkdir()  # another file's
    clear_leftovers(target)
    assert (target / "old").is_file() and names_in(tmp_path) == [".run_interrupted.old.abcdefgh.unfinished", "run_interrupted"]


def test_what_kills_left_in_a_folder(tmp_path):
    for name in (".report.html.abcdefgh.unfinished", ".a.b.json.12345678.unfinished", ".kept", "figures"):
        (tmp_path / name).mkdir()
    clear_folder(tmp_path)
    assert names_in(tmp_path) == [".kept", "figures"]
    clear_folder(tmp_path / "none")


def test_a_folder_goes_at_once(tmp_path, monkeypatch):
    folder = tmp_path / "run_step_2"
    (folder / "deep").mkdir(parents=True)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("parts.files.shutil.rmtree", killed)
        remove_folder(folder)
    assert not folder.exists()
    clear_leftovers(folder)
    assert names_in(tmp_path) == []


def test_a_full_disk_is_said_of_a_file(tmp_path, monkeypatch):
    """The system's "No space left on device" names no file; and a line that it cut short is not joined with the next."""
    log = JsonLines(tmp_path / "log.jsonl")
    log.append([1])

    def full(self, *words, **options):
        with builtins.open(self, "ab") as file:  # noqa: PTH123 - Path.open is full
            file.write(b'["cut sh')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space left on device: '.*log.jsonl'"):
            log.append(["cut short"])
    log.append([2])
    assert list(log.read()) == [[1], [2]]
    with pytest.raises(OSError, match="No space left on device: '.*/out.json'"), atomic_path(tmp_path / "out.json"):
        raise OSError(28, "No space left on device")
    assert names_in(tmp_path) == ["log.jsonl"]


def test_slashes_and_homes_end_to_end(tiny_model, tmp_path, monkeypatch):
    """A run with a slash at its end is found again, by another spelling too; its evaluation is one, however the models are spelled."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "eval.json").write_text(json.dumps([{"instruction": row["input"], "output": ""} for row in ROWS]), encoding="utf-8")
    words = [word for word in ppo_words(tiny_model, tmp_path / "rows.json", tmp_path, overall_steps=1, save_freq=1)
             if not word.startswith(("--output_dir", "--logging_dir"))]  # fmt: skip
    done = run_script(*words, "--output_dir=~/out/slash/")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["slash", "slash_step_0", "slash_step_1"]
    again = run_script(*words, f"--output_dir={tmp_path}/out/slash")
    assert again.returncode == 2 and "slash_step_0: exists already" in again.stderr
    spelled = [(f"{tiny_model}/", "~/out/slash_step_1/"), (f"{tiny_model}/../{tiny_model.name}", f"{tmp_path}/out//slash_step_1")]
    for place, (base, adapter) in enumerate(spelled):
        done = run_script("evaluation.py", f"--base_model_name={base}", "--peft_model_name", adapter, "--data_path=~/eval.json",
                          "--max_new_tokens=4")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("made as it would be now" in done.stdout) == bool(place)
    (rollouts,) = (tmp_path / "out" / "slash_step_1").glob("alpaca-eval-*[0-9].json")
    assert {row["generator"] for row in json.loads(rollouts.read_text(encoding="utf-8"))} == {"slash_step_1"}
