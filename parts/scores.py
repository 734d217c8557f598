"""Scores of rollouts: kept row by row beside them, so that nothing is scored twice; or means read from a table.

`<rollouts>.scores.jsonl` is written line by line: a line of facts for each scorer (a gold model with its weights' digest and settings, a
proxy with its settings and code), then one line a row: {"scorer", "text", "row", "score" or the proxy's components}. A row's score is found again
by its scorer and its text; whatever changes in either is scored again. An interruption loses at most one batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from parts.chat_templates import TOKENIZER_OWN, ChatTemplate, load_template
from parts.errors import InputError
from parts.files import JsonLines, digest, read_csv
from parts.models import load_tokenizer, model_identity
from parts.rows import read_rows, say_once
from parts.runs import provenance

ROWS_PER_SAVE = 128  # rows of a proxy's batch
LENGTH = 512  # of a response in tokens, where no record says the longest


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
    store: ScoreStore | _Together,
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


class Proxies:
    """The rewards of a call, each made once; those with the same encoder share it.

    Args:
        device: where their models run; None is the best there is.
    """

    def __init__(self, device: str | None) -> None:
        self.device = device
        self._made: dict[str, object] = {}
        self._encoders: dict[tuple, object] = {}

    def __call__(self, proxy, template: ChatTemplate, output_max_length: int):
        """The reward of these settings (`reward_model.RewardSettings`)."""
        name = digest(proxy_facts(proxy, template, output_max_length))
        if name not in self._made:
            reward = self._made[name] = proxy.load_reward(template, output_max_length, self.device, lazy=True)
            if getattr(reward, "relevance_model", None) is not None:
                same = (model_identity(proxy.relevance_model_name), proxy.reward_model_batch_size, proxy.embedding_cache)
                reward.relevance_model = self._encoders.setdefault(same, reward.relevance_model)
        return self._made[name]


def proxy_columns(
    load: Callable[[], Any],
    store: ScoreStore,
    batch: Mapping[str, list],
    progress: Callable[[int], object],
    **options: bool,
) -> dict[str, list]:
    """A reward's components of every row, "total" among them, those of the store read and the others made and kept.

    `load` gives the reward, and is called where there is a row to score.
    """
    texts = [dict(zip(batch, row)) for row in zip(*batch.values())]

    def score(places: list[int]) -> Iterator[tuple[list[int], list]]:
        reward = load()
        for start in range(0, len(places), ROWS_PER_SAVE):
            some = places[start : start + ROWS_PER_SAVE]
            table = reward.score({name: [column[place] for place in some] for name, column in batch.items()}, **options)
            yield some, [dict(zip(table, row)) for row in zip(*table.values())]

    rows = score_rows(store, texts, score, progress)
    for row in rows:
        if row.keys() != rows[0].keys():
            raise InputError(f"reward: columns {', '.join(row)} of some rows and {', '.join(rows[0])} of others, expected the same of all")
    return {name: [row[name] for row in rows] for name in rows[0]}


class _Together:
    """Several files' stores of one scorer as the store of their rows one after another; `names` are those of each file's texts.

    Equal rows are scored once for all files, and kept in each.
    """

    def __init__(self, stores: Sequence[ScoreStore], names: Sequence[Sequence[str]]) -> None:
        self.found = {name: score for store in stores for name, score in store.found.items()}
        self.missing: dict[str, dict[ScoreStore, int]] = {}  # by text, the files that lack its score, and its first row there
        for store, own in zip(stores, names):
            for row, name in enumerate(own, start=1):
                if name not in store.found:
                    self.missing.setdefault(name, {}).setdefault(store, row)
        self._keep([name for name in self.missing if name in self.found])

    def add(self, rows: Sequence[tuple[int, str, object]]) -> None:
        self.found |= {text: score for _, text, score in rows}
        self._keep([text for _, text, _ in rows])

    def _keep(self, texts: Sequence[str]) -> None:
        lines: dict[ScoreStore, list[tuple[int, str, object]]] = {}
        for text in texts:
            for store, row in self.missing.pop(text).items():
                lines.setdefault(store, []).append((row, text, self.found[text]))
        for store, own in lines.items():
            store.add(sorted(own, key=lambda line: line[0]))


def gold_columns(
    gold, stores: Sequence[ScoreStore], files: Sequence[tuple[Sequence[str], Sequence[str]]], progress: Callable[[int], object]
) -> list[list[float]]:
    """A gold model's score of every row of several files, those of their stores read and the others made and kept.

    The model is called once for all files, since it reads rows of one prompt together.

    Args:
        files: the instructions and the outputs of each.
    """
    texts = [[{"query": query, "response": response} for query, response in zip(*columns)] for columns in files]
    rows = [row for own in texts for row in own]

    def score(places: list[int]) -> Iterator[tuple[list[int], list[float]]]:
        some = {name: [rows[place][name] for place in places] for name in ("query", "response")}
        for batch, values in gold.iter_rewards(some):
            yield [places[row] for row in batch], values

    scores = iter(score_rows(_Together(stores, [list(map(digest, own)) for own in texts]), rows, score, progress))
    return [list(islice(scores, len(own))) for own in texts]


def load_template_of(name: str, tokenizer_name: str) -> ChatTemplate:
    """As `chat_templates.load_template`, with the tokenizer by its name, which is loaded where the template is its own."""
    return load_template(name, load_tokenizer(tokenizer_name) if name == TOKENIZER_OWN and tokenizer_name else None)


def template_and_length(name: str, length: int, meta: Mapping, trained: Mapping) -> tuple[ChatTemplate, int]:
    """The template whose stop strings end responses, and their longest length in tokens, as the reward takes them.

    What is given comes first, then what the responses' own record says, the policy's training, and alpaca with 512 tokens.

    Args:
        name, length: of the template, and in tokens; empty and 0 where they are not given.
        meta: of the file of responses.
        trained: the settings of the policy's training.
    """
    name = name or meta.get("template") or trained.get("chat_template_name") or "alpaca"
    template = load_template_of(name, trained.get("tokenizer_name") or meta.get("model") or trained.get("model_name", ""))
    recorded = trained.get("output_max_length", LENGTH)
    if not isinstance(recorded, int) or recorded < 1:
        raise InputError(f"the run's record: 'output_max_length' is {recorded!r}, expected a whole number, at least 1")
    return template, length or recorded


def proxy_facts(proxy, template: ChatTemplate, output_max_length: int) -> dict:
    """All that a proxy's score depends on besides the row, for the store: models by what is in them, a user's function by its code."""
    settings = {name: value for name, value in asdict(proxy).items() if name not in ("reward_model_batch_size", "embedding_cache")}
    settings["relevance_model_name"] = model_identity(settings["relevance_model_name"])
    settings["reward_model_name"] = [model_identity(name) for name in settings["reward_model_name"]]
    if settings.get("reward_function"):
        settings["reward_function"] = [Path(function).name for function in settings["reward_function"]]
    return {"proxy": settings, "source": proxy.reward_source(), "template": digest(asdict(template)), "max_length": output_max_length}


# ------------------------------------------------------------------------------------------------------------ gold tables

_MISSING = {"", "-", "--", "\u2013", "\u2014", "nan", "na", "n/a", "none", "null"}  # in small letters: cells without a score
_NUMBER = re.compile(r"(?P<number>[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:e[-+]?\d+)?)\s*(?P<percent>%?)", re.IGNORECASE)


def read_table(path: str) -> list[dict]:
    """The rows of a CSV file, or of a JSON or JSONL list. Raises InputError where it cannot be read or has no rows."""
    rows = read_csv(path) if path.lower().removesuffix(".gz").endswith((".csv", ".tsv")) else read_rows(path, {})
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number}: expected an object, found {type(row).__name__}")
    return rows


def read_columns(path: str, rows: Sequence[Mapping], names: Sequence[str], but: Sequence[str]) -> dict[str, dict[str, float]]:
    """The columns of numbers of a table: {column: {row's name: number}}; what is left out is printed.

    "40%" is 40, "1,200" is 1200. Empty cells, dashes and NaN are no number. A column without any number is none of these.

    Raises:
        InputError: a cell that is none of these in a column that has numbers, or percent signs in some of its cells only.
    """
    columns: dict[str, dict[str, float]] = {}
    texts, missing = [], []
    for column in dict.fromkeys(name for row in rows for name in row if name not in but):
        cells = {name: row.get(column) for name, row in zip(names, rows)}
        given = {name: cell for name, cell in cells.items() if not _is_missing(cell)}
        numbers = {name: _number(cell) for name, cell in given.items()}
        if all(number is None for number in numbers.values()):
            texts.append(column)
            if comma := next((str(cell) for cell in given.values() if re.fullmatch(r"[-+]?\d+,\d+\s*%?", str(cell).strip())), None):
                raise InputError(f"{path}: column '{column}' is {comma!r}, expected a point before decimals")
            continue
        for row, name in enumerate(names, start=1):
            if name in numbers and numbers[name] is None:
                raise InputError(f"{path}: row {row}: field '{column}' is {given[name]!r}, expected a number")
        percents = [str(cell).strip().endswith("%") for cell in given.values()]
        if any(percents) and not all(percents):
            raise InputError(
                f"{path}: column '{column}' has percent signs in {sum(percents)} of {len(percents)} cells, expected all or none"
            )
        missing += [f"{column} of {name}" for name in cells if name not in given]
        columns[column] = numbers
    left_out = ([f"columns without numbers: {', '.join(map(repr, texts))}"] if texts else []) + (
        [f"no score: {', '.join(missing)}"] if missing else []
    )
    if left_out and columns:
        say_once(f"{path}: left out: {'; '.join(left_out)}")
    return columns


def read_leaderboard(path: str) -> dict[str, dict[str, float]]:
    """Gold scores of systems: {column: {system: score}}, from a table with a column of their names: `generator`, `name`, `model`, or the first.

    A column that counts the rows, as pandas writes it, is left out. Cells are read as by `read_columns`.

    Raises:
        InputError: no rows, a system twice, a cell that is no number, or no column of numbers.
    """
    rows = read_table(path)
    counted = [
        name for name in rows[0] if [str(row.get(name)) for row in rows] in ([str(n + first) for n in range(len(rows))] for first in (0, 1))
    ]
    index = [name for name in counted if name in ("", "Unnamed: 0", "index")]
    named = [name for name in rows[0] if name not in index]
    key = next((name for name in ("generator", "name", "model") if name in named), next(iter(named), ""))
    names = [str(row.get(key)) for row in rows]
    for number, name in enumerate(names, start=1):
        if names.index(name) != number - 1:
            raise InputError(f"{path}: row {number}: {key} {name!r} comes twice")
    columns = read_columns(path, rows, names, [key, *index])
    if not columns:
        raise InputError(f"{path}: no column of numbers, expected one with the systems' scores")
    return columns


def read_gold_scores(
    path: str, steps: Sequence[int], run: str = "", is_lone: bool = True, responses: int = 0
) -> dict[str, list[list[float]]]:
    """Gold scores by column, from a CSV or JSON table; a column without numbers is no gold.

    With a column `row` they are of single responses, numbered from 1 as the rollouts' rows are, else means of a checkpoint.

    Args:
        steps: of the checkpoints.
        run: whose rows count, where the table has a column `run`.
        is_lone: whether a table without one will do.
        responses: of each checkpoint.

    Returns:
        [steps, responses], or [steps, 1] of means.

    Raises:
        InputError: no column of numbers besides `step`, a missing or repeated step or row, a cell without a finite number, or several runs
            and no column that tells them apart.
    """
    rows = read_table(path)
    named = ["" if row.get("run") is None else str(row["run"]).strip() for row in rows]
    tells_runs = run in named if is_lone else any(named)  # a lone run's table may have a label of that name
    if any(named) and not tells_runs:
        say_once(f"{path}: no row of run {run!r}; taken for it are those of {', '.join(dict.fromkeys(map(repr, named)))}")
    if not (tells_runs or is_lone):
        raise InputError(f"{path}: no column 'run', expected one with the names of --model_prefix where there are several")
    by_row = any("row" in row for row in rows)
    found: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        place = []
        for field in ("step", "row") if by_row else ("step",):
            value = _number(row.get(field))
            if value is None:
                raise InputError(f"{path}: row {number}: field '{field}' is {row.get(field)!r}, expected a number")
            if not value.is_integer():
                raise InputError(f"{path}: row {number}: field '{field}' is {row[field]!r}, expected a whole number")
            place.append(f"{field} {int(value)}")
        if tells_runs and named[number - 1] != run:
            place.insert(0, named[number - 1])
        if (name := ", ".join(place)) in found:
            raise InputError(f"{path}: row {number}: {name} comes twice")
        found[name] = number
    columns = read_columns(path, rows, list(found), ["", "step", "row", "run"])
    if not columns:
        raise InputError(f"{path}: no column of numbers besides 'step', expected one for each gold")
    wanted = [[f"step {step}, row {row}" for row in range(1, responses + 1)] if by_row else [f"step {step}"] for step in steps]
    for name in (name for names in wanted for name in names):
        if name not in found:
            raise InputError(f"{path}: no row for {name}{f' of run {run!r}' if tells_runs else ''}")
        for gold, scores in columns.items():
            if name not in scores:
                cell = rows[found[name] - 1].get(gold)
                raise InputError(f"{path}: row {found[name]}: field '{gold}' is {cell!r}, expected a number")
    beyond = next((name for name in found if by_row and name.startswith(f"step {steps[0]}, ") and name not in wanted[0]), None)
    if beyond:
        raise InputError(f"{path}: row {found[beyond]}: {beyond}, expected the rollouts' {responses} rows alone")
    return {gold: [[scores[name] for name in names] for names in wanted] for gold, scores in columns.items()}


def _is_missing(cell: object) -> bool:
    return cell is None or cell != cell or str(cell).strip().lower() in _MISSING


def _number(cell: object) -> float | None:
    """The finite number of a table's cell; None where it is none. "10,5", which may be 10.5 or misplaced thousands, is none."""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    match = _NUMBER.fullmatch(str(cell).strip())
    try:
        number = float(match["number"].replace(",", "")) if match else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
