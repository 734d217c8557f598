"""The best-of-n command: a proxy chooses among samples, golds judge its choice; tables on the console, a file, a figure for a paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parts.best_of_n import Ranking, divergence, judge_all, rank_all, subset_sizes
from parts.chat_templates import ChatTemplate
from parts.cli import found_path
from parts.comparison import MOVES, last_parts
from parts.designs import all_designs, design_name, design_totals
from parts.errors import InputError
from parts.figures import COLUMN_WIDTH, DESIGN_COLORS, FIGURE_STYLE, LINE_STYLES, BestOfN, draw_fit, draw_line, quieten
from parts.files import atomic_path, clear_folder, write_json, write_json_lines
from parts.gold_settings import GoldSettings, short_names
from parts.locks import hold
from parts.rank_statistics import curve_band, standard_gains, table_text
from parts.rewards import require_scores, reward_batch
from parts.rows import match_rows
from parts.runs import meta_path, provenance, scores_path
from parts.samples import Samples, best_rows, require_same_prompts
from parts.scaling_fits import describe_fit, fit_gains, fitted_line
from parts.scores import Proxies, ScoreStore, gold_columns, proxy_columns, proxy_facts, template_and_length

if TYPE_CHECKING:
    from parts.gold_models import LazyGold

MOST_BANDS = 6  # lines in a figure; the bands of more hide each other


def judge_best_of_n(
    settings,
    gold_settings: GoldSettings,
    typed: Mapping,
    choices: Sequence[Choice],
    proxies: Proxies,
    opened: dict[str, LazyGold],
    also: Callable[[LazyGold], object] = lambda gold: None,
) -> list[BestOfN]:
    """What gold makes of the responses that the proxy chooses among n, for one policy's samples or several.

    Args:
        settings: those of `eval_monotonicity.py`.
        gold_settings: how gold models are loaded.
        typed: the settings of the proxy that the user gave, for the record.
        choices: what `read_choice` says of each file of samples.
        proxies: the rewards of this call.
        opened: the golds by name, before any has loaded its weights; each is taken out for its turn.
        also: called with each gold after its turn, for what else it is to score.

    Returns:
        The curve of each policy and design, to be drawn beside PPO.

    Raises:
        InputError: samples, golds or a proxy that cannot be used.
    """
    # 1. Everything a user can get wrong, before any model loads.
    require_same_prompts([choice.samples for choice in choices])
    golds = dict(zip(settings.gold_model, short_names(settings.gold_model)))
    folders = [Path(settings.output_dir) / f"{choice.samples.name}_best_of_n" for choice in choices]
    hold(*folders)
    for folder in folders:
        clear_folder(folder)

    # 2. Scores.
    totals = [score_choice(choice, proxies) for choice in choices]
    record = provenance(settings={**asdict(settings), **asdict(gold_settings), **typed}, model=settings.gold_model)
    scores, dtypes = score_samples(golds, opened, choices, also) if golds else ([], {})
    if settings.write_best:  # a file that must be new: last, so that what was interrupted can be repeated
        (proxy,) = totals[0].values()
        write_best(settings.write_best, choices[0], proxy, record)

    # 3. The answer.
    curves = []
    for choice, proxies, own in zip(choices, totals, scores):
        samples = choice.samples
        sizes = subset_sizes(samples.count)
        rankings = rank_all(proxies, own, sizes)
        found = judge_all(sizes, rankings, [row.get("qtype") for row in choice.references])
        print(f"\n{samples.name}: {len(samples.rows)} prompts, {samples.count} samples each")
        print_best_of_n(sizes, found)
        more = {"proxy": asdict(choice.proxy), "template": choice.template.name, "dtype": dtypes, "samples": samples.meta}
        write_best_of_n(Path(settings.output_dir) / f"{samples.name}_best_of_n", samples.name, sizes, found, rankings, {**record, **more})
        kl = [divergence(n) for n in sizes]
        curves += [BestOfN(ranking.name, kl, ranking.proxy, ranking.gold, sizes) for ranking in rankings if ranking.name in proxies]
    return curves


# ---------------------------------------------------------------------------------------------------- samples and scores


@dataclass(frozen=True)
class Choice:
    """A file of samples, and the proxy that chooses among them; its `designs`, by name, are settings of switches in place of its own."""

    samples: Samples
    proxy: Any
    references: list[dict]
    template: ChatTemplate
    output_max_length: int
    designs: dict[str, dict[str, bool]]


def read_choice(settings, read_proxy: Callable[[Mapping], Any], path: str) -> Choice:
    """Samples with all that their proxy needs. Raises InputError for samples, rows or a proxy that cannot be used.

    `read_proxy` gives the proxy's settings (`reward_model.RewardSettings`) from the recorded ones of the policy's training.
    """
    samples = Samples(Path(path))
    count, trained = samples.count, samples.policy.trained
    if settings.write_best and int(settings.write_best[0]) > count:
        raise InputError(f"--write_best is {settings.write_best[0]}, expected at most {count}, the samples of a row in {path}")
    proxy = read_proxy(trained)
    designs = all_designs(proxy.switched_on) if settings.every_design else {}
    designs = {name: designs[name] for name in settings.designs or designs}
    recorded = samples.meta.get("data_path") if proxy.reads_besides("qtype", "output") else None
    data_path = settings.data_path or (recorded and found_path(recorded))
    if data_path:
        references = match_rows(data_path, samples.instructions, proxy.dataset_fields, path)
    else:
        references = samples.references(proxy.dataset_fields)
    template, length = template_and_length(settings.chat_template_name, settings.output_max_length, samples.meta, trained)
    return Choice(samples, proxy, references, template, length, designs)


def score_choice(choice: Choice, proxies: Proxies) -> dict[str, np.ndarray]:
    """By design, the proxy of every sample, [rows, samples]. Raises InputError for a lone design that ranks no sample above another."""
    from tqdm import tqdm

    samples, proxy, shape = choice.samples, choice.proxy, (len(choice.samples.rows), choice.samples.count)
    every = {"every_feature": True} if choice.designs else {}
    how = (proxy, choice.template, choice.output_max_length)
    facts = {**proxy_facts(*how), **every}
    references = [row for row in choice.references for _ in range(samples.count)]
    with tqdm(total=len(references), desc="proxy", unit="row") as bar:
        store = ScoreStore(scores_path(samples.path), facts)
        table = proxy_columns(partial(proxies, *how), store, reward_batch(*samples.flat, references), bar.update, **every)
    if choice.designs:
        reward = proxies(*how)
        return {name: design_totals(reward, on, [table]).reshape(shape) for name, on in choice.designs.items()}
    rows = [table["total"][start : start + samples.count] for start in range(0, len(references), samples.count)]
    require_scores([None if None in row else row[0] for row in rows], str(samples.path))
    total = np.array(rows)
    if (total == total[:, :1]).all():
        raise InputError(f"{samples.path}: {design_name(proxy)} is the same for all samples of a row, expected a proxy that can choose")
    return {design_name(proxy): total}


def score_samples(
    golds: Mapping[str, str], opened: dict[str, LazyGold], choices: Sequence[Choice], also: Callable[[LazyGold], object]
) -> tuple[list[dict[str, np.ndarray]], dict[str, str]]:
    """For each file, by gold, [rows, samples] scores; and the dtype of each gold. Each gold is loaded once."""
    from tqdm import tqdm

    scores: list[dict[str, np.ndarray]] = [{} for _ in choices]
    dtypes = {}
    for path, name in golds.items():
        gold = opened.pop(path)  # which ends with its turn: two golds need not fit
        dtypes[path] = gold.dtype
        samples = [choice.samples for choice in choices]
        stores = [ScoreStore(scores_path(one.path), gold.facts) for one in samples]
        with tqdm(total=sum(len(one.rows) * one.count for one in samples), desc=f"gold {Path(path).name}", unit="row") as bar:
            columns = gold_columns(gold, stores, [one.flat for one in samples], bar.update)
        for one, own, column in zip(samples, scores, columns):
            own[name] = np.array(column).reshape(len(one.rows), one.count)
        also(gold)
    return scores, dtypes


def write_best(words: Sequence[str], choice: Choice, proxy: np.ndarray, record: dict) -> None:
    """Rejection sampling: write the best of n responses as rows for `train_sft.py`, with a record of how they were chosen.

    Args:
        words: n and the file.
        choice: the samples.
        proxy: [rows, samples].
        record: the provenance.
    """
    n, file = int(words[0]), words[1]
    rows = best_rows(choice.samples, choice.references, proxy, n)
    empty = len(choice.samples.rows) - len(rows)
    if not rows:
        raise InputError(f"{choice.samples.path}: the best response of every row is empty, expected one to write")
    more = {"n": n, "rows": len(rows), "proxy": asdict(choice.proxy), "template": choice.template.name, "samples": choice.samples.meta}
    write_json(meta_path(file), {**record, **more})
    (write_json_lines if file.endswith(".jsonl") else write_json)(file, rows)
    print(f"{file}: {len(rows)} rows" + (f"; of {empty} more the best response is empty" if empty else ""))


# ----------------------------------------------------------------------------------------------------------- what is said


def print_best_of_n(sizes: Sequence[int], found: Mapping[str, Mapping[str, dict]]) -> None:
    """What `best_of_n.judge_all` found: a table of all prompts and one of each query type, for every gold."""
    for gold, label in last_parts(found).items():
        entries = found[gold]
        which = "gold" if len(found) == 1 else f"gold {label}"
        print(f"\nwhat {which} gains over n = 1 in the response that is ranked first among n (SE: standard error over prompts)")
        print(table_text(gain_table(sizes, entries)))
        for qtype, part in next(iter(entries.values()))["by_qtype"].items():
            print(f"\n{qtype}, {part['rows']} prompts")
            print(table_text(gain_table(sizes, {name: entry["by_qtype"][qtype] for name, entry in entries.items()})))
        print("", *sentences(sizes, entries), sep="\n")
    print("KL from the policy in nats: " + ", ".join(f"{divergence(n):.2f} at n = {n}" for n in sizes))


def gain_table(sizes: Sequence[int], entries: Mapping[str, dict]) -> list[dict[str, str]]:
    """One row a ranking: the columns' names and their texts."""
    rows = []
    for name, entry in entries.items():
        gains = {
            f"n = {n} (SE)": f"{gain:+.2f}" + ("" if error is None else f" ({error:.2f})")
            for n, gain, error in zip(sizes[1:], entry["gain"][1:], entry["standard_error"][1:])
        }
        rho = "undefined" if entry["spearman"] is None else f"{entry['spearman']:.2f}"
        interval = " ({:.2f} to {:.2f})".format(*entry["interval"]) if entry["interval"] else ""
        rows.append({"ranked by": name, **gains, "SpearmanR (interval)": rho + interval, "gold peaks at": f"n = {entry['peak']}"})
    return rows


def sentences(sizes: Sequence[int], entries: Mapping[str, dict]) -> Iterator[str]:
    """One line on each ranking whose gold falls while its proxy rises on, as strong as `MOVES` standard errors allow; then the fits."""
    for name, entry in entries.items():
        fall = entry["fall"]
        rises = entry["proxy"][-1] > entry["proxy"][sizes.index(entry["peak"])]
        if fall and fall["difference"] < 0 and rises:
            size = f"{-fall['difference']:.2f}, SE {fall['standard_error']:.2f}"
            noise = -fall["difference"] < MOVES * fall["standard_error"]
            shown = "that is not told from noise" if noise else "the proxy is over-optimised"
            yield f"{name}: gold peaks at n = {entry['peak']} and is lower by {size} at n = {sizes[-1]}, where the proxy is higher: {shown}"
    for name, entry in entries.items():
        if entry["scaling"].get("better"):
            yield f"{name}: {describe_fit(entry['scaling'])}"


def write_best_of_n(
    folder: Path, name: str, sizes: Sequence[int], found: Mapping[str, Mapping[str, dict]], rankings: Sequence[Ranking], record: dict
) -> None:
    """Write best_of_n.json and best_of_n.png, and print where they are."""
    content = {"name": name, "n": list(sizes), "kl": [divergence(n) for n in sizes], "golds": found, "provenance": record}
    write_json(folder / "best_of_n.json", content)
    draw_best_of_n(folder / "best_of_n.png", name, sizes, rankings, record)
    print(folder / "best_of_n.json", folder / "best_of_n.png", sep="\n")


def draw_best_of_n(target: Path, name: str, sizes: Sequence[int], rankings: Sequence[Ranking], record: dict) -> None:
    """Draw the proxies and the golds against n and against the square root of KL, as a PNG of a paper's full width.

    One line a ranking. Proxies have scales of their own and are shown as `standard_gains`; gold as what it gains over n = 1. Bands are
    `curve_band`'s of these gains, and broken lines `scaling_fits` of the first designs, where these are better than a straight line.

    Args:
        target: the file.
        name: of the policy.
        sizes: the values of n.
        rankings: the designs, and the golds by themselves. Where two designs choose alike, the later one's line hides the other.
        record: goes into the PNG's metadata, as JSON under "Description".
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    golds = last_parts(rankings[0].gold)
    rows = [("proxy gain over n = 1 (standard deviations)", [standard_gains(ranking.proxy) for ranking in rankings])]
    for gold, label in golds.items():
        title = "gold gain over n = 1" + ("" if len(golds) == 1 else f", {label}")
        rows.append((title, [ranking.gold[gold] - ranking.gold[gold][0] for ranking in rankings]))
    kl = [divergence(n) for n in sizes]
    roots = np.sqrt(kl)
    with pyplot.rc_context(FIGURE_STYLE):
        size = (2 * COLUMN_WIDTH, 0.5 + 0.07 * len(rankings) + 1.5 * len(rows))
        figure, grid = pyplot.subplots(len(rows), 2, figsize=size, sharex="col", sharey="row", squeeze=False, layout="constrained")
        for panels, (title, tables) in zip(grid, rows):
            panels[0].set_title(title, loc="left", fontsize=7)
            for panel, positions in zip(panels, (sizes, roots)):
                for place, (scores, ranking) in enumerate(zip(tables, rankings)):
                    if scores is not None:
                        band = curve_band(scores) if len(rankings) <= MOST_BANDS and scores.shape[1] > 1 else None
                        turn, color = divmod(place, len(DESIGN_COLORS))
                        line = LINE_STYLES[turn % len(LINE_STYLES)]
                        draw_line(panel, positions, scores.mean(axis=1), band, line, DESIGN_COLORS[color], ranking.name)
                quieten(panel)
        grid[-1, 1].set_xlabel("square root of KL (nats)")
        for panel, (_, tables) in zip(grid[1:, 1], rows[1:]):
            for gains, color in zip(tables, DESIGN_COLORS):
                line = fitted_line(fit_gains("best-of-n", kl, gains), kl)
                if line is not None:
                    draw_fit(panel, line, color)
                    grid[-1, 1].set_xlabel("square root of KL (nats); broken: fit d (α − β d)")
        grid[-1, 0].set_xscale("log", base=2)
        grid[-1, 0].set_xticks(sizes, [str(n) for n in sizes])
        grid[-1, 0].set_xlabel("n")
        figure.suptitle(f"best of n samples of {name}, {rankings[0].proxy.shape[1]} prompts", fontsize=8)
        figure.legend(*grid[-1, 0].get_legend_handles_labels(), loc="outside lower left", frameon=False, ncols=2)
        with atomic_path(target) as temporary:
            figure.savefig(temporary, dpi=300, metadata={"Description": json.dumps(record)})
        pyplot.close(figure)
