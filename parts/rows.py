"""Files of rows: the one room where they are read, checked, matched with each other, and their faults named."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from parts.errors import InputError
from parts.processes import is_first_process

QTYPES = ("OPENENDED", "CONSTRAINED")
ROLES = ("system", "user", "assistant")
JOINED = "joined prompts"  # the kind of a warning
CHUNK = 2**20  # bytes read at a time
ROW_LIMIT = 2**24  # characters; a file with a longer row has lost its row ends
_MARGIN = 16  # characters: what is read or fails so close to a chunk's end may look otherwise with the next (1e-5, \u00e9, -Infinity)
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


class Problem(NamedTuple):
    """What is wrong with a file, or with one of its rows (`row` counts from 1)."""

    kind: str
    text: str
    row: int | None = None
    is_warning: bool = False

    def __str__(self) -> str:
        return self.text if self.row is None else f"row {self.row}: {self.text}"


def read_rows(path: str | Path, fields: Mapping[str, Sequence[str] | None], as_they_are: bool = False) -> list[dict]:
    """Read a list of objects from `.json` (one list) or `.jsonl` (one object a line), either also gzipped (`.gz`).

    Args:
        path: the file.
        fields: the fields every row must carry as text; a sequence of strings as value lists what is allowed. A prompt is never empty.
        as_they_are: leave prompts that are spread over fields so.

    Returns:
        The rows, in file order, with all their fields.

    Raises:
        InputError: no such file, not UTF-8, broken JSON, no rows, or a row whose field is missing or wrong (rows count from 1). The
            message is the first problem and the number of the others.
    """
    rows, problems = [], []
    for number, row in iterate_rows(path, as_they_are=as_they_are):
        if isinstance(row, Problem):
            if row.kind == JOINED:
                say_once(f"{path}: {row}")
            problems += [] if row.is_warning else [row]
        else:
            problems += row_problems(row, fields, number)
            rows.append(row)
    if not problems:
        return rows
    required = [name for name in fields if name not in ("input", "instruction")]
    command = " ".join(["python data/validate.py", str(path), *(["--require", *required] if required else [])])
    others = f"; {len(problems) - 1} more problem{'s' * (len(problems) > 2)}: `{command}` lists all" if len(problems) > 1 else ""
    raise InputError(f"{path}: {problems[0]}{others}")


def match_rows(path: str | Path, instructions: Sequence[str], fields: Mapping[str, Sequence[str] | None], wanted_by: str) -> list[dict]:
    """The rows of `path` in the order of `instructions`, which are looked up in the rows' `instruction`.

    Args:
        path: the file.
        instructions: of the rows that are wanted; a file that holds exactly these, in this order, may hold one of them twice.
        fields: what each row must carry besides, as in `read_rows`.
        wanted_by: the file that the instructions come from, for the message.

    Raises:
        InputError: an unusable file, or an instruction that it does not have.
    """
    rows = read_rows(path, {"instruction": None, **fields})
    if [row["instruction"] for row in rows] == list(instructions):
        return rows
    by_instruction = {row["instruction"]: row for row in rows}
    wanted = set(instructions)
    differing = {
        row["instruction"]
        for row in rows
        if row["instruction"] in wanted and any(row.get(name) != by_instruction[row["instruction"]].get(name) for name in fields or row)
    }
    if differing:
        say_once(
            f"{path}: {len(differing)} instructions come twice and differ in {' or '.join(fields) or 'other columns'}: the last row of each counts"
        )
    for number, instruction in enumerate(instructions, start=1):
        if instruction not in by_instruction:
            raise InputError(f"{path}: no row for row {number} of {wanted_by}, expected the instruction {instruction[:60]!r}")
    return [by_instruction[instruction] for instruction in instructions]


_said: set[str] = set()


def say_once(line: str) -> None:
    """Print a line to stderr that several steps of a run would print again; of several processes the first one prints it."""
    if line not in _said and is_first_process():
        print(line, file=sys.stderr)
    _said.add(line)


def require_finite(values: Sequence[float], what: str, places: Sequence[int] | None = None) -> list[float]:
    """Return `values` as floats; raise InputError naming the first row (from 1) whose value is NaN or infinite.

    `places` (from 0) are those of the rows, where they are not 0, 1, 2 ...
    """
    numbers = []
    for number, value in zip(range(1, len(values) + 1) if places is None else (place + 1 for place in places), values):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            raise InputError(f"{what}: row {number} has the value {value!r}, expected a finite number") from None
        if not math.isfinite(numbers[-1]):
            raise InputError(f"{what}: row {number} has the value {numbers[-1]}, expected a finite number")
    return numbers


def is_heldout(prompt: str, share: float) -> bool:
    """Whether a prompt is held out. A hash of its text decides: it never depends on a seed or on the order of a file."""
    first = hashlib.sha256(prompt.strip().encode()).digest()[:8]
    return int.from_bytes(first, "big") < share * 2**64


def iterate_rows(
    path: str | Path,
    advance: Callable[[int], object] = lambda size: None,
    chunk: int = CHUNK,
    row_limit: int = ROW_LIMIT,
    as_they_are: bool = False,
) -> Iterator[tuple[int, object]]:
    """The rows of a `.json` or `.jsonl` file (also `.gz`) with their numbers, one at a time, in file order.

    Args:
        path: the file.
        advance: receives the number of bytes of the file that were read since its last call.
        chunk: bytes read at a time.
        as_they_are: leave prompts that are spread over fields so.
        row_limit: characters that a row may have; reading ends at one that is longer (in a list, at twice as many).

    Yields:
        A row's number and the row, or a Problem in its place if it cannot be read. A broken line of a `.jsonl` file counts as a row;
        broken JSON in a list ends the reading. A problem of the whole file has the number 0, or that of the last row read.
    """
    path = Path(path)
    if not path.is_file():
        yield 0, Problem("unreadable", "no such file")
        return
    read = _line_rows if ".jsonl" in path.suffixes else _list_rows
    chunks, offset, number = _chunks(path, advance, chunk), 0, None
    try:
        first = next(chunks, "")
        if first.startswith("\ufeff"):
            yield 0, Problem("byte order mark", "the file begins with a byte order mark, which JSON does not allow", is_warning=True)
            first, offset = first[1:], 3
        chunks = itertools.chain([first] if first else [], chunks)
        joined = 0
        for number, row in read(chunks, offset, row_limit):
            is_spread = isinstance(row, dict) and not as_they_are
            row = without_other_turns(row) if is_spread else row
            whole = one_prompt(row, number) if is_spread else row
            joined += isinstance(whole, dict) and whole is not row
            yield number, whole
        if number is None:
            yield 0, Problem("no rows", "no rows, expected at least one")
        if joined:
            yield (
                number,
                Problem(JOINED, f"{joined} prompts are put together from 'instruction' and 'input', or from 'messages'", is_warning=True),
            )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield number or 0, Problem("unreadable", f"not a whole gzip file ({error})")


def without_other_turns(row: dict) -> dict:
    """A row without `messages` where its prompt is not made of them: a policy would be shown them, and the answer may be among them."""
    prompt = row.get("input", row.get("instruction"))
    if "messages" not in row or prompt is None:
        return row
    turns = row["messages"]
    are_texts = isinstance(turns, list) and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns)
    if are_texts and all(isinstance(turn.get("role"), str) for turn in turns) and _paragraphs(turns) == prompt:
        return row
    return {name: value for name, value in row.items() if name != "messages"}


def _paragraphs(turns: Sequence[Mapping[str, str]]) -> str:
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def one_prompt(row: dict, number: int) -> dict | Problem:
    """A row whose prompt is spread over fields, with the whole of it as `input` and as `instruction`; any other row as it is.

    Alpaca's {instruction, input} are joined as Alpaca's prompts are, "<instruction>\\n\\n### Input:\\n<input>"; an input that is empty, null, or
    the whole prompt already adds nothing. Of {messages} the last user turn is answered: alone it is the prompt; after other turns the
    prompt is "User: ...", "Assistant: ..." and so on, paragraph by paragraph, and `messages` keeps the turns. An assistant turn that
    follows becomes the `output`, where there is none.
    """
    if "instruction" in row and "input" in row:
        instruction, material = row["instruction"] or "", row["input"] or ""
        if not isinstance(instruction, str) or not isinstance(material, str) or instruction == material:
            return row
        if instruction.strip() and material.strip() and not material.startswith(f"{instruction}\n\n### Input:"):
            whole = f"{instruction}\n\n### Input:\n{material}"
        else:
            whole = max(instruction, material, key=lambda text: len(text.strip()))
        return {**row, "instruction": whole, "input": whole}
    if "messages" not in row or "instruction" in row or "input" in row:
        return row
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns):
        return Problem("not text", "field 'messages' is no list of {role, content}, expected texts", number)
    roles = [turn.get("role") for turn in turns]
    if "user" not in roles or not set(roles) <= set(ROLES):
        return Problem("unknown value", f"field 'messages' has the roles {roles}, expected {', '.join(ROLES)}, and a user's", number)
    last = len(roles) - 1 - roles[::-1].index("user")
    answer = {"output": turns[last + 1]["content"]} if last + 1 < len(turns) else {}
    asked = turns[: last + 1]
    whole = asked[0]["content"] if last == 0 else _paragraphs(asked)
    known = {name: value for name, value in row.items() if name not in answer or value is not None}
    return {**answer, **known, "messages": asked, "instruction": whole, "input": whole}


def row_problems(row: object, fields: Mapping[str, Sequence[str] | None], number: int) -> Iterator[Problem]:
    """All that a row lacks of `fields`, which are those of `read_rows`; its prompt (`instruction`, or else `input`) must not be empty."""
    if not isinstance(row, dict):
        yield Problem("not an object", f"expected an object, found {type(row).__name__}", number)
        return
    prompt_field = "instruction" if "instruction" in fields else "input"  # beside an instruction, an input is material, and may be empty
    for name, allowed in fields.items():
        if name not in row:
            yield Problem("missing field", f"field '{name}' is missing, expected text", number)
        elif not isinstance(row[name], str):
            yield Problem("not text", f"field '{name}' is {type(row[name]).__name__}, expected text", number)
        elif allowed is not None and row[name] not in allowed:
            yield Problem("unknown value", f"field '{name}' is {row[name][:60]!r}, expected {' or '.join(allowed)}", number)
        elif name == prompt_field and not row[name].strip():
            yield Problem("empty prompt", f"field '{name}' is empty, expected a prompt", number)
        elif (place := lone_surrogate(row[name])) is not None:
            half = f"half of a surrogate pair (U+{ord(row[name][place]):04X}) at character {place + 1}"
            yield Problem("lone surrogate", f"field '{name}' holds {half}, expected text", number)


def lone_surrogate(text: str) -> int | None:
    """Where `text` holds half of a surrogate pair, which JSON can spell and neither UTF-8 nor a tokenizer can take; None: nowhere."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


# ------------------------------------------------------------------------------------------------------ how they are read


def _chunks(path: Path, advance: Callable[[int], object], size: int) -> Iterator[str]:
    """A file's text, some at a time. A byte that is not UTF-8 becomes a lone surrogate, which UTF-8 text cannot hold."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as stream:
        done = 0
        while True:
            chunk = stream.read(size)
            advance(raw.tell() - done)
            done = raw.tell()
            if text := decoder.decode(chunk, final=not chunk):
                yield text
            if not chunk:
                return


def _byte_count(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _decoding_problem(text: str, offset: int, number: int) -> Problem | None:
    """Where `text`, which begins at byte `offset`, was not UTF-8 in the file."""
    place = lone_surrogate(text)
    return None if place is None else Problem("not UTF-8", f"byte {offset + _byte_count(text[:place])} is not UTF-8 text", number)


def _broken(what: str, where: str = "") -> Problem:
    return Problem("broken JSON", f"{where}broken JSON ({what})")


def _line_rows(chunks: Iterator[str], offset: int, row_limit: int) -> Iterator[tuple[int, object]]:
    rest, line, number = "", 0, 0
    for chunk in itertools.chain(chunks, "\n"):
        *whole, rest = (rest + chunk).split("\n")
        for text in whole:
            line += 1
            if text.strip():
                number += 1
                try:
                    yield number, _decoding_problem(text, offset, number) or json.loads(text)
                except json.JSONDecodeError as error:
                    yield number, _broken(f"{error.msg} at column {error.colno}", f"line {line}: ")
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                    yield number, _broken(str(error), f"line {line}: ")
            offset += _byte_count(text) + 1
        if len(rest) > row_limit:
            yield number + 1, _broken(f"no end within {row_limit} characters", f"line {line + 1}: ")
            return


def _list_rows(chunks: Iterator[str], offset: int, row_limit: int) -> Iterator[tuple[int, object]]:
    window, number = _Window(chunks, offset, row_limit), 0
    try:
        opening = window.peek()
        if not opening:
            yield 0, Problem("no rows", "empty file, expected a JSON list of rows")
            return
        if opening != "[":
            found = "dict" if opening == "{" else type(window.value()).__name__
            yield 0, Problem("not a list", f"expected a JSON list of rows, found {found}")
            return
        window.at += 1
        if window.peek() != "]":
            while True:
                window.peek()
                number += 1
                row = window.value()
                yield number, window.problem(number) or row
                if window.peek() != ",":
                    break
                window.at += 1
            if window.peek() != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", window.text, window.at)
        window.at += 1
        if window.peek():
            raise json.JSONDecodeError("Extra data", window.text, window.at)
    except json.JSONDecodeError as error:
        yield number, _broken(f"{error.msg} at {window.place(error.pos)}")
    except (ValueError, RecursionError) as error:
        yield number, _broken(f"{error} at {window.place(window.at)}")


class _Window:
    """The part of a text in chunks that is being read.

    `at` is where reading stands in `text`; line and column (from 1) and `offset` (in bytes) are the places of `text`'s start in the file.
    """

    def __init__(self, chunks: Iterator[str], offset: int, row_limit: int) -> None:
        self.row_limit = row_limit
        self.chunks, self.text, self.at, self.start = chunks, "", 0, 0
        self.line, self.column, self.offset = 1, 1, offset

    def fill(self) -> bool:
        """Drop what has been read and take one more chunk; False, and nothing changes, at the end of the file."""
        chunk = next(self.chunks, "")
        if chunk:
            self.line, self.column = self._line_and_column(self.at)
            self.offset += _byte_count(self.text[: self.at])
            self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        self.at = _SPACE.match(self.text, self.at).end()
        while self.at == len(self.text) and self.fill():
            self.at = _SPACE.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def value(self) -> object:
        """The JSON value that begins here. Raises ValueError or RecursionError where it is broken or too long."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) - _MARGIN or not self.fill():
                    self.start, self.at = self.at, end
                    return value
            except json.JSONDecodeError as error:
                cut_short = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _MARGIN
                if not cut_short or not self.fill():
                    raise
            if len(self.text) > 2 * self.row_limit:
                raise ValueError(f"no end within {self.row_limit} characters")

    def problem(self, number: int) -> Problem | None:
        """Where the value that was read last was not UTF-8."""
        text = self.text[self.start : self.at]
        if text.isascii() or _decoding_problem(text, 0, number) is None:
            return None
        return _decoding_problem(text, self.offset + _byte_count(self.text[: self.start]), number)

    def place(self, position: int) -> str:
        line, column = self._line_and_column(position)
        return f"line {line}, column {column}"

    def _line_and_column(self, position: int) -> tuple[int, int]:
        lines = self.text.count("\n", 0, position)
        return self.line + lines, position - self.text.rfind("\n", 0, position) if lines else self.column + position
