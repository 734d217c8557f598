"""Two processes in one place: one works, the other says who and stops before a model loads; a killed one is in nobody's way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY, ROWS, run_script
from test_pipeline import ppo_words

from parts import locks
from parts.errors import InputError

HOLDER = "import sys, time; from parts.locks import hold; hold(sys.argv[1]); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder():
    """Starts processes that hold the lock of a place; they are killed at the end."""
    started = []

    def start(target) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", HOLDER, str(target)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def released():
    yield
    locks.release()


def test_the_other_says_who_and_a_killed_one_is_not_in_the_way(tmp_path, holder):
    target = tmp_path / "new" / "run"
    first = holder(target)
    with pytest.raises(InputError, match=rf"new/run: in use by process {first.pid} on .* since \d{{4}}-.*; expected it to end first"):
        locks.hold(target)
    locks.hold(tmp_path / "new" / "run2")  # another place
    first.send_signal(signal.SIGKILL)
    first.wait()
    locks.hold(target)
    locks.hold(target)  # one process may ask twice
    assert str(os.getpid()) in (tmp_path / "new" / ".run.lock").read_text(encoding="utf-8")
    locks.release()
    assert list((tmp_path / "new").iterdir()) == []


def test_one_place_in_two_spellings(tmp_path, holder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    holder(tmp_path / "run")
    for spelled in ("run", "link/run"):
        with pytest.raises(InputError, match="in use by process"):
            locks.hold(spelled)


def test_the_lock_of_a_killed_process_goes_where_nothing_is_left_to_do(tmp_path, holder):
    target = tmp_path / "run"
    first = holder(target)
    with locks.alone_at(target) as alone:
        assert not alone
    first.kill()
    first.wait()
    assert (tmp_path / ".run.lock").exists()
    for _ in range(2):  # the second time there is none
        with locks.alone_at(target) as alone:
            assert alone
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/run: cannot be written there"):
        locks.hold(tmp_path / "file" / "run")


def test_launched_processes_hold_one_lock(tmp_path, monkeypatch, holder):
    holder(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    locks.hold(tmp_path / "run")  # the first of them speaks for all


def test_two_runs_two_evaluations_two_judgements(tiny_model, tmp_path, holder):
    """The commands themselves, each beside one that is under way."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "eval.json").write_text(json.dumps([{"instruction": row["input"]} for row in ROWS]), encoding="utf-8")
    command = ppo_words(tiny_model, rows, tmp_path / "tiny", overall_steps=1, save_freq=1)
    evaluation = ["evaluation.py", f"--base_model_name={tiny_model}", f"--peft_model_name={tmp_path}/tiny_step_1",
                  f"--data_path={tmp_path}/eval.json", "--max_new_tokens=4"]  # fmt: skip
    first = holder(tmp_path / "tiny")
    refused = run_script(*command)
    assert refused.returncode == 2 and f"tiny: in use by process {first.pid}" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "eval.json", "rows.json"]
    first.kill()
    assert run_script(*command).returncode == 0
    first = holder(tmp_path / "tiny_step_1" / "alpaca-eval-tiny_step_1.json")
    refused = run_script(*evaluation)
    assert refused.returncode == 2 and f"alpaca-eval-tiny_step_1.json: in use by process {first.pid}" in refused.stderr
    first.kill()
    assert run_script(*evaluation).returncode == 0
    assert not list(tmp_path.rglob(".*.lock"))
