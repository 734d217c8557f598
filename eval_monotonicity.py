"""Did the proxy capture what gold wants? Mean proxy and mean gold score of every checkpoint, and SpearmanR between them.

    python eval_monotonicity.py --output_dir=outputs --model_prefix=full                # every checkpoint with rollouts but the start
    python eval_monotonicity.py --output_dir=outputs --model_prefix=full --steps 500 1000 1500 --gold_model=owner/reward-model
    python eval_monotonicity.py --output_dir=outputs --model_prefix=full --gold_scores=gold.csv     # columns: step, gold

Reads <output_dir>/<model_prefix>_step_<k>/alpaca-eval-*.json, which `evaluation.py` writes. The proxy's settings are those of the
run's own record. Writes monotonicity.json and monotonicity.png to <output_dir>/<model_prefix>_monotonicity/.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.stats

from monotonicity import EXACT_UP_TO, agreement, bootstrap_interval, curve_band, kendall, permutation_pvalue, spearman, turning_point
from records import (
    QTYPES,
    InputError,
    atomic_path,
    check_device,
    check_model_name,
    match_rows,
    provenance,
    read_json,
    read_rows,
    read_text,
    require_finite,
    rollouts_path,
    run_main,
    write_json,
)
from reward_model import RewardSettings, column_mean, proxy_of_run, reward_batch
from settings import parse_settings, setting


@dataclass
class MonotonicitySettings:
    output_dir: str = setting("outputs", "folder that holds the checkpoints")
    model_prefix: str = setting("", "checkpoints are <output_dir>/<model_prefix>_step_<k>")
    steps: list[int] = setting([], "the checkpoints to compare; by default all that have rollouts, but for the start (step 0)")
    include_start: bool = setting(False, "count step 0 among the default checkpoints")
    data_path: str = setting("", "evaluation rows with qtype and reference (`output`); empty means the file the rollouts were made from")
    gold_model: str = setting("Nexusflow/Starling-RM-34B", "gold reward model: hub name, folder, or adapter folder")
    gold_scores: str = setting("", "table of mean gold scores in place of a gold model: CSV or JSON rows with step and gold")
    device: str = setting("", "device of the relevance encoder and the gold model; empty means the GPUs where there are any")
    batch_size: int = setting(8, "rows per batch of either model")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's step, folder, and rollouts in file order."""

    step: int
    folder: Path
    rows: list[dict]

    @property
    def meta(self) -> dict:
        """How the rollouts were made; empty for rollouts that `evaluation.py` did not write."""
        path = rollouts_path(self.folder).with_suffix(".meta.json")
        return read_json(path) if path.is_file() else {}

    @property
    def trained(self) -> dict:
        """The settings of the training run; empty for a checkpoint that `run_ppo.py` did not write."""
        path = self.folder / "training_record.json"
        return read_json(path)["settings"] if path.is_file() else {}


def find_checkpoints(settings: MonotonicitySettings) -> list[Checkpoint]:
    """The checkpoints to compare, by step.

    Raises:
        InputError: none found, a wanted one lacks its folder or rollouts, fewer than three, or rollouts that were made otherwise: on
            other instructions, or with other decoding settings.
    """
    pattern = re.compile(re.escape(settings.model_prefix) + r"_step_(\d+)")
    parent = Path(settings.output_dir)
    if not parent.is_dir():
        raise InputError(f"{parent}: no such folder, expected the one that holds the checkpoints")
    folders = {int(match[1]): path for path in parent.iterdir() if (match := pattern.fullmatch(path.name)) and path.is_dir()}
    if not folders:
        raise InputError(f"{parent}: no folder {settings.model_prefix}_step_<k>")
    if settings.steps:
        steps = sorted(set(settings.steps))
        for step in steps:
            if step not in folders or not rollouts_path(folders[step]).is_file():
                raise InputError(f"{parent}/{settings.model_prefix}_step_{step}: no rollouts, expected them from evaluation.py")
    else:
        candidates = [step for step in sorted(folders) if step > 0 or settings.include_start]
        steps = [step for step in candidates if rollouts_path(folders[step]).is_file()]
        if without := [step for step in candidates if step not in steps]:
            print(f"without rollouts, left out: steps {', '.join(map(str, without))}")
    if len(steps) < 3:
        raise InputError(
            f"{parent}: {len(steps)} checkpoints of {settings.model_prefix} with rollouts, expected at least 3 for a correlation"
        )
    texts = {"instruction": None, "output": None}
    checkpoints = [Checkpoint(step, folders[step], read_rows(rollouts_path(folders[step]), texts)) for step in steps]
    first = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        if len(checkpoint.rows) != len(first.rows):
            raise InputError(
                f"{rollouts_path(checkpoint.folder)}: {len(checkpoint.rows)} rows, expected {len(first.rows)} as at step {first.step}"
            )
        for number, (row, other) in enumerate(zip(checkpoint.rows, first.rows), start=1):
            if row["instruction"] != other["instruction"]:
                raise InputError(f"{rollouts_path(checkpoint.folder)}: row {number}: another instruction than at step {first.step}")
        for name in ("decoding", "template", "engine", "dtype"):
            own, other = checkpoint.meta.get(name), first.meta.get(name)
            if own != other:
                raise InputError(f"{rollouts_path(checkpoint.folder)}: {name} is {own}, expected {other} as at step {first.step}")
    return checkpoints


def warn_of_changed_code(checkpoint: Checkpoint, proxy: RewardSettings) -> None:
    """One line where the reward's code is not what it was in training: the run would be judged by another reward than its own."""
    path = checkpoint.folder / "training_record.json"
    recorded = read_json(path).get("reward_source", {}) if path.is_file() else {}
    for name, digest in proxy.reward_source().items():
        if recorded.get(name, digest) != digest:
            print(f"warning: {name} has changed since {checkpoint.folder.name} was trained; its proxy is computed with the file as it is")


def read_references(settings: MonotonicitySettings, checkpoints: list[Checkpoint], proxy: RewardSettings) -> list[dict]:
    """One row of dataset columns per rollout row: the rollout's own where the proxy reads nothing else.

    Raises:
        InputError: qtypes or references are needed and their file is unknown, unusable, or lacks an instruction.
    """
    rows = checkpoints[0].rows
    path = settings.data_path or checkpoints[0].meta.get("data_path")
    if not (proxy.reads_references or proxy.reward_function):
        return [{"qtype": row.get("qtype")} for row in rows]
    if not path:
        raise InputError("--data_path is missing: the proxy reads references, and no record beside the rollouts says where they are")
    return match_rows(path, [row["instruction"] for row in rows], proxy.dataset_fields, str(rollouts_path(checkpoints[0].folder)))


def read_gold_scores(path: str, steps: list[int]) -> dict[int, float]:
    """Mean gold score by step, from a CSV or JSON table. Raises InputError for a missing step or a value that is no number."""
    if path.endswith(".json"):
        rows = read_rows(path, {})
    else:
        rows = list(csv.DictReader(read_text(path).removeprefix("\ufeff").splitlines()))
    scores = {}
    for number, row in enumerate(rows, start=1):
        for field in ("step", "gold"):
            try:
                value = float(row[field])
            except (KeyError, TypeError, ValueError):
                raise InputError(f"{path}: row {number}: field '{field}' is {row.get(field)!r}, expected a number") from None
            if field == "step" and not value.is_integer():
                raise InputError(f"{path}: row {number}: field 'step' is {row[field]!r}, expected a whole number")
        if float(row["step"]) in scores:
            raise InputError(f"{path}: row {number}: step {row['step']} comes twice")
        scores[int(float(row["step"]))] = float(row["gold"])
    for step in steps:
        if step not in scores:
            raise InputError(f"{path}: no row for step {step}")
    return dict(zip(steps, require_finite([scores[step] for step in steps], path)))


def paired_difference(first: list[float], last: list[float]) -> tuple[float, float]:
    """Mean of last - first over the rows, and its standard error (sample standard deviation / sqrt(rows))."""
    differences = [after - before for before, after in zip(first, last)]
    mean = sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def score_proxy(reward, checkpoint: Checkpoint, references: list[dict]) -> dict[str, list]:
    """The proxy's components of each rollout, "total" among them."""
    instructions, outputs = [row["instruction"] for row in checkpoint.rows], [row["output"] for row in checkpoint.rows]
    return reward.score(reward_batch(instructions, outputs, references))


def correlations(steps: list[int], proxy: np.ndarray, gold: np.ndarray, gold_by_row: bool, qtypes: list[str | None]) -> dict:
    """All that is said of the two curves.

    Args:
        proxy: [checkpoints, rows].
        gold: [checkpoints, rows], or [checkpoints, 1] where only means are known.
        qtypes: of the rows, where they have any.
    """
    curves = proxy.mean(axis=1), gold.mean(axis=1)
    rho = spearman(*curves)
    found = {
        "n": len(steps),
        "spearman": rho,
        "pvalue": float(scipy.stats.spearmanr(*curves).pvalue) if rho is not None else None,
        "exact_pvalue": permutation_pvalue(*curves),
        "kendall": kendall(*curves),
        "turning_point": turning_point(steps, *curves),
    }
    if gold_by_row and proxy.shape[1] > 1:
        found["interval"] = bootstrap_interval(proxy, gold)
        found["agreement"] = agreement(proxy, gold)
        found["by_qtype"] = {}
        for qtype in QTYPES:
            rows = [row for row, own in enumerate(qtypes) if own == qtype]
            if rows:
                part = spearman(proxy[:, rows].mean(axis=1), gold[:, rows].mean(axis=1))
                found["by_qtype"][qtype] = {"spearman": part, "rows": len(rows)}
    return found


def describe(found: dict, steps: list[int], exact: bool) -> str:
    """The correlations in words, the published line first."""
    if found["spearman"] is None:
        return "SpearmanR is undefined: every checkpoint has the same mean proxy or the same mean gold score"
    lines = [
        f"SignificanceResult(statistic={found['spearman']}, pvalue={found['pvalue']})",
        f"n = {found['n']} checkpoints of one run; p over {'all' if exact else 'drawn'} orders of them {found['exact_pvalue']:.4g}, "
        f"Kendall's tau {found['kendall']:.3f}; they are not independent, so that either p claims too much",
    ]
    if found.get("interval"):
        lines.append("95% interval of SpearmanR over prompts drawn anew: {:.3f} to {:.3f}".format(*found["interval"]))
    if found.get("by_qtype"):
        parts = (f"{qtype} {'undefined' if part['spearman'] is None else format(part['spearman'], '.3f')} ({part['rows']} rows)"
                 for qtype, part in found["by_qtype"].items())  # fmt: skip
        lines.append(f"SpearmanR by query type: {', '.join(parts)}")
    if found.get("agreement") and found["agreement"]["share"] is not None:
        share, rows = found["agreement"]["share"], found["agreement"]["rows"]
        lines.append(f"prompt by prompt, gold moved with the proxy from step {steps[0]} to {steps[-1]} in {share:.1%} of {rows}")
    if found["turning_point"] is not None:
        lines.append(f"gold peaks at step {found['turning_point']} while the proxy rises beyond it: over-optimisation from there on")
    return "\n".join(lines)


def draw(
    target: Path, steps: list[int], curves: dict[str, np.ndarray], bands: dict[str, tuple[np.ndarray, np.ndarray]], title: str, record: str
) -> None:
    """Both curves against the step, one axis each, with their 95% bands over prompts where they are known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    axes = {"proxy": (left, "o-", "#0b6fb8"), "gold": (left.twinx(), "s--", "#c2570c")}
    lines = []
    for name, (axis, style, color) in axes.items():
        lines += axis.plot(steps, curves[name], style, color=color, label=f"{name} reward")
        axis.set_ylabel(f"mean {name} reward")
        if name in bands:
            axis.fill_between(steps, *bands[name], color=color, alpha=0.15, linewidth=0)
    left.set(xlabel="PPO step", title=title)
    left.legend(handles=lines, loc="best", frameon=False)
    left.grid(alpha=0.25)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=160, metadata={"Description": record})
    pyplot.close(figure)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(MonotonicitySettings, description=__doc__)
    if not settings.model_prefix:
        raise InputError("--model_prefix is missing, expected the part of the checkpoints' names before _step_<k>")

    # 1. Everything a user can get wrong, before any model loads.
    checkpoints = find_checkpoints(settings)
    steps = [checkpoint.step for checkpoint in checkpoints]
    proxy = proxy_of_run(checkpoints[-1].trained, settings.batch_size)
    references = read_references(settings, checkpoints, proxy)

    from tqdm import tqdm

    from chat_templates import TOKENIZER_OWN, load_template
    from generation import load_tokenizer
    from gold_models import load_gold_reward_model

    if settings.gold_scores:
        gold_means = read_gold_scores(settings.gold_scores, steps)
    else:
        check_model_name(settings.gold_model)
    proxy.check_reward()
    check_device(settings.device)
    warn_of_changed_code(checkpoints[-1], proxy)
    trained = checkpoints[-1].trained
    template_name = trained.get("chat_template_name", "alpaca")
    own = template_name == TOKENIZER_OWN
    template = load_template(template_name, load_tokenizer(trained["tokenizer_name"] or trained["model_name"]) if own else None)

    # 2. Proxy.
    device = settings.device or None
    reward = proxy.load_reward(template, trained.get("output_max_length", 512), device)
    tables = {point.step: score_proxy(reward, point, references) for point in tqdm(checkpoints, desc="proxy", unit="checkpoint")}
    proxy_scores = {step: table["total"] for step, table in tables.items()}

    # 3. Gold.
    gold: dict[int, list[float]] = {}
    gold_dtype = None
    if not settings.gold_scores:
        model = load_gold_reward_model(settings.gold_model, device=device, batch_size=settings.batch_size)
        gold_dtype = model.dtype
        with tqdm(total=sum(len(point.rows) for point in checkpoints), desc="gold", unit="row") as bar:
            for point in checkpoints:
                queries, outputs = [row["instruction"] for row in point.rows], [row["output"] for row in point.rows]
                gold[point.step] = model.get_reward({"query": queries, "response": outputs})
                bar.update(len(point.rows))

    # 4. The answer.
    scores = {
        "proxy": np.array([proxy_scores[step] for step in steps]),
        "gold": np.array([gold[step] if gold else [gold_means[step]] for step in steps]),
    }
    curves = {name: table.mean(axis=1) for name, table in scores.items()}
    components = {
        step: {name: mean for name, column in table.items() if name != "total" and (mean := column_mean(column)) is not None}
        for step, table in tables.items()
    }
    names = list(components[steps[0]])
    rows = len(checkpoints[0].rows)
    print(f"\n{'step':>8} {'proxy':>10} {'gold':>10} " + " ".join(f"{name:>{max(10, len(name))}}" for name in names) + f" {'rows':>6}")
    for step, proxy_mean, gold_mean in zip(steps, curves["proxy"], curves["gold"]):
        cells = " ".join(f"{components[step][name]:>{max(10, len(name))}.4f}" for name in names)
        print(f"{step:>8} {proxy_mean:>10.4f} {gold_mean:>10.4f} {cells} {rows:>6}")
    gains = {}
    for name, table in scores.items():
        if table.shape[1] > 1:
            mean, error = paired_difference(table[0].tolist(), table[-1].tolist())
            gains[name] = {"difference": mean, "standard_error": error}
            print(f"{name}: step {steps[-1]} minus step {steps[0]}: {mean:+.4f}, standard error {error:.4f} (paired over {rows} rows)")
    found = correlations(steps, scores["proxy"], scores["gold"], bool(gold), [row.get("qtype") for row in references])
    print(describe(found, steps, len(steps) <= EXACT_UP_TO))

    # 5. Files.
    folder = Path(settings.output_dir) / f"{settings.model_prefix}_monotonicity"
    record = provenance(
        settings=asdict(settings),
        model=settings.gold_scores or settings.gold_model,
        dtype=gold_dtype,
        template=template.name,
        decoding=checkpoints[0].meta.get("decoding"),
        seed=checkpoints[0].meta.get("seed"),
        proxy=asdict(proxy),
    )
    curve = [
        {"step": step, "proxy": float(proxy_mean), "gold": float(gold_mean), **components[step]}
        for step, proxy_mean, gold_mean in zip(steps, curves["proxy"], curves["gold"])
    ]
    content = {"spearman": found, "curve": curve, "gains": gains, "per_row": {"proxy": proxy_scores, "gold": gold}, "provenance": record}
    write_json(folder / "monotonicity.json", content)
    rho = "undefined" if found["spearman"] is None else f"{found['spearman']:.2f}"
    bands = {name: curve_band(table) for name, table in scores.items() if table.shape[1] > 1}
    draw(folder / "monotonicity.png", steps, curves, bands, f"{settings.model_prefix}: SpearmanR {rho} over {len(steps)} checkpoints",
         json.dumps(record))  # fmt: skip
    print(folder)


if __name__ == "__main__":
    run_main(main)
