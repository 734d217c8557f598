"""Data files checked before anything is trained on them: everything that is wrong, in one pass, and what the rows look like.

Errors are what a script refuses. Warnings are what it accepts and its user may not want: prompts that come twice, prompts that are
evaluated on, empty outputs, text that an earlier conversion spoilt. `data/validate.py` prints both. A file is never held in memory: what
is kept of a row is a digest of its prompt and its number, 12 bytes in all.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from parts.errors import InputError
from parts.rows import QTYPES, Problem, iterate_rows, lone_surrogate, read_rows, row_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from parts.chat_templates import ChatTemplate

QUANTILES = {"min": 0.0, "5%": 0.05, "50%": 0.5, "95%": 0.95, "max": 1.0}
_BIG = 2**24  # bytes from which reading shows its progress
# What a wrong decoding leaves behind. UTF-8 read as Latin-1 or Windows-1252 turns the lead bytes C2, C3, E2, EF and F0 into the letters here.
_SUSPECTS = re.compile("[\ufffd\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|[ÂÃ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€|ï»¿|ðŸ")


# ---------------------------------------------------------------------------------------------------------------- prompts


class PromptIndex:
    """Which prompts a file holds, and in which rows.

    Prompts are the same when they are equal after white space is collapsed and case folded. They are compared by 64-bit digests: that any
    two different ones among ten million meet has a chance of 3 in a million.
    """

    def __init__(self) -> None:
        self._digests, self._rows = array("Q"), array("I")

    def add(self, number: int, prompt: str) -> None:
        normal = " ".join(prompt.split()).casefold().encode("utf-8", "surrogatepass")
        self._digests.frombytes(hashlib.blake2b(normal, digest_size=8).digest())
        self._rows.append(number)

    def repeated(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows whose prompt an earlier row holds, in file order, and the first row that holds it."""
        digests, rows = np.asarray(self._digests), np.asarray(self._rows)
        order = np.argsort(digests, kind="stable")
        digests = digests[order]
        is_first = np.ones(len(digests), dtype=bool)
        is_first[1:] = digests[1:] != digests[:-1]
        del digests
        firsts, again = np.flatnonzero(is_first), np.flatnonzero(~is_first)
        originals = order[firsts[np.searchsorted(firsts, again, side="right") - 1]]
        by_row = np.argsort(order[again])
        return rows[order[again][by_row]], rows[originals[by_row]]

    def held_by(self, other: PromptIndex) -> tuple[np.ndarray, np.ndarray]:
        """The rows whose prompt `other` holds too, in file order, and other's first row with it."""
        digests, theirs = np.asarray(self._digests), np.asarray(other._digests)
        order = np.argsort(theirs, kind="stable")
        theirs = theirs[order]
        places = np.searchsorted(theirs, digests)
        places[places == len(theirs)] = 0
        shared = np.flatnonzero(theirs[places] == digests) if len(theirs) else places[:0]
        return np.asarray(self._rows)[shared], np.asarray(other._rows)[order[places[shared]]]


def index_prompts(path: str | Path) -> PromptIndex:
    """The prompts of a file of training or evaluation rows. Raises InputError for the first row that has none."""
    index, prompt_field = PromptIndex(), None
    for number, row in _rows_with_bar(path):
        prompt_field = prompt_field or prompt_field_of(row)
        found = [row] if isinstance(row, Problem) else row_problems(row, {prompt_field: None}, number)
        for problem in found:
            if not problem.is_warning:
                raise InputError(f"{path}: {problem}")
        if not isinstance(row, Problem):
            index.add(number, row[prompt_field])
    return index


def prompt_field_of(row: object) -> str | None:
    """Where rows like this one hold their prompt: `input`, which training reads, or AlpacaEval's `instruction`; None for no object."""
    if not isinstance(row, dict):
        return None
    return "instruction" if "instruction" in row and "input" not in row else "input"


def check_rows(path: str | Path, fields: Mapping[str, Sequence[str] | None], against: Sequence[str | Path] = ()) -> list[dict]:
    """What `read_rows` returns, for rows whose prompts a run is about to use; one line warns of prompts that come where they should not.

    Args:
        path, fields: as `read_rows` takes them; one of the fields is the prompt.
        against: files that share no prompt with this one unless by mistake: trained on here and evaluated on there.

    Raises:
        InputError: as `read_rows` does; or a file of `against` cannot be used.
    """
    rows = read_rows(path, fields)
    prompt_field = prompt_field_of(fields)
    prompts = PromptIndex()
    for number, row in enumerate(rows, start=1):
        prompts.add(number, row[prompt_field])
    counts = {"repeat an earlier one": len(prompts.repeated()[0])}
    others = [str(name) for name in against if not _is_same_file(path, name)]
    counts |= {f"are also in {name}": len(prompts.held_by(index_prompts(name))[0]) for name in others}
    if any(counts.values()):
        found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        command = " ".join(["python data/validate.py", str(path), *(["--against", *others] if others else [])])
        print(f"warning: {path}: of {len(rows)} prompts {found} (`{command}` lists them)")
    return rows


def _is_same_file(path: str | Path, other: str | Path) -> bool:
    return Path(path).is_file() and Path(other).is_file() and Path(path).samefile(other)


def _rows_with_bar(path: str | Path) -> Iterator[tuple[int, object]]:
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None if size >= _BIG else True) as bar:
        yield from iterate_rows(path, bar.update)


# ----------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Tokens:
    """Lengths in tokens: of a prompt in its chat template, of an output by itself."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    max_prompt_length: int

    def of_prompt(self, row: dict, field: str) -> int:
        from parts.chat_templates import encode_rows

        return len(encode_rows(self.tokenizer, self.template, [row], field)[0])

    def of_output(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def too_long(tokens: int, max_prompt_length: int) -> str | None:
    """What is wrong with the `input` of a training row whose prompt has so many tokens."""
    if tokens < max_prompt_length:
        return None
    return f"field 'input' makes a prompt of {tokens} tokens, expected fewer than {max_prompt_length}"


@dataclass
class Report:
    """What is known of a file: its rows, and by kind how many problems it has, with the first `show` of each kind."""

    path: str
    show: int
    prompt_field: str | None = None
    rows: int = 0
    qtypes: Counter[str] = field(default_factory=Counter)  # "none" where a row has no qtype
    # How many texts have a length, by "<field> <unit>".
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    errors: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Problem]] = field(default_factory=dict)

    def add(self, problem: Problem, count: int = 1) -> None:
        """Note a problem, or the first of `count` problems of its kind."""
        (self.warnings if problem.is_warning else self.errors)[problem.kind] += count
        known = self.examples.setdefault(problem.kind, [])
        if len(known) < self.show:
            known.append(problem)

    def add_pairs(self, kind: str, rows: np.ndarray, others: np.ndarray, of: str = "") -> None:
        """Warn of rows whose prompt is also that of other rows (of another file)."""
        for place, (row, other) in enumerate(zip(rows[: self.show + 1].tolist(), others.tolist())):
            rest = len(rows) - self.show if place == self.show else 1
            self.add(Problem(kind, f"field '{self.prompt_field}' is the prompt of row {other}{of}", row, is_warning=True), rest)

    def content(self) -> dict:
        """The report as JSON."""
        return {
            "path": self.path,
            "prompt_field": self.prompt_field,
            "rows": self.rows,
            "qtypes": dict(self.qtypes),
            "lengths": {name: quantiles(counts) for name, counts in self.lengths.items()},
            "errors": dict(self.errors),
            "warnings": dict(self.warnings),
            "examples": {kind: [{"row": problem.row, "text": problem.text} for problem in found] for kind, found in self.examples.items()},
        }

    def describe(self) -> str:
        """All problems in lines, and the summary table."""
        lines = []
        for level, counts in (("error", self.errors), ("warning", self.warnings)):
            for kind, count in counts.items():
                lines += [f"{level}: {self.path}: {problem}" for problem in self.examples[kind]]
                if count > len(self.examples[kind]):
                    lines.append(f"{level}: {self.path}: {count - len(self.examples[kind])} more of this kind ({kind})")
        shares = ", ".join(f"{name} {count / self.rows:.1%}" for name, count in sorted(self.qtypes.items()))
        lines.append(f"{self.path}: {self.rows} rows" + (f"; qtype {shares}" if shares else ""))
        if self.lengths:
            lines.append(f"{'':20}" + "".join(f"{name:>9}" for name in QUANTILES))
            for name, counts in self.lengths.items():
                lines.append(f"  {name:<18}" + "".join(f"{value:>9}" for value in quantiles(counts).values()))
        for level, counts in (("errors", self.errors), ("warnings", self.warnings)):
            lines.append(f"  {level:<12}" + (", ".join(f"{kind} {count}" for kind, count in counts.items()) or "none"))
        return "\n".join(lines)


def quantiles(counts: Counter[int]) -> dict[str, int]:
    """The smallest length that at least the share q of the texts do not exceed, for each q of QUANTILES."""
    ordered = sorted(counts)
    reached = list(itertools.accumulate(counts[length] for length in ordered))
    found = {}
    for name, q in QUANTILES.items():
        found[name] = ordered[next(place for place, count in enumerate(reached) if count >= max(1, math.ceil(q * reached[-1])))]
    return found


def examine(
    path: str | Path,
    require: Sequence[str] = (),
    against: Mapping[str, PromptIndex] | None = None,
    long_text: int = 20000,
    show: int = 20,
    tokens: Tokens | None = None,
) -> Report:
    """Read a file of training or evaluation rows once and report all that is wrong or doubtful.

    Args:
        path: the file; it need not exist.
        require: the fields that every row must have, besides its prompt. `output` and `qtype` are checked wherever they are.
        against: the prompts of other files, by the files' names.
        long_text: the characters from which a text is called long.
        show: how many problems of each kind are kept.
        tokens: with these, lengths in tokens are reported too, and training prompts that are too long are errors.
    """
    report, prompts = Report(str(path), show), PromptIndex()
    for number, row in _rows_with_bar(path):
        report.rows = number
        if isinstance(row, Problem):
            report.add(row)
            continue
        report.prompt_field = report.prompt_field or prompt_field_of(row)
        wanted = dict.fromkeys([report.prompt_field or "input", *require])
        checked = {**wanted, "output": None, "qtype": QTYPES}
        if isinstance(row, dict):
            checked = {name: allowed for name, allowed in checked.items() if name in wanted or row.get(name) is not None}
        for problem in row_problems(row, checked, number):
            report.add(problem)
        if isinstance(row, dict):
            _examine_texts(report, row, number, long_text, tokens)
            if isinstance(prompt := row.get(report.prompt_field), str) and prompt.strip():
                prompts.add(number, prompt)
    report.add_pairs("repeated prompt", *prompts.repeated())
    for name, index in (against or {}).items():
        if not _is_same_file(path, name):
            report.add_pairs("contamination", *prompts.held_by(index), f" of {name}")
    return report


def _examine_texts(report: Report, row: dict, number: int, long_text: int, tokens: Tokens | None) -> None:
    """Count a row's qtype and lengths, and warn of its texts."""
    qtype = row.get("qtype") or "none"
    report.qtypes[qtype if qtype in (*QTYPES, "none") else "unknown"] += 1
    for name in (report.prompt_field, "output"):
        text = row.get(name)
        if not isinstance(text, str):
            continue
        report.lengths[f"{name} words"][len(text.split())] += 1
        if tokens is not None and lone_surrogate(text) is None:
            try:
                count = tokens.of_output(text) if name == "output" else tokens.of_prompt(row, name)
            except InputError as error:
                report.add(Problem("no prompt", str(error), number))
                continue
            report.lengths[f"{name} tokens"][count] += 1
            if name == "input" and (problem := too_long(count, tokens.max_prompt_length)):
                report.add(Problem("long prompt", problem, number))
        if name == "output" and not text.strip():
            report.add(Problem("empty output", "field 'output' is empty", number, is_warning=True))
        if len(text) > long_text:
            report.add(Problem("long text", f"field '{name}' has {len(text)} characters", number, is_warning=True))
        if suspect := _SUSPECTS.search(text):
            what = f"field '{name}' holds {_describe_suspect(suspect[0])} at character {suspect.start() + 1}"
            report.add(Problem("suspicious encoding", what, number, is_warning=True))


def _describe_suspect(found: str) -> str:
    if len(found) > 1:
        return f"{found!r}, as UTF-8 does that was read as another encoding,"
    names = {"\ufffd": "the replacement character", "\ufeff": "a byte order mark"}
    return f"{names.get(found, 'a control character')} (U+{ord(found):04X})"
