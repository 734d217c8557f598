"""Scores kept row by row beside the rollouts they belong to, so that nothing is scored twice and an interruption loses one batch.

`<rollouts>.scores.jsonl` is written line by line: a line of facts for each scorer (a gold model with its weights' digest and settings, a
proxy with its settings and code), then one line a row: {"scorer", "text", "row", "score" or the proxy's components}. A row's score is found again
by its scorer and its text; whatever changes in either is scored anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from records import InputError, provenance, read_text


def digest(content: object) -> str:
    """A short name of anything that JSON can say: the first 16 hexadecimal digits of its SHA-256."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ScoreStore:
    """One scorer's scores in a file that several scorers may share.

    Args:
        path: the file; it is made with the first score. A last line that an interruption cut short is dropped.
        facts: all that a score depends on besides the row's own texts.

    Raises:
        InputError: a line of the file is not what this class writes.
    """

    def __init__(self, path: str | Path, facts: Mapping) -> None:
        self.path = Path(path)
        self.facts = dict(facts)
        self.scorer = digest(self.facts)
        self.found: dict[str, dict] = {}
        self.introduced = False
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        text = read_text(self.path)
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.split("\n")[:-1], start=1):
            try:
                row = json.loads(line)
                if row["scorer"] == self.scorer:
                    self.introduced |= "facts" in row
                    if "text" in row:
                        self.found[row["text"]] = row["score"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.path}: line {number} is no score, expected what eval_monotonicity.py writes; delete it") from None

    def add(self, rows: Sequence[tuple[int, str, object]]) -> None:
        """Append (row from 1, name of its texts, score) and remember them."""
        lines = [] if self.introduced else [{"scorer": self.scorer, "facts": self.facts, "provenance": provenance()}]
        lines += [{"scorer": self.scorer, "text": text, "row": row, "score": score} for row, text, score in rows]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        self.introduced = True
        self.found |= {text: score for _, text, score in rows}


def scores_path(rollouts: str | Path) -> Path:
    """Where the scores of a file of rollouts are."""
    return Path(rollouts).with_suffix(".scores.jsonl")


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
