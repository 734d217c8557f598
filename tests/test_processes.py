"""Two real processes, by every launcher that works on a CPU: one run, one writer, and the same numbers after an interruption."""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY, ROWS, run_script
from safetensors.torch import load_file
from test_pipeline import metrics, ppo_words

from parts.files import read_json

REWARD = '''
import json, os, pathlib

def mine(prompts, completions, **columns):
    """Length; and which process was asked about which prompts."""
    with open(pathlib.Path(__file__).parent / f"asked_{os.getpid()}.txt", "a") as log:
        log.write(json.dumps(prompts) + "\\n")
    return [len(text) / 10 for text in completions]
'''


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(name: str) -> tuple[str, ...]:
    if name == "torchrun":
        return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return (sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/{name}.yaml",
            "--main_process_port", str(free_port()))  # fmt: skip


def state_facts(folder: Path, rank: int) -> dict:
    from safetensors import safe_open

    with safe_open(folder / f"trainer_state_rank{rank}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["facts"])


def test_the_flags_accumulation_wins_over_a_deepspeed_file(tmp_path):
    """accelerate would take the file's, or 1 where it says nothing: an optimiser step a mini batch."""
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 7}), encoding="utf-8"
    )
    launch = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "use_cpu": True, "num_machines": 1, "num_processes": 1,
              "machine_rank": 0, "main_process_ip": "127.0.0.1", "main_process_port": free_port(), "rdzv_backend": "static",
              "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero3_init_flag": False}}  # fmt: skip
    (tmp_path / "launch.yaml").write_text(json.dumps(launch), encoding="utf-8")
    (tmp_path / "join.py").write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nfrom parts.processes import join_processes\n"
        "config = join_processes(3, 4).state.deepspeed_plugin.deepspeed_config\n"
        "print(config['train_micro_batch_size_per_gpu'], config['gradient_accumulation_steps'], config['zero_optimization']['stage'])\n",
        encoding="utf-8",
    )
    words = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launch.yaml"))
    done = run_script(str(tmp_path / "join.py"), launcher=words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "3 4 2"


# The value head's own settings are another layout of the optimiser. Warm-up ends where the run below is resumed.
OWN_HEAD = {"value_learning_rate": "5e-3", "value_warmup_steps": 2, "score_norm_by_qtype": "true"}
ALL_WEIGHTS = {**OWN_HEAD, "use_peft": "false"}


@pytest.mark.parametrize(
    ("launch", "more"),
    [("torchrun", {}), ("ddp-cpu", OWN_HEAD), ("zero2-bf16-cpu", {}), ("zero2-bf16-cpu", ALL_WEIGHTS)],
    ids=["torchrun", "ddp-cpu-own-head", "zero2-bf16-cpu", "zero2-bf16-cpu-all-weights-own-head"],
)
def test_two_processes(tiny_model, tmp_path, launch, more):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    settings = {"overall_steps": 3, "save_freq": 2, "batch_size": 2, "mini_batch_size": 1, "reward_function": f"{tmp_path}/reward.py:mine"}
    settings |= more
    weights = "adapter_model.safetensors" if more.get("use_peft", "true") == "true" else "model.safetensors"
    words = ppo_words(tiny_model, rows, tmp_path / "tiny", **settings)
    done = run_script(*words, launcher=launcher(launch))
    assert done.returncode == 0, done.stderr[-3000:]

    # Three steps of 2 x 2 prompts are two epochs over six rows, each process with its own share.
    asked = [path.read_text(encoding="utf-8").splitlines() for path in tmp_path.glob("asked_*.txt")]
    steps = [[batch for batch in map(json.loads, lines) if len(batch) == 2] for lines in asked]  # development shares are of three rows
    assert [len(batches) for batches in steps] == [3, 3]
    assert set(collections.Counter(prompt for batches in steps for batch in batches for prompt in batch).values()) == {2}
    assert all(not set(one) & set(other) for one, other in list(zip(*steps))[:1])

    record = read_json(tmp_path / "tiny_step_3" / "training_record.json")
    assert record["processes"] == 2
    assert record["dtype"] == ("bfloat16" if launch == "zero2-bf16-cpu" else "float32")
    dev = json.loads((tmp_path / "tiny_step_3" / "development_rollouts.json").read_text(encoding="utf-8"))
    assert [row["row"] for row in dev] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in metrics(tmp_path / "tiny")] == [1, 2, 3]  # one writer
    for row in metrics(tmp_path / "tiny"):  # TRL's own number is of one process
        assert row["tokens/responses_len_mean"] == pytest.approx(row["reward/response_tokens"])
    facts = [state_facts(tmp_path / "tiny_step_3", rank) for rank in (0, 1)]
    for name in ("kl_coef", "running", "weights"):
        assert facts[0][name] == facts[1][name]
    states = [load_file(tmp_path / "tiny_step_3" / f"trainer_state_rank{rank}.safetensors") for rank in (0, 1)]
    running = [{name: tensor for name, tensor in state.items() if name.startswith("running/")} for state in states]
    assert {name.split("/")[1] for name in running[0]} == ({"CONSTRAINED", "OPENENDED"} if more else {"mean", "std", "var", "count"})
    assert running[0] == running[1]
    adapters = [(tmp_path / f"tiny_step_{step}" / weights).read_bytes() for step in (0, 2, 3)]
    assert (adapters[0] == adapters[1]) == bool(more) and adapters[1] != adapters[2]
    moments = [sum(tensor.numel() for name, tensor in state.items() if name.endswith("exp_avg")) for state in states]
    trained = sum(tensor.numel() for tensor in load_file(tmp_path / "tiny_step_3" / weights).values()) + 33
    if launch == "zero2-bf16-cpu":  # each process has half of them, up to padding
        assert sum(moments) < trained + 64 and max(moments) <= trained / 2 + 32
    else:
        assert moments == [trained, trained]

    # From the checkpoint of step 2, elsewhere: the same end.
    for name in ("tiny_step_0", "tiny_step_2"):
        shutil.copytree(tmp_path / name, tmp_path / "again" / name)
    shutil.copytree(tmp_path / "tiny", tmp_path / "again" / "tiny")
    words = ppo_words(tiny_model, rows, tmp_path / "again" / "tiny", **settings, resume_from_checkpoint="auto")
    done = run_script(*words, launcher=launcher(launch))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at step 2" in done.stdout
    for name in (weights, "value_head.safetensors"):
        assert (tmp_path / "again" / "tiny_step_3" / name).read_bytes() == (tmp_path / "tiny_step_3" / name).read_bytes()
    ends = [{name: value for name, value in metrics(folder / "tiny")[-1].items() if not name.startswith("time/")}
            for folder in (tmp_path, tmp_path / "again")]  # fmt: skip
    assert ends[0] == ends[1]
    alone = run_script(*words, "--resume_from_checkpoint", tmp_path / "tiny_step_2")
    assert alone.returncode == 2 and "made by 2 processes" in alone.stderr


def test_two_machines(tiny_model, rows_file, tmp_path):
    """The launch for several machines, one process on each, both on this host: one run, one writer, the state shared out."""
    port, words = free_port(), ppo_words(tiny_model, rows_file, tmp_path / "tiny", overall_steps=1, save_freq=1, dev_prompts=2)

    def launch(machine: int):
        place = {"num_processes": 2, "machine_rank": machine, "main_process_ip": "127.0.0.1", "main_process_port": port}
        flags = [word for name, value in place.items() for word in (f"--{name}", str(value))]
        module = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/zero2-bf16-multinode.yaml", *flags)
        return run_script(*words, launcher=module)

    with ThreadPoolExecutor(2) as both:
        machines = list(both.map(launch, (0, 1)))
    assert [done.returncode for done in machines] == [0, 0], machines[0].stderr[-3000:] + machines[1].stderr[-3000:]
    assert ["step 1: development" in done.stdout for done in machines] == [True, False]
    assert [row["step"] for row in metrics(tmp_path / "tiny")] == [1]
    record = read_json(tmp_path / "tiny_step_1" / "training_record.json")
    assert (record["processes"], record["dtype"]) == (2, "bfloat16")
    facts = [state_facts(tmp_path / "tiny_step_1", rank) for rank in (0, 1)]
    assert facts[0]["weights"] == facts[1]["weights"] and facts[0]["kl_coef"] == facts[1]["kl_coef"]
    states = [load_file(tmp_path / "tiny_step_1" / f"trainer_state_rank{rank}.safetensors") for rank in (0, 1)]
    moments = [sum(tensor.numel() for name, tensor in state.items() if name.endswith("exp_avg")) for state in states]
    trained = sum(tensor.numel() for tensor in load_file(tmp_path / "tiny_step_1" / "adapter_model.safetensors").values()) + 33
    assert sum(moments) < trained + 64 and max(moments) <= trained / 2 + 32  # each has half of them, up to padding


@pytest.mark.parametrize(("precision", "stage", "message"), [
    ("no", None, ""),
    ("bf16", 2, ""),
    ("no", 2, ""),
    ("fp16", None, "mixed precision fp16, expected none"),
    ("fp16", 2, "mixed precision fp16"),
    ("bf16", None, "mixed precision bf16, expected none .--bf16=true is for bf16 base weights., or DeepSpeed with bf16"),
    ("bf16", 3, "DeepSpeed with ZeRO stage 3, expected stage 2"),
])  # fmt: skip
def test_launches_that_no_run_resumes_from_are_refused(precision, stage, message):
    from accelerate.utils import DistributedType

    from parts.errors import InputError
    from parts.ppo_setup import check_launch

    plugin = SimpleNamespace(zero_stage=stage) if stage else None
    kind = DistributedType.DEEPSPEED if stage else DistributedType.NO
    launched = SimpleNamespace(mixed_precision=precision, state=SimpleNamespace(deepspeed_plugin=plugin), distributed_type=kind)
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        check_launch(launched)
    launched.distributed_type = DistributedType.FSDP
    with pytest.raises(InputError, match="launched as FSDP, expected one process, several"):
        check_launch(launched)


def test_columns_of_processes_meet_by_name(monkeypatch):
    """A user's function may return them in another order, or other ones, in another process."""
    from parts.ppo_metrics import moments

    other = {"style": [1.0, 3.0], "math": [5.0, 5.0]}
    sums = {name: np.array([2, sum(values), sum(value * value for value in values)]) for name, values in other.items()}
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, sums])
    found = moments({"math": [3.0], "more": [2.0]}, [None], of_all_processes=True)
    assert found == {"math": (pytest.approx(13 / 3), pytest.approx((8 / 9) ** 0.5)), "more": (2.0, 0.0), "style": (2.0, 1.0)}


@pytest.mark.parametrize(("module", "attribute", "dtype", "refused"), [
    ("deepspeed.runtime.bf16_optimizer", None, "bfloat16", True),
    ("deepspeed.runtime.zero.stage_1_and_2", "single_partition_of_fp32_groups", "bfloat16", False),
    ("deepspeed.runtime.bf16_optimizer", None, "float32", False),
    ("torch.optim.adam", None, "bfloat16", False),
])  # fmt: skip
def test_fp32_weights_that_no_checkpoint_would_hold_are_refused(module, attribute, dtype, refused):
    import torch

    from parts.errors import InputError
    from parts.ppo_state import require_masters

    optimizer = type("Optimizer", (), {"__module__": module, **({attribute: []} if attribute else {})})()
    weights = [torch.zeros(2, dtype=getattr(torch, dtype))]
    trainer = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer), model_params=weights)
    with pytest.raises(InputError, match="DeepSpeed trains by its Optimizer, whose fp32 weights") if refused else contextlib.nullcontext():
        require_masters(trainer)
