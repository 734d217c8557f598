"""Scores of rollouts: kept row by row beside them, so that nothing is scored twice; or means read from a table.

`<rollouts>.scores.jsonl` is written line by line: a line of facts for each scorer (a gold model with its weights' digest and settings, a
proxy with its settings and code), then one line a row: {"scorer", "text", "row", "score" or the proxy's components}. A row's score is found again
by its scorer and its text; whatever changes in either is scored again. An interruption loses at most one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from parts.chat_templates import ChatTemplate
from parts.errors import InputError
from parts.files import JsonLines, digest, read_csv
from parts.models import model_identity
from parts.rows import read_rows, require_finite
from parts.runs import provenance

ROWS_PER_SAVE = 128  # rows of a proxy's batch


class ScoreStore:
    """One scorer's scores in a file that several scorers may share.

    Args:
        path: the file; it is made with the first score.
        facts: all that a score depends on besides the row's own texts.

    Raises:
        InputError: a line of the file is not what this class writes.
    """

    def __init__(self, path: str | Path, facts: Mapping) -> None:
        self.log = JsonLines(path)
        self.facts = dict(facts)
        self.scorer = digest(self.facts)
        self.found: dict[str, dict] = {}
        self.introduced = False
        for number, row in enumerate(self.log.read(), start=1):
            try:
                if row["scorer"] == self.scorer:
                    self.introduced |= "facts" in row
                    if "text" in row:
                        self.found[row["text"]] = row["score"]
            except (KeyError, TypeError):
                raise InputError(f"{path}: line {number} is no score, expected what eval_monotonicity.py writes; delete it") from None

    def add(self, rows: Sequence[tuple[int, str, object]]) -> None:
        """Append (row from 1, name of its texts, score) and remember them."""
        lines = [] if self.introduced else [{"scorer": self.scorer, "facts": self.facts, "provenance": provenance()}]
        lines += [{"scorer": self.scorer, "text": text, "row": row, "score": score} for row, text, score in rows]
        self.log.append(*lines)
        self.introduced = True
        self.found |= {text: score for _, text, score in rows}


def score_rows(
    store: ScoreStore,
    texts: Sequence[Mapping],
    score: Callable[[list[int]], Iterator[tuple[list[int], list]]],
    progress: Callable[[int], object],
) -> list:
    """The scores of all rows, in order: those of the store, and the others made now and kept batch by batch.

    Args:
        store: where they are kept.
        texts: what each row's score reads of the row.
        score: called with the places (from 0) of the rows to score; yields batches of places and their scores.
        progress: called with a number of rows as they are done.
    """
    names = [digest(row) for row in texts]
    wanted = {}  # equal rows are scored once
    for place, name in enumerate(names):
        if name not in store.found:
            wanted.setdefault(name, place)
    progress(len(names) - len(wanted))
    if wanted:
        for places, values in score(sorted(wanted.values())):
            store.add([(place + 1, names[place], value) for place, value in zip(places, values)])
            progress(len(places))
    return [store.found[name] for name in names]


def proxy_columns(
    reward,
    store: ScoreStore,
    batch: Mapping[str, list],
    progress: Callable[[int], object],
    **options: bool,
) -> dict[str, list]:
    """A reward's components of every row, "total" among them, those of the store read and the others made and kept."""
    texts = [dict(zip(batch, row)) for row in zip(*batch.values())]

    def score(places: list[int]) -> Iterator[tuple[list[int], list]]:
        for start in range(0, len(places), ROWS_PER_SAVE):
            some = places[start : start + ROWS_PER_SAVE]
            table = reward.score({name: [column[place] for place in some] for name, column in batch.items()}, **options)
            yield some, [dict(zip(table, row)) for row in zip(*table.values())]

    rows = score_rows(store, texts, score, progress)
    return {name: [row[name] for row in rows] for name in rows[0]}


def proxy_facts(proxy, template: ChatTemplate, output_max_length: int) -> dict:
    """All that a proxy's score depends on besides the row, for the store: models by what is in them, a user's function by its code."""
    settings = {name: value for name, value in asdict(proxy).items() if name not in ("reward_model_batch_size", "embedding_cache")}
    settings |= {name: model_identity(settings[name]) for name in ("relevance_model_name", "reward_model_name") if settings.get(name)}
    if settings.get("reward_function"):
        settings["reward_function"] = Path(settings["reward_function"]).name
    return {"proxy": settings, "source": proxy.reward_source(), "template": digest(asdict(template)), "max_length": output_max_length}


# ------------------------------------------------------------------------------------------------------------ gold tables


def read_table(path: str) -> list[dict]:
    """The rows of a CSV file, or of a JSON or JSONL list. Raises InputError where it cannot be read or has no rows."""
    return read_csv(path) if path.endswith(".csv") else read_rows(path, {})


def read_leaderboard(path: str) -> dict[str, dict[str, float]]:
    """Gold scores of systems: {column: {system: score}}, from a table whose first column, or `generator`, names the system.

    Columns with anything but numbers in them are left out; so are empty cells.

    Raises:
        InputError: no rows, a system twice, or no column of numbers.
    """
    rows = read_table(path)
    key = "generator" if "generator" in rows[0] else next(iter(rows[0]))
    names = [str(row.get(key)) for row in rows]
    for number, name in enumerate(names, start=1):
        if names.index(name) != number - 1:
            raise InputError(f"{path}: row {number}: {key} {name!r} comes twice")
    columns = {}
    for column in rows[0]:
        cells = {name: row.get(column) for name, row in zip(names, rows) if row.get(column) not in (None, "")}
        try:
            scores = {name: float(cell) for name, cell in cells.items()}
        except (TypeError, ValueError):
            continue
        if column != key and scores and all(map(math.isfinite, scores.values())):
            columns[column] = scores
    if not columns:
        raise InputError(f"{path}: no column of numbers, expected one with the systems' scores")
    return columns


def read_gold_scores(path: str, steps: Sequence[int]) -> dict[str, dict[int, float]]:
    """Mean gold scores by column and step, from a CSV or JSON table; a column that is not all numbers is no gold.

    Raises:
        InputError: no column of numbers besides `step`, a missing or repeated step, or a value that is not finite.
    """
    rows = read_table(path)
    golds = [name for name in rows[0] if name and name != "step" and _number(rows[0][name]) is not None]
    if not golds:
        raise InputError(f"{path}: row 1: no column of numbers besides 'step', expected one for each gold")
    scores: dict[int, dict[str, float]] = {}
    for number, row in enumerate(rows, start=1):
        for field in ("step", *golds):
            if _number(row.get(field)) is None:
                raise InputError(f"{path}: row {number}: field '{field}' is {row.get(field)!r}, expected a number")
        step = _number(row["step"])
        if not step.is_integer():
            raise InputError(f"{path}: row {number}: field 'step' is {row['step']!r}, expected a whole number")
        if int(step) in scores:
            raise InputError(f"{path}: row {number}: step {row['step']} comes twice")
        scores[int(step)] = {gold: _number(row[gold]) for gold in golds}
    for step in steps:
        if step not in scores:
            raise InputError(f"{path}: no row for step {step}")
    return {gold: dict(zip(steps, require_finite([scores[step][gold] for step in steps], f"{path}, {gold}"))) for gold in golds}


def _number(cell: object) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
