"""Did the proxy capture what gold wants? Mean proxy and mean gold score of every checkpoint, and SpearmanR between them.

    python eval_monotonicity.py --output_dir=outputs --model_prefix=full                # every checkpoint with rollouts but the start
    python eval_monotonicity.py --output_dir=outputs --model_prefix seed1 seed2 seed3 --gold_model owner/reward-model other/reward-model
    python eval_monotonicity.py --output_dir=outputs --model_prefix=full --gold_scores=gold.csv     # columns: step, perhaps row, and golds
    python eval_monotonicity.py --output_dir=outputs --model_prefix li full     # runs of different designs: what did each do to gold?

Reads <output_dir>/<model_prefix>_step_<k>/alpaca-eval-*.json, which `evaluation.py` writes. The proxy's settings are those of the
run's own record, unless a flag says otherwise. Writes monotonicity.json, monotonicity.png and report.html to
<output_dir>/<model_prefix>_monotonicity/, and every row's scores beside its rollouts: what is scored already is not scored again.

Without any training, proxy designs against a leaderboard, on outputs of systems (rows of instruction and output):

    python eval_monotonicity.py --rollouts systems/*.json --gold_scores leaderboard.csv --data_path data/alpaca_eval_annotated.json --all_designs=true

And best-of-n, on several samples a row (`evaluation.py --num_samples`): what gold makes of the response that the proxy ranks first among n:

    python eval_monotonicity.py --best_of_n outputs/sft/samples-sft.jsonl --gold_model owner/reward-model --all_designs=true
    python eval_monotonicity.py --best_of_n outputs/sft/samples-sft.jsonl --output_dir=outputs --model_prefix li full    # beside PPO
    python eval_monotonicity.py --best_of_n outputs/sft/samples-sft.jsonl --write_best 16 best.json    # the best, for train_sft.py; no gold
"""

from __future__ import annotations

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parts.best_of_n_command import judge_best_of_n, read_choice
from parts.chat_templates import ChatTemplate, load_template
from parts.cli import Settings, found_path, parse_settings, setting
from parts.designs import (
    all_designs,
    describe_designs,
    design_name,
    design_totals,
    name_designs,
    rank_designs,
    ranked_systems,
    read_systems,
    reward_in_words,
    shared_instructions,
)
from parts.errors import InputError, run_main
from parts.features import tokens_of
from parts.files import check_writable, clear_folder, write_json
from parts.gold_settings import DEFAULT_GOLD, GoldSettings, short_names
from parts.locks import hold
from parts.models import check_device
from parts.rank_statistics import COLUMNS, ScoredRun, compare, correlations, together
from parts.report import print_comparison, print_run, print_together, write_comparison, write_run, write_together
from parts.rewards import require_scores, reward_batch, reward_name
from parts.rows import match_rows
from parts.run_checks import check_start, one_training, warn_of_changed_code, warn_of_other_draws, warn_of_other_training
from parts.runs import Checkpoint, choose_checkpoints, meta_path, provenance, read_kl, without_records
from parts.scores import (
    LENGTH,
    Proxies,
    ScoreStore,
    gold_columns,
    proxy_columns,
    proxy_facts,
    read_gold_scores,
    read_leaderboard,
    template_and_length,
)
from reward_model import FEATURES, FULL_DESIGN, ProxySettings, RewardSettings, proxy_of_run

if TYPE_CHECKING:
    from parts.gold_models import LazyGold

# The settings that a reward's value depends on.
OF_THE_REWARD = {field.name for field in fields(RewardSettings)} - {"reward_model_batch_size", "reward_offload"}


@dataclass
class MonotonicitySettings(Settings):
    output_dir: str = setting(
        "outputs", "folder that holds the checkpoints, and receives the results", written=True, group=("what to judge", "")
    )
    model_prefix: list[str] = setting(
        [], "checkpoints are <output_dir>/<model_prefix>_step_<k>; several are several runs (seeds, or designs)"
    )
    steps: list[int] = setting([], "the checkpoints to compare; by default all that have rollouts, except the start (step 0)")
    include_start: bool = setting(False, "count step 0 among the checkpoints")
    data_path: str = setting(
        "", "evaluation rows with qtype and reference (`output`); empty means the file the rollouts were made from", path=True
    )
    gold_model: list[str] = setting(
        [], f"gold reward models: hub names, folders, or adapter folders; {DEFAULT_GOLD} where no gold is named", path=True
    )
    gold_scores: str = setting(
        "",
        "table (CSV or JSON) of gold scores: a column step, for several runs a column run, for scores of single responses a column row; any "
        "other one of numbers is a gold",
        path=True,
    )
    rollouts: list[str] = setting([], "outputs of systems, to rank without training; --gold_scores is then their leaderboard", path=True)
    best_of_n: list[str] = setting(
        [], "files of several samples a row (evaluation.py --num_samples), to judge what a proxy chooses among n of them", path=True
    )
    write_best: list[str] = setting(
        [], "with --best_of_n: n and a new file, for the best of each row's first n samples as {input, output, qtype} rows"
    )
    all_designs: bool = setting(
        False,
        "with --rollouts or --best_of_n: every on/off setting of the paper's four switches, and of others that flags turn on, in place "
        "of one design",
    )
    designs: list[str] = setting([], "with --best_of_n: these of all designs, by their names in symbols: LI 'LI * RP' ...")
    chat_template_name: str = setting("", "template whose stop strings end a response; empty means the run's own, or alpaca")
    output_max_length: int = setting(0, "longest response in tokens, as the rescaling F uses it; 0 means the run's own, or 512", least=0)
    device: str = setting("", "device of the relevance encoder and the gold models; empty means the GPUs where there are any")
    batch_size: int = setting(8, "most rows per batch of any model", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rollouts or self.model_prefix or self.best_of_n):
            raise InputError(
                "--model_prefix is missing, expected the part of the checkpoints' names before _step_<k> (or else --rollouts, --best_of_n)"
            )
        if self.rollouts and (self.model_prefix or self.best_of_n):
            raise InputError("--rollouts are ranked by themselves, expected no --model_prefix and no --best_of_n with them")
        if self.model_prefix and len(self.best_of_n) > 1:
            raise InputError("--best_of_n beside --model_prefix is one policy's samples, expected one file")
        if self.rollouts and (not self.gold_scores or self.gold_model):
            raise InputError("--rollouts are ranked beside a leaderboard, expected --gold_scores FILE and no --gold_model")
        if self.all_designs and not (self.rollouts or self.best_of_n):
            raise InputError("--all_designs is for --rollouts and --best_of_n; a run is judged by its own design")
        if self.designs and self.all_designs:
            raise InputError("--designs and --all_designs are both given, expected one of them")
        if (self.designs or self.write_best) and not self.best_of_n:
            raise InputError("--designs and --write_best are for samples, expected --best_of_n FILE")
        if self.best_of_n and self.gold_scores:
            raise InputError("--best_of_n asks gold for a score of every sample, expected --gold_model and no --gold_scores")
        if (self.steps or self.include_start) and not self.model_prefix:
            raise InputError("--steps and --include_start choose among a run's checkpoints, expected --model_prefix")
        if self.write_best:
            self.check_write_best()
        self.by_default = not (self.gold_model or self.gold_scores or self.write_best)
        if self.by_default:
            self.gold_model = [DEFAULT_GOLD]

    @property
    def every_design(self) -> bool:
        """Whether the features of every design are scored: also where samples stand beside runs, whose designs choose among them."""
        return self.all_designs or bool(self.designs) or bool(self.best_of_n and self.model_prefix)

    def check_write_best(self) -> None:
        words = self.write_best
        if len(words) != 2 or not words[0].isdecimal() or int(words[0]) < 1:
            raise InputError(f"--write_best is {' '.join(words)!r}, expected n and a file")
        if len(self.best_of_n) != 1 or self.every_design:
            raise InputError("--write_best takes what one design chooses of one file, expected flags of the proxy that say which design")
        if not words[1].endswith((".json", ".jsonl")):
            raise InputError(f"--write_best is {' '.join(words)}, expected a file that ends in .json or .jsonl")
        for path in (Path(words[1]), meta_path(words[1])):
            if path.exists():
                raise InputError(f"--write_best: {path} exists already, expected the name of a new file")
        check_writable(words[1])


# --------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Run:
    """A run's checkpoints, and what its scores are made with."""

    name: str
    checkpoints: list[Checkpoint]
    trained: dict
    proxy: RewardSettings
    references: list[dict]
    template: ChatTemplate
    output_max_length: int
    one_training: bool = True  # whether all checkpoints were trained on the last one's reward
    warnings: tuple[str, ...] = ()  # what may make its numbers other ones than its training saw

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.checkpoints]

    @property
    def design(self) -> str:
        """The reward that the run was trained on, in symbols; for a run against a reward model also the proxy that judges it."""
        if learned := reward_name(self.trained):
            return f"reward model {learned if ',' in learned else Path(learned).name} (proxy: {design_name(self.proxy)})"
        return design_name(self.proxy)

    @property
    def design_in_words(self) -> str:
        """All that makes one design differ from another."""
        learned = reward_name(self.trained)
        how = f", {self.template.name} prompts, responses of {self.output_max_length} tokens at most"
        how += ", random query types" if self.trained.get("random_qtypes") else ""
        return reward_in_words(self.proxy) + how + (f", trained against {learned}" if learned else "")

    @property
    def own(self) -> bool:
        """Whether the record says that the run was trained on this proxy, all of it."""
        if not self.trained or not self.one_training or self.trained.get("reward_model_name") or self.trained.get("random_qtypes"):
            return False
        same_template = self.trained.get("chat_template_name", self.template.name) == self.template.name
        same_length = self.trained.get("output_max_length", LENGTH) == self.output_max_length
        return same_template and same_length and reward_in_words(proxy_of_run(self.trained)) == reward_in_words(self.proxy)


def read_run(settings: MonotonicitySettings, typed: Mapping, prefix: str) -> Run:
    """A run with all that its proxy needs. Raises InputError as `choose_checkpoints`, and for rows or a reward that cannot be used."""
    checkpoints = choose_checkpoints(settings, prefix)
    trained = checkpoints[-1].trained
    proxy = proxy_of_run(trained, settings.batch_size, typed)
    proxy.check_reward()
    references = read_references(settings, checkpoints, proxy)
    warnings = tuple(warn_of_changed_code(checkpoints[-1], proxy.reward_source()))
    template, length = template_and_length(settings.chat_template_name, settings.output_max_length, checkpoints[-1].meta, trained)
    return Run(prefix, checkpoints, trained, proxy, references, template, length, one_training(checkpoints, OF_THE_REWARD), warnings)


def check_gold_names(golds: Sequence[str], runs: Sequence[Run]) -> None:
    """Raises InputError where two columns of the tables and reports would have one name."""
    proxies = [run.proxy for run in runs if run.proxy.is_proxy]
    taken = {*COLUMNS, *(feature.column for proxy in proxies for feature in FEATURES if feature.always_shown or feature in proxy.on)}
    for place, name in enumerate(golds):
        if name in taken or name in golds[:place]:
            what = "another gold" if name in golds[:place] else "what is no gold"
            raise InputError(f"a gold is called {name!r}, as {what} is, expected another column in --gold_scores or another folder")


def require_readers(proxies: Mapping[str, RewardSettings], typed: Mapping) -> None:
    """Raises InputError for a flag of the proxy where no reward, by what it judges, is one: functions and reward models read none."""
    flags = [field.name for field in fields(ProxySettings) if typed.get(field.name) is not None]
    if flags and not any(proxy.is_proxy for proxy in proxies.values()):
        name, proxy = next(iter(proxies.items()))
        raise InputError(f"--{flags[0]}: {name} is judged by {proxy.named}, which does not read it")


def run_to_choose_by(runs: Sequence[Run]) -> Run:
    """The run by whose encoder and length all designs choose among samples, whose policy has no record of either.

    Raises:
        InputError: runs with several encoders or lengths.
    """
    proxies = [run for run in runs if run.proxy.is_proxy] or list(runs[:1])
    encoding = [run for run in proxies if run.proxy.needs_encoder] or proxies
    for name, group, values in (
        ("relevance_model_name", encoding, [run.proxy.relevance_model_name for run in encoding]),
        ("output_max_length", proxies, [run.output_max_length for run in proxies]),
    ):
        for run, value in zip(group, values):
            if value != values[0]:
                raise InputError(f"--best_of_n: {name} is {values[0]} in {group[0].name} and {value} in {run.name}, expected one for all")
    return encoding[0]


def read_references(settings: MonotonicitySettings, checkpoints: list[Checkpoint], proxy: RewardSettings) -> list[dict]:
    """One row of dataset columns per rollout row: the rollout's own where the proxy reads nothing else and no file is named.

    Raises:
        InputError: qtypes or references are needed and their file is unknown, unusable, or lacks an instruction.
    """
    rows = checkpoints[0].rows
    needed = proxy.reads_besides("qtype")
    recorded = checkpoints[0].meta.get("data_path") if needed else None
    path = settings.data_path or (recorded and found_path(recorded))
    if path:
        return match_rows(path, [row["instruction"] for row in rows], proxy.dataset_fields, str(checkpoints[0].rollouts))
    if needed:
        columns = f"reads {', '.join(proxy.dataset_fields)}" if proxy.dataset_fields else "is a function of the rows"
        raise InputError(f"--data_path is missing: the reward {columns}, and no record beside the rollouts says where they are")
    return [{"qtype": row.get("qtype")} for row in rows]


# --------------------------------------------------------------------------------------------------------------- scoring


def rollout_batch(checkpoint: Checkpoint, references: Sequence[Mapping]) -> dict[str, list]:
    instructions, outputs = [row["instruction"] for row in checkpoint.rows], [row["output"] for row in checkpoint.rows]
    return reward_batch(instructions, outputs, references)


def score_proxies(runs: Sequence[Run], proxies: Proxies) -> dict[str, list[dict[str, list]]]:
    """By run, the components of each checkpoint's rows."""
    from tqdm import tqdm

    tables: dict[str, list[dict[str, list]]] = {}
    with tqdm(total=sum(len(point.rows) for run in runs for point in run.checkpoints), desc="proxy", unit="row") as bar:
        for run in runs:
            how = (run.proxy, run.template, run.output_max_length)
            facts = proxy_facts(*how)
            tables[run.name] = [
                proxy_columns(partial(proxies, *how), ScoreStore(point.scores, facts), rollout_batch(point, run.references), bar.update)
                for point in run.checkpoints
            ]
            for point, table in zip(run.checkpoints, tables[run.name]):
                require_scores(table["total"], str(point.rollouts))
                if table.keys() != (first := tables[run.name][0]).keys():
                    told = f"reward: columns {', '.join(table)} in {point.name} and {', '.join(first)} in {run.checkpoints[0].name}"
                    raise InputError(f"{told}, expected the same of all checkpoints")
    return tables


def open_golds(settings: MonotonicitySettings, gold_settings: GoldSettings) -> dict[str, LazyGold]:
    """The golds by their names, none of which has loaded its weights. Raises InputError for a device or a gold that cannot be used."""
    from parts.gold_models import LazyGold

    gold_settings.check_gold(settings.gold_model)
    check_device(settings.device)
    try:
        return {name: LazyGold(name, settings.device or None, settings.batch_size, gold_settings) for name in settings.gold_model}
    except InputError as error:
        if not settings.by_default:
            raise
        raise InputError(f"--gold_model is missing, and the paper's, {DEFAULT_GOLD}, cannot be loaded ({error})") from None


def score_gold(gold: LazyGold, runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """By run, the gold scores [checkpoints, rows]."""
    from tqdm import tqdm

    points = [point for run in runs for point in run.checkpoints]
    stores = [ScoreStore(point.scores, gold.facts) for point in points]
    texts = [([row["instruction"] for row in point.rows], [row["output"] for row in point.rows]) for point in points]
    with tqdm(total=sum(len(point.rows) for point in points), desc=f"gold {Path(gold.name).name}", unit="row") as bar:
        columns = iter(gold_columns(gold, stores, texts, bar.update))
    return {run.name: np.array([next(columns) for _ in run.checkpoints]) for run in runs}


def scored_run(run: Run, tables: list[dict[str, list]], gold: dict[str, np.ndarray]) -> ScoredRun:
    """A run's texts and scores as one value, with what is found of them."""
    steps, first = run.steps, run.checkpoints[0]
    components = {
        name: np.array([[np.nan if value is None else value for value in table[name]] for table in tables], dtype=float)
        for name in tables[0]
        if name != "total" and not any(isinstance(value, str) for table in tables for value in table[name])
        if any(value is not None for table in tables for value in table[name])
    }
    # A user's function may call a column as it likes.
    components = {f"reward.{name}" if name in {*COLUMNS, *gold} else name: scores for name, scores in components.items()}
    tokens = [[len(tokens_of(run.template.strip_response(row["output"]))) for row in point.rows] for point in run.checkpoints]
    proxy = np.array([table["total"] for table in tables])
    qtypes = [row.get("qtype") for row in run.references]
    kl, kl_of = read_kl(run.checkpoints)
    return ScoredRun(
        name=run.name,
        steps=steps,
        instructions=[row["instruction"] for row in first.rows],
        qtypes=qtypes,
        references=[row.get("output") for row in run.references],
        responses=[[row["output"] for row in point.rows] for point in run.checkpoints],
        tokens=np.array(tokens),
        components=components,
        proxy=proxy,
        gold=gold,
        kl=kl,
        kl_of=kl_of,
        found={name: correlations(steps, proxy, scores, qtypes) for name, scores in gold.items()},
        design=run.design,
        own=run.own,
    )


# ---------------------------------------------------------------------------------------------------------- the programs


def judge_runs(settings: MonotonicitySettings, gold_settings: GoldSettings, typed: Mapping) -> None:
    """SpearmanR of one run or several, by their checkpoints' rollouts; runs of different designs are compared."""
    # 1. Everything a user can get wrong, before any model loads.
    for number, prefix in enumerate(settings.model_prefix):
        if Path(prefix).name != prefix:
            raise InputError(f"--model_prefix: {prefix}, expected the beginning of folders' names in --output_dir, without a slash")
        if prefix in settings.model_prefix[:number]:
            raise InputError(f"--model_prefix: {prefix} comes twice")
    runs = [read_run(settings, typed, prefix) for prefix in settings.model_prefix]
    table, is_lone = settings.gold_scores, len(runs) == 1
    tabled = {
        run.name: read_gold_scores(table, run.steps, run.name, is_lone, len(run.checkpoints[0].rows)) if table else {} for run in runs
    }
    designs = name_designs(runs)
    unlike = warn_of_other_training(runs, designs, OF_THE_REWARD) + warn_of_other_draws(runs)
    golds = dict(zip(settings.gold_model, short_names(settings.gold_model)))
    check_gold_names([*golds.values(), *tabled[runs[0].name]], runs)
    require_readers({run.name: run.proxy for run in runs}, typed)
    chooser = run_to_choose_by(runs) if settings.best_of_n else None
    if chooser:
        settings.output_max_length = chooser.output_max_length

    def read(trained: Mapping) -> RewardSettings:
        """The proxy that all runs' designs can be composed of."""
        switches = {switch: True for run in runs if run.proxy.is_proxy for switch in run.proxy.switched_on.values()}
        return read_proxy(settings, typed, {**chooser.trained, **switches} if chooser.proxy.is_proxy else trained)

    choices = [read_choice(settings, read, path) for path in settings.best_of_n]
    for choice in choices:
        check_start(choice.samples, runs)
    opened = open_golds(settings, gold_settings)
    output = Path(settings.output_dir)
    folder = output / f"{'+'.join([*settings.model_prefix, *(['best_of_n'] if settings.best_of_n else [])])}_monotonicity"
    folders = [folder, *(output / f"{run.name}_monotonicity" for run in runs)]
    hold(*folders)
    for path in folders:
        clear_folder(path)

    # 2. Scores: of the runs' rollouts, and of samples that a design chooses among. Each model loads at most once, for the first row to score.
    proxies = Proxies(settings.device or None)
    tables = score_proxies(runs, proxies)
    models, dtypes, curves = {}, {}, []

    def judge(gold: LazyGold) -> None:
        models[golds[gold.name]], dtypes[gold.name] = score_gold(gold, runs), gold.dtype

    if chooser:
        found = judge_best_of_n(settings, gold_settings, typed, choices, proxies, opened, judge)
        curves = [curve for curve in found if curve.design in designs]
        if without := set(designs) - {curve.design for curve in curves}:
            print(f"warning: --best_of_n has no curve of {'; '.join(sorted(without))}")
    else:
        for path in golds:
            judge(opened.pop(path))
    scored = []
    for run, design in zip(runs, designs):
        gold = {name: scores[run.name] for name, scores in models.items()}
        gold |= {name: np.array(scores) for name, scores in tabled[run.name].items()}
        scored.append(replace(scored_run(run, tables[run.name], gold), design=design))

    # 3. The answer.
    if len(kinds := {found.kl_of: found.name for found in scored if found.kl_of}) > 1:
        print(f"warning: KL is not alike: {' and '.join(f'that of {name} is of {of}' for of, name in kinds.items())}")
    records = [
        provenance(
            settings={**asdict(settings), **asdict(gold_settings), **typed},
            model=settings.gold_model + ([settings.gold_scores] if settings.gold_scores else []),
            dtype=dtypes,
            template=run.template.name,
            decoding=run.checkpoints[0].meta.get("decoding"),
            seed=run.checkpoints[0].meta.get("seed"),
            policy=run.checkpoints[0].meta.get("model"),
            proxy=asdict(run.proxy),
            warnings=list(run.warnings),
        )
        for run in runs
    ]
    for found, record in zip(scored, records):
        print_run(found)
        write_run(output / f"{found.name}_monotonicity", found, record)
    by_run = {
        name: {run.name: record[name] for run, record in zip(runs, records)} for name in ("template", "decoding", "seed", "policy", "proxy")
    }
    by_run["warnings"] = [line for run in runs for line in run.warnings] + unlike
    if len(set(designs)) > 1 or curves:
        seeds = {design: [found for found in scored if found.design == design] for design in dict.fromkeys(designs)}
        agreed = {design: together(own) for design, own in seeds.items() if len(own) > 1}
        for design, both in agreed.items():
            print_together(both, len(seeds[design]), design)
        compared = compare(scored)
        if curves:
            compared["best_of_n"] = [curve.ends for curve in curves]
        print_comparison(compared)
        write_comparison(folder, scored, compared, agreed, {**records[0], **by_run}, curves)
    elif len(scored) > 1:
        both = together(scored)
        print_together(both, len(scored))
        write_together(folder, scored, both, {**records[0], **by_run})


def judge_designs(settings: MonotonicitySettings, typed: Mapping) -> None:
    """Rank correlation of proxy designs with a leaderboard, on outputs that exist."""
    # 1. Everything a user can get wrong, before any model loads.
    systems = read_systems(without_records(settings.rollouts))
    board = read_leaderboard(settings.gold_scores)
    ranked = ranked_systems(systems, board, settings.gold_scores)
    instructions = shared_instructions(systems)
    proxy = proxy_of_run({}, settings.batch_size, typed)
    require_readers({"--rollouts": proxy}, typed)
    proxy = every_switch_on(proxy) if settings.all_designs else proxy
    proxy.check_reward()
    check_device(settings.device)
    references: list[dict] = [{} for _ in instructions]
    if settings.data_path:
        references = match_rows(settings.data_path, instructions, proxy.dataset_fields, settings.rollouts[0])
    elif proxy.dataset_fields:
        raise InputError("--data_path is missing, expected the rows' qtype and reference")
    template = load_template(settings.chat_template_name or "alpaca")
    folder = Path(settings.output_dir) / "designs"
    hold(folder)
    clear_folder(folder)

    # 2. Scores.
    from tqdm import tqdm

    how = (proxy, template, settings.output_max_length or LENGTH)
    load = partial(Proxies(settings.device or None), *how)
    every = {"every_feature": True} if settings.all_designs else {}
    facts = {**proxy_facts(*how), **every}
    tables = {}
    with tqdm(total=len(systems) * len(instructions), desc="proxy", unit="row") as bar:
        for name, outputs in systems.items():
            batch = reward_batch(instructions, [outputs[text] for text in instructions], references)
            store = ScoreStore(folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.scores.jsonl", facts)
            tables[name] = proxy_columns(load, store, batch, bar.update, **every)
            require_scores(tables[name]["total"], name)

    # 3. The answer.
    if settings.all_designs:
        totals = {
            design: design_totals(load(), switches, list(tables.values())) for design, switches in all_designs(proxy.switched_on).items()
        }
    else:
        totals = {"as set": np.array([table["total"] for table in tables.values()])}
    found = rank_designs(totals, list(systems), board, ranked)
    print(f"\n{describe_designs(found)}")
    means = {name: {design: float(rewards[place].mean()) for design, rewards in totals.items()} for place, name in enumerate(systems)}
    record = provenance(
        settings={**asdict(settings), **typed},
        model=proxy.named or proxy.relevance_model_name,
        dtype="float32",
        template=template.name,
        seed=0,
        proxy=asdict(proxy),
    )
    write_json(folder / "designs.json", {"designs": found, "means": means, "rows": len(instructions), "provenance": record})
    print(folder / "designs.json")


def every_switch_on(proxy: RewardSettings) -> RewardSettings:
    """The design whose features every other one can be composed of. Raises InputError for a reward that is no proxy."""
    if not proxy.is_proxy:
        raise InputError("--all_designs is for the proxy, not for --reward_function or --reward_model_name")
    return replace(proxy, length_incentive=True, **FULL_DESIGN)


def read_proxy(settings: MonotonicitySettings, typed: Mapping, trained: Mapping) -> RewardSettings:
    """The proxy that chooses among samples of a policy with these recorded settings. Raises InputError for one that cannot be used."""
    proxy = proxy_of_run(trained, settings.batch_size, typed)
    require_readers({"--best_of_n": proxy}, typed)
    if settings.every_design:
        every = every_switch_on(proxy)
        proxy = only_of(every, settings.designs) if settings.designs else every if settings.all_designs else proxy
    proxy.check_reward()
    return proxy


def only_of(proxy: RewardSettings, designs: Sequence[str]) -> RewardSettings:
    """The design that these can be composed of, by their names among all designs of `proxy`. Raises InputError for an unknown name."""
    known = all_designs(proxy.switched_on)
    for name in designs:
        if name not in known:
            raise InputError(f"--designs holds {name!r}, expected some of {'; '.join(known)}")
    switches = {switch: any(known[name][switch] for name in designs) for switch in proxy.switched_on.values()}
    if not any(on for switch, on in switches.items() if switch != "reward_branching"):
        switches["length_incentive"] = True  # "1" is composed of any: a reward has a part that is on
    return replace(proxy, **switches, length_target=proxy.length_target if switches["length_incentive"] else 0)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings, gold_settings, typed = parse_settings(
        (MonotonicitySettings, GoldSettings),
        description=__doc__,
        typed_only=RewardSettings,
        otherwise="as the run was trained, or the paper's full design",
    )
    if settings.rollouts:
        gold_settings.check_gold([])
        judge_designs(settings, typed)
    elif not settings.model_prefix:
        choices = [read_choice(settings, partial(read_proxy, settings, typed), path) for path in settings.best_of_n]
        opened = open_golds(settings, gold_settings)
        judge_best_of_n(settings, gold_settings, typed, choices, Proxies(settings.device or None), opened)
    else:
        judge_runs(settings, gold_settings, typed)


if __name__ == "__main__":
    run_main(main)
