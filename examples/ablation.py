"""The paper's ablation at small scale: PPO on four designs of the proxy and on a learned reward model, several seeds each.

    python examples/ablation.py                                     # `make ablation`: whatever is not done yet
    python examples/ablation.py --status=true                       # what is done and what is left
    python examples/ablation.py --designs random-qtype target --results_dir assets/ablation/controls    # the controls
    python examples/ablation.py --status=true --judges assets/demo_gold_rm assets/second_gold_rm     # the kept texts, judged once more
    python examples/ablation.py --ppo_config configs/demo.yaml --designs LI full --seeds 1 2 3 4 5 --steps 0 6 12 \\
        --output_dir outputs/demo_seeds --results_dir assets/demo_run/seeds

A cell is one design with one seed: `run_ppo.py`, rollouts of its checkpoints with draws common to all cells, their scores. Cells run side
by side, seed by seed; stopped at any moment, the same command resumes each where it was. Of a finished cell two files are kept in
<results_dir>: <design>-<seed>.json, what `eval_monotonicity.py` found with every row's scores, the alignment tax and the commands; and
<design>-<seed>.rollouts.json.gz, the texts of its first and last checkpoint, so that another gold can judge them later. The table
(table.md, summary.json) and the figure (ablation.png) are made from the first kind of files alone; `--judges` lets other golds judge the
texts of the second kind (judged.md, judged.json).
"""

from __future__ import annotations

import os
import sys

# The modules lie one folder up, which Python does not search for a script in a folder of its own.
sys.path.insert(0, os.path.realpath(f"{__file__}/../.."))

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

import gzip
import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
from scipy.stats import sem
from tqdm import tqdm

from parts.cli import Settings, parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import atomic_path, digest, file_digest, is_same_path, read_json, write_json
from parts.gold_settings import GoldSettings, short_names
from parts.models import check_model_name, model_identity
from parts.overlap import rouge_l
from parts.rank_statistics import together
from parts.rows import read_rows
from parts.runs import DEVELOPMENT, TRAINING, checkpoints_of, meta_path, provenance
from parts.scores import ScoreStore, gold_columns
from parts.weight_samples import is_same_sample, weight_sample
from run_ppo import PPOSettings

REPOSITORY = Path(__file__).resolve().parent.parent
SWITCHES = ("length_incentive", "repetition_penalty", "relevance_scaling", "reward_branching")
DESIGNS = {"LI": 1, "LI-RP": 2, "LI-RP-QR": 3, "full": 4}  # how many of the switches are on, from the left
LEARNED = "learned"
CONTROLS = {  # switches from the left, and what else is set
    "random-qtype": (4, ["--random_qtypes=true"]),
    "target": (1, ["--length_target=40"]),  # Singhal et al. (2023); the start writes 18 tokens, LI ends at 86
}
COLOURS = {"LI": "#c2570c", "LI-RP": "#b0305c", "LI-RP-QR": "#6a3fb5", "full": "#0b6fb8", LEARNED: "#1f6f4f",
           "random-qtype": "#8a6d1a", "target": "#50545c"}  # fmt: skip


@dataclass
class AblationSettings(Settings):
    ppo_config: str = setting("configs/ablation.yaml", "settings of run_ppo.py for every cell", path=True)
    designs: list[str] = setting(
        [*DESIGNS, LEARNED], f"{', '.join(DESIGNS)}; {LEARNED}: PPO against a reward model; the controls {' and '.join(CONTROLS)}"
    )
    seeds: list[int] = setting([1, 2, 3], "seeds of PPO")
    steps: list[int] = setting([], "checkpoints that are evaluated, at least three with 0 among them; by default all that a run saved")
    reward_model: str = setting("assets/second_gold_rm", f"what {LEARNED} is trained against", path=True)
    gold_model: list[str] = setting(["assets/demo_gold_rm", "assets/second_gold_rm"], "what judges the rollouts", path=True)
    data_path: str = setting("data/eval.json", "evaluation rows with qtype and reference", path=True)
    output_dir: str = setting("outputs/ablation", "checkpoints, rollouts and logs", path=True)
    results_dir: str = setting("assets/ablation", "what is kept", path=True)
    side_by_side: int = setting(0, "cells that run at once, each with its share of the cores; 0 means one a core", least=0)
    bf16: bool = setting(True, "bf16 arithmetic; slower on a CPU without instructions for it")
    judges: list[str] = setting([], "gold models that judge the kept responses of the first and the last checkpoint", path=True)
    status: bool = setting(False, "print what is done and what is left, make table and figure, and train nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        for design in self.designs:
            if design not in (known := [*DESIGNS, LEARNED, *CONTROLS]):
                raise InputError(f"--designs holds {design!r}, expected some of {', '.join(known)}")
        for name in ("designs", "seeds", "steps"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"--{name} names one twice, expected each once")
        if self.steps and (len(self.steps) < 3 or 0 not in self.steps):
            raise InputError(f"--steps is {self.steps}, expected at least three, and 0 among them")


@dataclass(frozen=True)
class Cell:
    design: str
    seed: int
    settings: AblationSettings

    @property
    def name(self) -> str:
        return f"{self.design}-{self.seed}"

    @property
    def kept(self) -> Path:
        return Path(self.settings.results_dir) / f"{self.name}.json"

    @property
    def run(self) -> str:
        """`--output_dir` of its PPO run."""
        return f"{self.settings.output_dir}/{self.name}"


# ----------------------------------------------------------------------------------------------------------------- a cell


def read_ppo(settings: AblationSettings) -> dict:
    """The settings of `--ppo_config`, as `run_ppo.py` reads them. Raises InputError where it lacks what a cell needs."""
    (content,) = parse_settings((), ["--config", settings.ppo_config], typed_only=PPOSettings)
    for name in ("model_name", "overall_steps", "output_max_length"):
        if name not in content:
            raise InputError(f"{settings.ppo_config}: no setting {name}, expected it for the cells")
    return content


def commands(cell: Cell) -> list[list[str]]:
    """What a user would type for a cell: PPO, rollouts, scores."""
    settings = cell.settings
    ppo = read_ppo(settings)
    on, more = CONTROLS.get(cell.design, (DESIGNS.get(cell.design, len(SWITCHES)), []))
    reward = [*(f"--{switch}={'true' if place < on else 'false'}" for place, switch in enumerate(SWITCHES)), *more]
    if cell.design == LEARNED:
        reward.append(f"--reward_model_name={settings.reward_model}")
    resume = ["--resume_from_checkpoint=auto"] if checkpoints_of(cell.run) else []
    points = [f"{cell.run}_step_{step}" for step in settings.steps] or [f"{cell.run}_step_*"]
    chosen = ["--steps", *map(str, settings.steps)] if settings.steps else ["--include_start=true"]
    half = "bfloat16" if settings.bf16 else "float32"

    def ours(name: str) -> str:
        return os.path.relpath(REPOSITORY / name)

    return [
        ["accelerate", "launch", "--config_file", ours("configs/cpu.yaml"), ours("run_ppo.py"), "--config", settings.ppo_config, f"--seed={cell.seed}",
         f"--exp_name={cell.name}", f"--output_dir={cell.run}", f"--bf16={str(settings.bf16).lower()}", *reward, *resume],
        ["python", ours("evaluation.py"), f"--base_model_name={ppo['model_name']}", "--peft_model_name", *points,
         f"--data_path={settings.data_path}", f"--max_new_tokens={ppo['output_max_length']}", "--batch_size=64",
         "--common_draws=true", f"--dtype={half}"],
        ["python", ours("eval_monotonicity.py"), f"--output_dir={settings.output_dir}", f"--model_prefix={cell.name}", *chosen,
         "--gold_model", *settings.gold_model, f"--gold_dtype={half}", "--batch_size=32"],
    ]  # fmt: skip


def run_cell(cell: Cell, threads: int, stop: Event) -> None:
    """Run a cell from wherever it is, its console in <run>.log, and keep what it found; begin no command once `stop` is set.

    Raises:
        InputError: a command failed or was stopped.
    """
    last = read_ppo(cell.settings)["overall_steps"]
    train, *rest = typed = commands(cell)
    made = made_with(cell)  # what the files say now, and not when the cell is done
    for words in rest if is_trained(cell.run, last) else typed:
        if stop.is_set():
            raise InputError(f"{cell.name}: stopped; the same command resumes it")
        run_command(words, cell.run, threads)
        if words is train and not is_trained(cell.run, last):  # a signal ends run_ppo.py with 0 after the step under way
            raise InputError(f"{cell.name}: stopped while it trained; the same command resumes it")
    keep(cell, typed, made)
    print(f"{cell.name}: done, {cell.kept}", flush=True)


def is_trained(run: str, last: int) -> bool:
    return last in [point.step for point in checkpoints_of(run)]


def run_command(words: Sequence[str], run: str, threads: int) -> None:
    """Run a command of a run, by this Python, its console at the end of <run>.log. Raises InputError where it fails."""
    places = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": str(threads)}
    log = Path(f"{run}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as console:
        done = subprocess.run(words, env=os.environ | places, stdout=console, stderr=console)
    if done.returncode:
        raise InputError(f"{Path(run).name}: {words[0]} ended with {done.returncode}; its console is {log}")


def made_with(cell: Cell) -> dict[str, str]:
    """Digests of what a cell's numbers depend on besides design, seed and code, by the setting that names it."""
    settings = cell.settings
    golds = dict(zip(short_names(settings.gold_model), map(_content, settings.gold_model)))
    found = {"ppo_config": digest(read_ppo(settings)), "data_path": file_digest(settings.data_path),
             "gold_model": digest(golds), "bf16": digest(settings.bf16)}  # fmt: skip
    return found | ({"reward_model": digest(_content(settings.reward_model))} if cell.design == LEARNED else {})


def _content(model: str) -> object:
    return weight_sample(model) if Path(model).is_dir() else model


def require_own_results(cell: Cell) -> None:
    """Raises InputError for a finished cell that was made with other settings or models than these, with which it is no mean."""
    kept, now = read_json(cell.kept), made_with(cell)
    for name, value in kept.get("made_with", {}).items():
        if value != now.get(name):
            raise InputError(f"{cell.kept}: made with another --{name} than {getattr(cell.settings, name)}, expected another --results_dir")
    policy = read_ppo(cell.settings)["model_name"]
    if Path(policy).is_dir() and not is_same_sample(kept.get("policy_sample", {}), weight_sample(policy)):
        raise InputError(f"{cell.kept}: trained from another model than {policy} is now, expected another --results_dir")


def require_own_runs(cell: Cell) -> None:
    """Raises InputError where what a cell has trained so far was trained with other settings; a run may be extended."""
    settings = {**read_ppo(cell.settings), "bf16": cell.settings.bf16}
    settings |= {"reward_model_name": [cell.settings.reward_model]} if cell.design == LEARNED else {}
    del settings["overall_steps"]
    for point in checkpoints_of(cell.run):
        for name, value in settings.items():
            then = point.trained.get(name, value)
            if then != value and not is_same_path(then, value):
                raise InputError(f"{point.folder}: {name} was {then!r} and is {value!r}, expected another --output_dir")


def run_cells(cells: Sequence[Cell], at_once: int, threads: int) -> list[InputError]:
    """Run cells side by side, in order; return what failed, each told as it fails. Ctrl-C begins no further command."""
    failures, stop = [], Event()
    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(run_cell, cell, threads, stop) for cell in cells]
        try:
            for done in as_completed(running):
                try:
                    done.result()
                except InputError as error:
                    print(error, flush=True)
                    failures.append(error)
        except KeyboardInterrupt:
            stop.set()
            raise
    return failures


def kept_texts(cell: Cell) -> Path:
    """The file of a finished cell's responses, {step: [text of each row]} of its first and last checkpoint."""
    return cell.kept.with_suffix(".rollouts.json.gz")


def keep(cell: Cell, typed: Sequence[Sequence[str]], made: dict[str, str]) -> None:
    """Write the two files of a finished cell."""
    found = read_json(f"{cell.run}_monotonicity/monotonicity.json")
    points = {point.step: point for point in checkpoints_of(cell.run) if point.rollouts.is_file()}
    references = read_rows(cell.settings.data_path, {"output": None, "qtype": None})
    constrained = [place for place, row in enumerate(references) if row["qtype"] == "CONSTRAINED"]
    overlaps = {
        step: [round(rouge_l(references[place]["output"], point.rows[place]["output"]), 4) for place in constrained]
        for step, point in points.items()
    }
    metas = {step: read_json(meta_path(point.rollouts)) for step, point in points.items()}
    ends = (points[min(points)], points[max(points)])
    with atomic_path(kept_texts(cell)) as temporary:
        texts = {point.step: [row["output"] for row in point.rows] for point in ends}
        temporary.write_bytes(gzip.compress(json.dumps(texts).encode(), mtime=0))
    extra = {
        "made_with": made,
        "training_commit": ends[1].record["commit"],
        "cell": {"design": cell.design, "seed": cell.seed, "commands": [shlex.join(words) for words in typed]},
        "policy_sample": ends[0].record["base_sample"],
        "constrained_rouge_l": overlaps,
        "eos_rate": {step: meta["eos_rate"] for step, meta in metas.items()},
    }
    write_json(cell.kept, {**extra, **found})


# ------------------------------------------------------------------------------------------------------------- the answer


def summarise(kept: Sequence[dict]) -> list[dict]:
    """One entry a design: what its cells gained from their first to their last checkpoint.

    Returns:
        Entries with "design", "seeds", and for "proxy", each gold, "tax" (ROUGE-L of CONSTRAINED answers to their references): "mean" over
        seeds, "over_prompts" (standard error over prompts of the mean over seeds) and "over_seeds" (standard error over seeds), None
        of one; "spearman" by gold, as `parts.rank_statistics.together`, of one seed as well; "last": means over seeds of the last
        checkpoint's KL, tokens, EOS rate and features, and "first" of the first.
    """
    entries = []
    for design in dict.fromkeys(cell["cell"]["design"] for cell in kept):
        cells = [cell for cell in kept if cell["cell"]["design"] == design]
        golds = list(cells[0]["per_row"]["gold"])
        tables = {"proxy": [cell["per_row"]["proxy"] for cell in cells]}
        tables |= {name: [cell["per_row"]["gold"][name] for cell in cells] for name in golds}
        tables["tax"] = [cell["constrained_rouge_l"] for cell in cells]
        gained = {name: np.array([_ends(table)[1] - _ends(table)[0] for table in by_seed]) for name, by_seed in tables.items()}
        runs = [
            SimpleNamespace(
                name=cell["name"],
                steps=[row["step"] for row in cell["curve"]],
                proxy=np.array(list(cell["per_row"]["proxy"].values())),
                gold={name: np.array(list(cell["per_row"]["gold"][name].values())) for name in golds},
                found=cell["spearman"],
            )
            for cell in cells
        ]
        entry = {"design": design, "seeds": [cell["cell"]["seed"] for cell in cells], "spearman": together(runs)}
        for name, values in gained.items():
            errors = {"over_prompts": _standard_error(values.mean(axis=0)), "over_seeds": _standard_error(values.mean(axis=1))}
            entry[name] = {"mean": float(values.mean()), **errors}
        for end, place in (("first", 0), ("last", -1)):
            rows = [{**cell["curve"][place], "eos_rate": list(cell["eos_rate"].values())[place]} for cell in cells]
            entry[end] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name not in ("step", "rows")}
        entries.append(entry)
    return entries


def _standard_error(values: np.ndarray) -> float | None:
    return float(sem(values)) if len(values) > 1 else None


def _ends(table: dict[str, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """The rows' values at the first and the last step of {step: values}."""
    steps = sorted(table, key=int)
    return np.array(table[steps[0]]), np.array(table[steps[-1]])


def table(entries: Sequence[dict]) -> str:
    """The summary as a Markdown table: gains with standard errors over prompts; over seeds."""
    golds = list(entries[0]["spearman"])

    def gain(value: dict, digits: int = 2) -> str:
        errors = [f"{error:.{digits}f}" for error in (value["over_prompts"], value["over_seeds"]) if error is not None]
        return f"{value['mean']:+.{digits}f} ({'; '.join(errors)})"

    def rho(value: dict) -> str:
        if value["mean"] is None:
            return "undefined"
        error = "" if value["standard_error"] is None else f" ({value['standard_error']:.2f})"
        return f"{value['mean']:+.2f}{error}, p {value['pvalue']:.2g}"

    heads = ["design", "seeds", "proxy gain", *(f"{name} gain" for name in golds), *(f"SpearmanR {name}" for name in golds),
             "ROUGE-L gain, CONSTRAINED", "KL", "tokens", "repetition", "EOS rate"]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for entry in entries:
        lines.append([
            entry["design"], " ".join(map(str, entry["seeds"])), gain(entry["proxy"]), *(gain(entry[name]) for name in golds),
            *(rho(entry["spearman"][name]) for name in golds), gain(entry["tax"], 3), f"{entry['last']['kl']:.1f}",
            *(f"{entry['first'][name]:{form}} to {entry['last'][name]:{form}}"
              for name, form in (("tokens", ".0f"), ("repetition", ".2f"), ("eos_rate", ".2f"))),
        ])  # fmt: skip
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def judge(settings: AblationSettings, cells: Sequence[Cell]) -> str:
    """Let `settings.judges` judge the kept responses; write judged.json and judged.md, and return that table.

    Their scores are kept in `output_dir` as they come, so that an interruption loses one batch.

    Raises:
        InputError: a gold model that cannot be loaded, or responses to other rows than those of `data_path`.
    """
    from parts.gold_models import LazyGold

    queries = [row["instruction"] for row in read_rows(settings.data_path, {"instruction": None})]
    texts = [(cell, json.loads(gzip.decompress(kept_texts(cell).read_bytes()))) for cell in cells]
    for cell, ends in texts:
        for step, outputs in ends.items():
            if len(outputs) != len(queries):
                found = f"{len(outputs)} responses of step {step}"
                raise InputError(f"{kept_texts(cell)}: {found}, expected {len(queries)}, as {settings.data_path} has")
    gains: dict[str, dict[str, np.ndarray]] = {cell.name: {} for cell in cells}
    for name in settings.judges:
        gold = LazyGold(name, None, 32, GoldSettings(gold_dtype="bfloat16" if settings.bf16 else "float32"))
        stores = [ScoreStore(f"{cell.run}_judged_{step}.scores.jsonl", gold.facts) for cell, ends in texts for step in ends]
        files = [(queries, outputs) for _, ends in texts for outputs in ends.values()]
        with tqdm(total=len(files) * len(queries), desc=name, unit="row") as bar:
            columns = iter(gold_columns(gold, stores, files, bar.update))
        for cell, ends in texts:
            first, last = _ends({step: next(columns) for step in ends})
            gains[cell.name][name] = last - first
    lines = [["design", "seed", *settings.judges], ["---"] * (2 + len(settings.judges))]
    for design in dict.fromkeys(cell.design for cell in cells):
        seeds = [cell for cell in cells if cell.design == design]
        for cell in seeds:
            lines.append([design, str(cell.seed), *(f"{gain.mean():+.2f} ({sem(gain):.2f})" for gain in gains[cell.name].values())])
        means = {name: [gains[cell.name][name].mean() for cell in seeds] for name in settings.judges}
        errors = {name: f" ({_standard_error(np.array(values)):.2f})" if len(values) > 1 else "" for name, values in means.items()}
        lines.append([design, "mean (SE over seeds)", *(f"{np.mean(values):+.2f}{errors[name]}" for name, values in means.items())])
    text = markdown(lines)
    results = Path(settings.results_dir)
    per_row = {cell: {name: gain.round(4).tolist() for name, gain in by_gold.items()} for cell, by_gold in gains.items()}
    write_json(results / "judged.json", {"gold_gains": per_row, "provenance": provenance(golds=list(map(model_identity, settings.judges)))})
    with atomic_path(results / "judged.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def draw(kept: Sequence[dict], path: Path) -> None:
    """Gold gained against KL, a panel a gold: a thin line a seed, a thick one for a design's mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    golds = list(kept[0]["spearman"])
    with pyplot.rc_context({"font.size": 8, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = pyplot.subplots(1, len(golds), figsize=(1.2 + 4 * len(golds), 3.4), layout="constrained", squeeze=False)
        for axes, gold in zip(panels[0], golds):
            axes.axhline(0, color="#999999", linewidth=0.6)
            for design in dict.fromkeys(cell["cell"]["design"] for cell in kept):
                curves = [cell["curve"] for cell in kept if cell["cell"]["design"] == design]
                lines = [([row["kl"] for row in curve], [row[gold] - curve[0][gold] for row in curve]) for curve in curves]
                for line in lines:
                    axes.plot(*line, color=COLOURS[design], linewidth=0.6, alpha=0.5)
                mean = np.mean(lines, axis=0)
                axes.plot(*mean, "o-", color=COLOURS[design], linewidth=1.8, markersize=3, label=f"{design} ({len(lines)})")
            axes.set_xlabel("KL from the start, nats a response")
            axes.set_ylabel(f"{gold}, gained")
        panels[0][0].legend(frameon=False, title="design (seeds)")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=200, format="png")
        pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------------------- main


def kept_cells(settings: AblationSettings) -> list[Cell]:
    """The cells of the designs that are in the folder of results, those of other seeds too, design by design."""
    names = [path.name for path in Path(settings.results_dir).glob("*.json")]
    seeds = {design: [re.fullmatch(rf"{re.escape(design)}-(\d+)\.json", name) for name in names] for design in settings.designs}
    return [Cell(design, seed, settings) for design, own in seeds.items() for seed in sorted(int(match[1]) for match in own if match)]


def main() -> None:
    settings = parse_settings(AblationSettings, description=__doc__)
    cells = [Cell(design, seed, settings) for seed in settings.seeds for design in settings.designs]
    left = [cell for cell in cells if not cell.kept.is_file()]
    failures: list[InputError] = []
    read_rows(settings.data_path, {"instruction": None})
    begins = bool(left) and not settings.status
    GoldSettings().check_gold([*settings.judges, *(settings.gold_model if begins else [])])
    if begins and LEARNED in settings.designs:
        check_model_name(settings.reward_model)
    for cell in kept_cells(settings):
        require_own_results(cell)
    print(f"{len(cells) - len(left)} of {len(cells)} cells are done; left: {' '.join(cell.name for cell in left) or 'none'}", flush=True)
    if begins:
        backbone = read_ppo(settings)["model_name"]
        if not Path(backbone).is_dir():
            raise InputError(f"{settings.ppo_config}: {backbone}: no such folder; `make outputs/demo_backbone` makes the demo's")
        cores = len(os.sched_getaffinity(0))
        at_once = settings.side_by_side or cores
        for cell in left:
            require_own_runs(cell)
        failures = run_cells(left, at_once, max(1, cores // at_once))
    cells = kept_cells(settings)
    kept = [read_json(cell.kept) for cell in cells]
    if kept:
        steps = [[row["step"] for row in cell["curve"]] for cell in kept]
        for cell, own in zip(kept, steps):
            if own != steps[0]:
                raise InputError(
                    f"{settings.results_dir}: {cell['name']} has the steps {own}, expected {steps[0]} as {kept[0]['name']} has"
                )
        if len({cell.get("kl_of", TRAINING) for cell in kept}) > 1:
            print(f"KL of some cells is of {TRAINING}, of others of {DEVELOPMENT}; means take both")
        entries = summarise(kept)
        results = Path(settings.results_dir)
        with atomic_path(results / "table.md") as temporary:
            temporary.write_text(table(entries), encoding="utf-8")
        summary = results / "summary.json"
        if not summary.is_file() or read_json(summary)["designs"] != json.loads(json.dumps(entries)):
            write_json(summary, {"designs": entries, "provenance": provenance()})  # else it would say another commit of the same
        draw(kept, results / "ablation.png")
        print(table(entries))
    if settings.judges:
        print(judge(settings, [cell for cell in cells if kept_texts(cell).is_file()]))
    if failures:
        raise InputError(failures[0] if len(failures) == 1 else f"{len(failures)} cells failed; the first: {failures[0]}")


if __name__ == "__main__":
    run_main(main)
