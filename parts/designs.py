"""Proxy designs on outputs that exist already: which of the on/off settings ranks systems as a leaderboard does?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from parts.errors import InputError
from parts.rank_statistics import bootstrap_interval, kendall, permutation_pvalue, spearman, table_text
from parts.rows import read_rows


def read_systems(paths: Sequence[str]) -> dict[str, dict[str, str]]:
    """Outputs of systems: {system: {instruction: output}}; a system is its rows' `generator`, or the file's name where they have none.

    Of an instruction that comes twice the last output counts, which is said.

    Raises:
        InputError: an unusable file, rows of several generators, or a system twice.
    """
    systems = {}
    for path in paths:
        rows = read_rows(path, {"instruction": None, "output": None})
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("generator"), str | int | None):
                raise InputError(f"{path}: row {number}: field 'generator' is {type(row['generator']).__name__}, expected a name")
        generators = list(dict.fromkeys(row.get("generator") for row in rows))
        if len(generators) > 1:
            raise InputError(f"{path}: rows of the generators {', '.join(map(repr, generators[:3]))}, expected one system a file")
        name = str(generators[0] or re.sub(r"\.jsonl?(\.gz)?$", "", Path(path).name))
        if name in systems:
            raise InputError(f"{path}: system {name!r} comes twice, expected one file for each")
        systems[name] = {row["instruction"]: row["output"] for row in rows}
        if twice := len({(row["instruction"], row["output"]) for row in rows}) - len(systems[name]):
            print(f"{path}: {twice} instructions come again with another output: the last one counts")
    return systems


def ranked_systems(systems: Mapping[str, object], board: Mapping[str, Mapping[str, float]], path: str) -> dict[str, list[str]]:
    """The systems that each column of a leaderboard has a score for, of the columns with at least three.

    Args:
        systems: by name.
        board: {column: {system: score}}.
        path: the file of the leaderboard, for the messages.

    Raises:
        InputError: a system that no column has, or no column with three of the systems.
    """
    for name in systems:
        if not any(name in scores for scores in board.values()):
            raise InputError(f"{path}: no score for the system {name!r}")
    ranked = {column: [name for name in systems if name in scores] for column, scores in board.items()}
    if few := [column for column, names in ranked.items() if 0 < len(names) < 3]:
        print(f"{path}: left out, with fewer than 3 of the systems: {', '.join(few)}")
    ranked = {column: names for column, names in ranked.items() if len(names) >= 3}
    if "design" in ranked:
        raise InputError(f"{path}: a column is called 'design', as the designs' own, expected another name")
    if not ranked:
        raise InputError(f"{path}: fewer than 3 of the systems in every column, expected at least 3 for a correlation")
    return ranked


def shared_instructions(systems: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The instructions that every system answered, in the order of the first. Raises InputError for fewer than two."""
    instructions = [text for text in next(iter(systems.values())) if all(text in outputs for outputs in systems.values())]
    if len(instructions) < 2:
        raise InputError(f"--rollouts: {len(instructions)} instructions that all {len(systems)} files have, expected at least 2")
    most = max(map(len, systems.values()))
    if len(instructions) < most:
        print(f"{len(instructions)} of {most} instructions are in every file, and count")
    return instructions


def design_name(settings) -> str:
    """A design in symbols, as `all_designs` writes them: "LI * RP * relevance, branching".

    A user's function or a learned reward model has no symbols, and is named.
    """
    if named := getattr(settings, "named", ""):
        return named
    parts = " * ".join(symbol for symbol in settings.switched_on if symbol != "branching")
    return (parts or "1") + (", branching" if settings.reward_branching else "")


def reward_in_words(settings) -> str:
    """All that makes one reward differ from another."""
    return settings.named or settings.design


def name_designs(runs: Sequence) -> list[str]:
    """The design of each run: in symbols, or in words where two designs would share their symbols (other encoders, for example)."""
    symbols, in_words = [run.design for run in runs], [run.design_in_words for run in runs]
    return symbols if len(set(symbols)) == len(set(in_words)) else in_words


def all_designs(switches: Mapping[str, str]) -> dict[str, dict[str, bool]]:
    """Every on/off setting of switches, by name: "LI * RP * relevance, branching" and so on; sixteen of the paper's four.

    Args:
        switches: symbol to switch, as `ProxySettings.switched_on` gives them.
    """
    designs = {}
    for values in itertools.product((True, False), repeat=len(switches)):
        on = [symbol for symbol, value in zip(switches, values) if value]
        parts = " * ".join(symbol for symbol in on if symbol != "branching") or "1"
        designs[parts + (", branching" if "branching" in on else "")] = dict(zip(switches.values(), values))
    return designs


def design_totals(reward, design: Mapping[str, bool], tables: Sequence[Mapping[str, list]]) -> np.ndarray:
    """[systems, rows] rewards under a design, from components that `score(..., every_feature=True)` of the full design gave."""
    variant = reward.variant(**design)
    return np.array([[variant.compose(dict(zip(table, row))) for row in zip(*table.values())] for table in tables])


def rank_designs(
    totals: Mapping[str, np.ndarray],
    systems: Sequence[str],
    board: Mapping[str, Mapping[str, float]],
    ranked: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, dict]]:
    """{design: {column: what `rank_correlation` says}}.

    Args:
        totals: design to [systems, rows] rewards.
        systems: their names, in the order of the rewards.
        board: {column: {system: score}}.
        ranked: column to the systems that count in it.
    """
    places = {name: place for place, name in enumerate(systems)}
    return {
        design: {
            column: rank_correlation(rewards[[places[name] for name in names]], [board[column][name] for name in names])
            for column, names in ranked.items()
        }
        for design, rewards in totals.items()
    }


def describe_designs(found: Mapping[str, Mapping[str, dict]]) -> str:
    """A table of SpearmanR, a row a design and a column a gold; then one line on the best design of each gold.

    The p and the interval of that line are the design's own: they do not allow for its having been chosen.
    """
    lines = [table_text([{"design": name, **{column: entry["spearman"] for column, entry in row.items()}} for name, row in found.items()])]
    for column in next(iter(found.values())):
        defined = {design: row[column] for design, row in found.items() if row[column]["spearman"] is not None}
        if defined:
            best = min(defined, key=lambda design: (-defined[design]["spearman"], len(design)))  # of equals the simplest
            entry = defined[best]
            interval = "" if entry["interval"] is None else ", 95% interval over prompts {:.3f} to {:.3f}".format(*entry["interval"])
            chosen = f", without allowance for the choice among {len(defined)} designs" if len(defined) > 1 else ""
            lines.append(f"{column}: SpearmanR {entry['spearman']:.3f} for {best}, n = {entry['systems']} systems, permutation p "
                         f"{entry['exact_pvalue']:.4g}{interval}{chosen}")  # fmt: skip
    return "\n".join(lines)


def rank_correlation(totals: np.ndarray, scores: Sequence[float]) -> dict:
    """What is said of [systems, rows] rewards beside [systems] gold scores: correlations of the systems' means, a p, an interval over prompts."""
    means = totals.mean(axis=1)
    return {
        "systems": len(means),
        "spearman": spearman(means, scores),
        "kendall": kendall(means, scores),
        "exact_pvalue": permutation_pvalue(means, scores),
        "interval": bootstrap_interval(totals, np.array(scores)[:, None]),
    }
