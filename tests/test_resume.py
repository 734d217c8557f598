"""A run that is killed, stopped or starved of disk goes on to the very numbers of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, ROWS, run_script
from safetensors.torch import load_file
from test_pipeline import metrics, ppo_words

from parts.files import read_json

MINILM = REPOSITORY / "models" / "all-MiniLM-L6-v2"


def words(model: Path, rows: Path, output: Path, **more: object) -> list[str]:
    """Every kind of state at once: schedules, groups, adaptive KL, running moments, relevance; a step of some tenths of a second."""
    settings = {"overall_steps": 6, "save_freq": 2, "ppo_epochs": 6, "use_optimizer_setup": "true", "warmup_ratio": 0.5,
                "value_learning_rate": "5e-3", "value_warmup_steps": 3, "score_norm_by_qtype": "true",
                "adap_kl_target": 0.1, "adap_kl_horizon": 50, "relevance_scaling": "true", "reward_branching": "true",
                "relevance_model_name": MINILM, "resume_from_checkpoint": "auto", **more}  # fmt: skip
    return ppo_words(model, rows, output, **settings)


def start(command: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def wait_for_steps(process: subprocess.Popen, output: Path, steps: int) -> None:
    log = output / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not log.is_file() or log.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def without_times(output: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in metrics(output)]


def same_weights(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ("adapter_model.safetensors", "value_head.safetensors"))


@pytest.fixture(scope="module")
def left_alone(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    done = run_script(*words(tiny_model, folder / "rows.json", folder / "tiny"))
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_and_stopped_runs_end_as_if_left_alone(left_alone, tiny_model, tmp_path):
    command = words(tiny_model, left_alone / "rows.json", tmp_path / "tiny")
    moments = random.Random(0)
    for steps in (1, 2, 4):  # before a checkpoint, about when one is written, after the next
        process = start(command)
        wait_for_steps(process, tmp_path / "tiny", steps)
        time.sleep(moments.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (tmp_path / ".tiny_step_6.abcdefgh.unfinished" / "tiny_step_6").mkdir(parents=True)  # as a save leaves it that was killed
    process = start(command)
    wait_for_steps(process, tmp_path / "tiny", 5)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    if "step 6: development" not in said:  # it may have been in its last step already
        assert "stopped after step 5; the same command with --resume_from_checkpoint=auto resumes from" in said
        assert read_json(tmp_path / "tiny_interrupted" / "training_record.json")["step"] == 5
        done = run_script(*command)
        assert done.returncode == 0, done.stderr
        assert "resumed from" in done.stdout and "at step 5" in done.stdout
    assert not (tmp_path / "tiny_interrupted").exists() and not list(tmp_path.glob(".tiny*"))
    assert without_times(tmp_path / "tiny") == without_times(left_alone / "tiny")
    for step in (0, 2, 4, 6):
        name = f"tiny_step_{step}"
        assert same_weights(tmp_path / name, left_alone / name)
        rollouts = [(folder / name / "development_rollouts.json").read_text(encoding="utf-8") for folder in (tmp_path, left_alone)]
        assert rollouts[0] == rollouts[1]


def test_a_checkpoint_says_what_it_is(left_alone, tiny_model):
    card = (left_alone / "tiny_step_4" / "README.md").read_text(encoding="utf-8")
    assert "# tiny, step 4" in card and f'base_model: "{tiny_model}"' in card
    assert "length_incentive=True, repetition_penalty=True, relevance_scaling=True, reward_branching=True" in card
    assert "| ppo_epochs | `6` |" in card
    state = load_file(left_alone / "tiny_step_4" / "trainer_state_rank0.safetensors")
    assert len([name for name in state if name.endswith("/exp_avg")]) == 10  # eight LoRA matrices and the value head's two
    assert set(state) >= {"torch_generator", "running/CONSTRAINED/mean", "running/OPENENDED/std", "optimizer/0/step"}


def test_resuming_refuses_other_settings_and_broken_folders(left_alone, tiny_model, tmp_path):
    for name in ("tiny_step_0", "tiny_step_2"):
        shutil.copytree(left_alone / name, tmp_path / name)
    shutil.copytree(left_alone / "tiny", tmp_path / "tiny")
    rows = left_alone / "rows.json"
    other = run_script(*words(tiny_model, rows, tmp_path / "tiny", learning_rate="2e-3", value_learning_rate=0))
    assert other.returncode == 2
    assert "learning_rate, value_learning_rate cannot change within a run" in other.stderr
    other = run_script(*words(tiny_model, rows, tmp_path / "tiny", ppo_epochs=2))
    assert other.returncode == 2
    assert "ppo_epochs was 6 and is 2" in other.stderr and "--allow_changed_settings=true" in other.stderr
    more_rows = tmp_path / "more.json"
    more_rows.write_text(json.dumps([*ROWS, ROWS[0]]), encoding="utf-8")
    other = run_script(*words(tiny_model, more_rows, tmp_path / "tiny"))
    assert other.returncode == 2 and "more.json has changed since" in other.stderr
    fresh = run_script(*words(tiny_model, rows, tmp_path / "tiny", resume_from_checkpoint=""))
    assert fresh.returncode == 2 and "tiny_step_0: exists already" in fresh.stderr and "--resume_from_checkpoint=auto" in fresh.stderr
    nowhere = run_script(*words(tiny_model, rows, tmp_path / "tiny", resume_from_checkpoint=tmp_path))
    assert nowhere.returncode == 2 and "holds no trainer_state_rank0.safetensors" in nowhere.stderr
    later = run_script(*words(tiny_model, rows, tmp_path / "tiny", resume_from_checkpoint=tmp_path / "tiny_step_0"))
    assert later.returncode == 2 and "tiny_step_2: exists already" in later.stderr
    (tmp_path / "tiny_step_2" / "value_head.safetensors").write_bytes(b"cut short")
    broken = run_script(*words(tiny_model, rows, tmp_path / "tiny", resume_from_checkpoint=tmp_path / "tiny_step_2"))
    assert broken.returncode == 2 and "tiny_step_2: cannot be resumed from" in broken.stderr


def test_what_may_change_is_said(rows_file, tmp_path, capsys, monkeypatch):
    """More steps extend a run without a schedule; whatever else is allowed to change is named, the reward's code too."""
    from dataclasses import asdict

    from parts.chat_templates import ChatTemplate, load_template, template_digest
    from parts.errors import InputError
    from parts.files import file_digest
    from parts.ppo_checkpoints import check_settings, check_template
    from parts.processes import launch_facts
    from run_ppo import PPOSettings

    def settings(**changes) -> PPOSettings:
        return PPOSettings(model_name="m", dataset_path=str(rows_file), dev_prompt_path=str(rows_file), overall_steps=6, **changes)

    def record(first: PPOSettings, source: dict) -> None:
        data = dict.fromkeys(("dataset_path", "dev_prompt_path"), file_digest(rows_file))
        content = {"processes": 1, "settings": asdict(first), "reward_source": source, "data": data}
        (tmp_path / "training_record.json").write_text(json.dumps(content), encoding="utf-8")

    record(settings(), settings().reward_source())
    longer = settings()
    longer.overall_steps = 8
    check_settings(tmp_path, longer, 1)
    assert capsys.readouterr().out == ""

    scheduled = settings(use_optimizer_setup=True)
    record(scheduled, scheduled.reward_source())
    scheduled.overall_steps = 8
    with pytest.raises(InputError, match="overall_steps was 6 and is 8"):
        check_settings(tmp_path, scheduled, 1)

    record(settings(), settings().reward_source())
    changed = json.loads((tmp_path / "training_record.json").read_text(encoding="utf-8"))
    changed |= {
        "template": "alpaca",
        "template_digest": "0" * 64,
        "base_sample": {"0.q.weight": [1.0]},
        "model": "m",
        "reward_samples": {"r/": {"0.k.weight": [1.0]}},
    }
    (tmp_path / "training_record.json").write_text(json.dumps(changed), encoding="utf-8")
    now = settings(reward_model_name="r")
    with monkeypatch.context() as patched:
        patched.setattr("parts.ppo_checkpoints.weight_sample", lambda name: {"0.q.weight": [1.0], "0.k.weight": [2.0]})
        said = "the weights of r are others now; reward_model_name was"
        with pytest.raises(InputError) as refused:
            check_settings(tmp_path, now, 1)
        assert said in str(refused.value) and "the weights of m are" not in str(refused.value)
        with pytest.raises(InputError) as refused:
            check_settings(tmp_path, settings(reward_model_name="other"), 1)
        assert "weights" not in str(refused.value)

    # The template, a tokenizer's own too.
    own = ChatTemplate("tokenizer", "{{ messages }}", (), (), {})
    for name, template in (("alpaca", load_template("alpaca")), ("tokenizer", own)):
        changed |= {"template": name, "template_digest": "0" * 64}
        (tmp_path / "training_record.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(InputError, match=f"the chat template '{name}' has changed since .--allow_changed_settings=true resumes"):
            check_template(tmp_path, settings(chat_template_name=name), template)
        check_template(tmp_path, settings(chat_template_name=name, allow_changed_settings=True), template)
        assert f"resumes although the chat template '{name}' has changed since" in capsys.readouterr().out
        changed["template_digest"] = template_digest(template)
        (tmp_path / "training_record.json").write_text(json.dumps(changed), encoding="utf-8")
        check_template(tmp_path, settings(chat_template_name=name), template)

    # The launch, which the optimiser's state and the precision depend on.
    record(settings(), settings().reward_source())
    launched = json.loads((tmp_path / "training_record.json").read_text(encoding="utf-8")) | {"launch": launch_facts()}
    (tmp_path / "training_record.json").write_text(json.dumps(launched), encoding="utf-8")
    check_settings(tmp_path, settings(), 1)
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        said = "launched with no DeepSpeed and mixed precision 'no', expected the same to resume, found no DeepSpeed and mixed precision 'bf16'"
        with pytest.raises(InputError, match=said):
            check_settings(tmp_path, settings(allow_changed_settings=True), 1)

    record(settings(), settings().reward_source())
    older = json.loads((tmp_path / "training_record.json").read_text(encoding="utf-8"))
    for name in ("value_learning_rate", "value_warmup_steps", "score_norm_by_qtype"):
        del older["settings"][name]  # as a checkpoint from before there were these settings
    (tmp_path / "training_record.json").write_text(json.dumps(older), encoding="utf-8")
    check_settings(tmp_path, settings(), 1)
    with pytest.raises(InputError, match="value_warmup_steps cannot change within a run"):
        check_settings(tmp_path, settings(value_warmup_steps=1), 1)
    with pytest.raises(InputError, match="score_norm_by_qtype was False and is True"):
        check_settings(tmp_path, settings(score_norm_by_qtype=True), 1)

    record(settings(), {**settings().reward_source(), "reward_model.py": "other code"})
    with pytest.raises(InputError, match=r"the reward's code has changed since \(reward_model.py\); seed was 42 and is 7 \(--allow"):
        check_settings(tmp_path, settings(seed=7), 1)
    check_settings(tmp_path, settings(seed=7, allow_changed_settings=True), 1)
    assert "resumes although the reward's code has changed since (reward_model.py); seed was 42 and is 7" in capsys.readouterr().out


def test_old_checkpoints_make_room(tiny_model, left_alone, tmp_path):
    done = run_script(*words(tiny_model, left_alone / "rows.json", tmp_path / "tiny", save_freq=1, save_total_limit=2, ppo_epochs=1))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("tiny_step_*")) == ["tiny_step_0", "tiny_step_5", "tiny_step_6"]


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tiny_model, left_alone, tmp_path):
    """Files may not grow beyond some kilobytes from here on: the state of the next checkpoint cannot be written."""
    for name in ("tiny_step_0", "tiny_step_2", "tiny"):
        shutil.copytree(left_alone / name, tmp_path / name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = words(tiny_model, left_alone / "rows.json", tmp_path / "tiny", allow_changed_settings="true")
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000)),  # noqa: PLW1509
    )
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "tiny_step_4 could not be written" in line and "earlier checkpoints are untouched" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny_step_0", "tiny_step_2"]
