"""What the value head's settings gain: a run with each of them, against a run of the same design without, on the same prompts.

    python examples/ablation.py --designs LI full        # the runs without: their first steps are compared
    python benchmarks/value_head.py --results_dir=assets/value_head/full     # the others; stopped at any moment, it resumes
    python benchmarks/value_head.py --published outputs/ablation/LI-{seed} --output_dir=outputs/value_head_li --seeds 2 3 \
        --results_dir=assets/value_head/li

Runs of one seed see the same prompts at each step, so that rewards are compared step by step. What is kept is
<results_dir>/value_head.json and its table, value_head.md.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from scipy.stats import sem
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from examples.ablation import SWITCHES, is_trained, markdown, run_command  # noqa: E402
from parts.cli import Settings, parse_settings, setting  # noqa: E402
from parts.errors import InputError, run_main  # noqa: E402
from parts.files import atomic_path, read_json, read_text, write_json  # noqa: E402
from parts.runs import checkpoints_of, provenance  # noqa: E402

PUBLISHED = "as published"
VARIANTS = {
    "warmup": ["--value_warmup_steps=4"],
    "rate": ["--value_learning_rate=0.01"],
    "qtype": ["--score_norm_by_qtype=true"],
}
WINDOW = 5  # steps that a smoothed reward is the mean of


@dataclass
class ValueHeadSettings(Settings):
    ppo_config: str = setting("configs/ablation.yaml", "settings of run_ppo.py for every run", path=True)
    seeds: list[int] = setting([1, 2, 3], "seeds of PPO")
    steps: int = setting(20, "PPO steps of a run", least=2 * WINDOW)
    variants: list[str] = setting([*VARIANTS], f"of {', '.join(VARIANTS)}")
    published: str = setting(
        "outputs/ablation/full-{seed}", "output_dir of the runs without, whose design the others have; {seed}: the seed"
    )
    output_dir: str = setting("outputs/value_head", "checkpoints and logs of the others", path=True)
    results_dir: str = setting("assets/value_head", "what is kept", path=True)
    threads: int = setting(0, "threads of a run; 0 means one a core", least=0)
    bf16: bool = setting(True, "bf16 arithmetic; slower on a CPU without instructions for it")

    def __post_init__(self) -> None:
        super().__post_init__()
        for variant in self.variants:
            if variant not in VARIANTS:
                raise InputError(f"--variants holds {variant!r}, expected some of {', '.join(VARIANTS)}")


def train(settings: ValueHeadSettings, variant: str, seed: int) -> str:
    """Run or resume one training; return its output_dir. Raises InputError where it fails or is stopped."""
    run = f"{settings.output_dir}/{variant}-{seed}"
    resume = ["--resume_from_checkpoint=auto"] if checkpoints_of(run) else []
    save = yaml.safe_load(read_text(settings.ppo_config))["save_freq"]
    without = read_json(Path(settings.published.format(seed=seed)) / "logs" / "run.json")["settings"]
    design = [f"--{switch}={str(without[switch]).lower()}" for switch in SWITCHES]
    words = ["accelerate", "launch", "--config_file", os.path.relpath(REPOSITORY / "configs" / "cpu.yaml"),
             os.path.relpath(REPOSITORY / "run_ppo.py"), "--config", settings.ppo_config, f"--seed={seed}",
             f"--overall_steps={settings.steps}", f"--save_freq={min(save, settings.steps)}", f"--exp_name={variant}-{seed}",
             f"--output_dir={run}", f"--bf16={str(settings.bf16).lower()}", *design, *VARIANTS[variant], *resume]  # fmt: skip
    if not is_trained(run, settings.steps):
        run_command(words, run, settings.threads or len(os.sched_getaffinity(0)))
        if not is_trained(run, settings.steps):
            raise InputError(f"{variant}-{seed}: stopped while it trained; the same command resumes it")
    return run


def curve(run: str, steps: int) -> dict[str, list[float]]:
    """Reward, explained variance and KL of the first `steps` steps. Raises InputError where there are fewer."""
    log = Path(run) / "logs" / "metrics.jsonl"
    if not log.is_file():
        raise InputError(f"{log}: no such file, expected the metrics of a run; examples/ablation.py makes those without the settings")
    rows = {row["step"]: row for row in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
    missing = [step for step in range(1, steps + 1) if "reward/total" not in rows.get(step, {})]
    if missing:
        raise InputError(f"{log}: has no step {missing[0]}, expected {steps} steps")
    names = {"reward": "reward/total", "explained": "ppo/val/var_explained", "kl": "objective/kl"}
    return {short: [rows[step][name] for step in range(1, steps + 1)] for short, name in names.items()}


def smoothed(rewards: np.ndarray) -> np.ndarray:
    """Means over seeds and over each `WINDOW` steps.

    Args:
        rewards: [seeds, steps].

    Returns:
        [steps - WINDOW + 1]; the first is of steps 1 to WINDOW.
    """
    return np.convolve(rewards.mean(axis=0), np.ones(WINDOW) / WINDOW, mode="valid")


def compare(curves: dict[str, list[dict[str, list[float]]]]) -> list[dict]:
    """One entry a variant from the curves of its seeds, the first variant being what the others are compared with.

    "explained" is the mean explained variance of the first WINDOW steps and of the rest; "gained" the mean difference in reward over the
    last half, with its standard error over seeds; "reached" the first step whose smoothed reward is that of the first variant's end.
    """
    table = {name: {key: np.array([one[key] for one in seeds]) for key in seeds[0]} for name, seeds in curves.items()}
    first = next(iter(table.values()))
    level = smoothed(first["reward"])[-1]
    entries = []
    for name, values in table.items():
        half = values["reward"].shape[1] // 2
        differences = (values["reward"] - first["reward"])[:, half:].mean(axis=1)
        there = np.flatnonzero(smoothed(values["reward"]) >= level)
        explained = values["explained"]
        entries.append({
            "name": name,
            "explained": [float(explained[:, :WINDOW].mean()), float(explained[:, WINDOW:].mean())],
            "gained": float(differences.mean()),
            "error_over_seeds": float(sem(differences)) if len(differences) > 1 else None,
            "reached": int(there[0]) + WINDOW if len(there) else None,
            "kl": float(values["kl"][:, -1].mean()),
        })  # fmt: skip
    return entries


def as_table(entries: list[dict]) -> str:
    lines = [["run", f"explained variance, steps 1 to {WINDOW}", "after", "reward gained in the last half (SE over seeds)",
              "steps to the published run's reward", "KL at the end"], ["---"] * 6]  # fmt: skip
    for entry in entries:
        error = "" if entry["error_over_seeds"] is None else f" ({entry['error_over_seeds']:.2f})"
        lines.append([entry["name"], *(f"{value:+.2f}" for value in entry["explained"]),
                      "" if entry is entries[0] else f"{entry['gained']:+.2f}{error}",
                      str(entry["reached"] or "not reached"), f"{entry['kl']:.1f}"])  # fmt: skip
    return markdown(lines)


def main() -> None:
    settings = parse_settings(ValueHeadSettings, description=__doc__)
    published = [settings.published.format(seed=seed) for seed in settings.seeds]
    curves = {PUBLISHED: [curve(run, settings.steps) for run in published]}
    order = [(variant, seed) for seed in settings.seeds for variant in settings.variants]
    runs = {variant: [] for variant in settings.variants}
    for variant, seed in tqdm(order, desc="runs", unit="run"):
        runs[variant].append(train(settings, variant, seed))
    curves |= {" ".join(VARIANTS[name]): [curve(run, settings.steps) for run in done] for name, done in runs.items()}
    entries = compare(curves)
    records = {run: read_json(Path(run) / "logs" / "run.json") for run in [*published, *(run for done in runs.values() for run in done)]}
    commands = {run: {key: record[key] for key in ("commit", "command")} for run, record in records.items()}
    results = Path(settings.results_dir)
    write_json(results / "value_head.json", {"variants": entries, "curves": curves, "runs": commands, "provenance": provenance()})
    with atomic_path(results / "value_head.md") as temporary:
        temporary.write_text(as_table(entries), encoding="utf-8")
    print(as_table(entries))


if __name__ == "__main__":
    run_main(main)
