"""Files of rows: the one room where they are read, checked, matched with each other, and their faults named."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ijson

from parts.errors import InputError

QTYPES = ("OPENENDED", "CONSTRAINED")
CHUNK = 2**20  # bytes read at a time
ROW_LIMIT = 2**24  # characters; a file with a longer row has lost its row ends


class Problem(NamedTuple):
    """What is wrong with a file, or with one of its rows (`row` counts from 1)."""

    kind: str
    text: str
    row: int | None = None
    is_warning: bool = False

    def __str__(self) -> str:
        return self.text if self.row is None else f"row {self.row}: {self.text}"


def read_rows(path: str | Path, fields: Mapping[str, Sequence[str] | None]) -> list[dict]:
    """Read a list of objects from `.json` (one list) or `.jsonl` (one object a line), either also gzipped (`.gz`).

    Args:
        path: the file.
        fields: the fields every row must carry as text; a sequence of strings as value lists what is allowed. A prompt is never empty.

    Returns:
        The rows, in file order, with all their fields.

    Raises:
        InputError: no such file, not UTF-8, broken JSON, no rows, or a row whose field is missing or wrong (rows count from 1). The
            message is the first problem and the number of the others.
    """
    rows, problems = [], []
    for number, row in iterate_rows(path):
        if isinstance(row, Problem):
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
    for number, instruction in enumerate(instructions, start=1):
        if instruction not in by_instruction:
            raise InputError(f"{path}: no row for row {number} of {wanted_by}, expected the instruction {instruction[:60]!r}")
    return [by_instruction[instruction] for instruction in instructions]


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


def iterate_rows(
    path: str | Path, advance: Callable[[int], object] = lambda size: None, chunk: int = CHUNK, row_limit: int = ROW_LIMIT
) -> Iterator[tuple[int, object]]:
    """The rows of a `.json` or `.jsonl` file (also `.gz`) with their numbers, one at a time, in file order.

    Args:
        path: the file.
        advance: receives the number of bytes of the file that were read since its last call.
        chunk: bytes read at a time.
        row_limit: characters that a row may have. At four times as many bytes, reading ends.

    Yields:
        A row's number and the row, or a Problem in its place if it cannot be read. A broken line of a `.jsonl` file counts as a row;
        broken JSON in a list ends the reading. A problem of the whole file has the number 0, or that of the last row read.
    """
    path = Path(path)
    if not path.is_file():
        yield 0, Problem("unreadable", "no such file")
        return
    read, end = (_line_rows, b"\n") if ".jsonl" in path.suffixes else (_list_rows, b",")
    blocks, place, number = _blocks(path, end, advance, chunk, 4 * row_limit), _Place(), None
    try:
        first = next(blocks, b"")
        if first.startswith(codecs.BOM_UTF8):
            yield 0, Problem("byte order mark", "the file begins with a byte order mark, which JSON does not allow", is_warning=True)
            first, place = first.removeprefix(codecs.BOM_UTF8), _Place(byte=len(codecs.BOM_UTF8))
        for number, row in read(first, blocks, place, row_limit):
            yield number, row
        if number is None:
            yield 0, Problem("no rows", "no rows, expected at least one")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield number or 0, Problem("unreadable", f"not a whole gzip file ({error})")


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


class _Place(NamedTuple):
    """A place in a file: line and column count characters from 1, `byte` counts from 0."""

    line: int = 1
    column: int = 1
    byte: int = 0

    def after(self, text: str) -> _Place:
        """The place behind `text`, which begins here."""
        lines = text.count("\n")
        column = len(text) - text.rfind("\n") if lines else self.column + len(text)
        return _Place(self.line + lines, column, self.byte + len(text.encode("utf-8", "surrogateescape")))

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"


def _blocks(path: Path, end: bytes, advance: Callable[[int], object], chunk: int, limit: int) -> Iterator[bytes]:
    """A file's bytes in blocks that end with `end`, except the last. A block without an `end` in `limit` bytes is the last, too."""
    rest = b""
    with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as stream:
        done = 0
        while len(rest) <= limit and (read := stream.read(chunk)):
            advance(raw.tell() - done)
            done = raw.tell()
            rest += read
            if cut := rest.rfind(end) + 1:
                yield rest[:cut]
                rest = rest[cut:]
        advance(raw.tell() - done)
    if rest:
        yield rest


def _decode(raw: bytes) -> str:
    """Text in which a byte that is not UTF-8 is half of a surrogate pair: UTF-8 text cannot hold one."""
    return raw.decode("utf-8", "surrogateescape")


def _not_utf8(text: str, place: _Place, number: int) -> Problem | None:
    """The first byte of a row that is not UTF-8; `text` is what `_decode` makes of the row, which begins at `place`."""
    at = lone_surrogate(text)
    return None if at is None else Problem("not UTF-8", f"byte {place.after(text[:at]).byte} is not UTF-8 text", number)


def _broken(what: str, where: str = "") -> Problem:
    return Problem("broken JSON", f"{where}broken JSON ({what})")


def _line_rows(first: bytes, blocks: Iterator[bytes], place: _Place, row_limit: int) -> Iterator[tuple[int, object]]:
    number = 0
    for block in itertools.chain([first], blocks):
        for line in io.BytesIO(block):
            text, where = _decode(line.removesuffix(b"\n")), f"line {place.line}: "
            if len(line) > 4 * row_limit:
                yield number + 1, _broken(f"no end within {row_limit} characters", where)
                return
            if text.strip():
                number += 1
                try:
                    yield number, _not_utf8(text, place, number) or json.loads(text)
                except json.JSONDecodeError as error:
                    yield number, _broken(f"{error.msg} at column {error.colno}", where)
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                    yield number, _broken(str(error), where)
            place = _Place(place.line + 1, 1, place.byte + len(line))


# A row of a list ends in a piece that ends with a comma, or in the last piece. ijson tells in which one, and json reads the row: ijson
# loses half surrogates, ends at a byte that is not UTF-8, names no column, refuses NaN, and its fast backend crashes the interpreter on
# an integer of 5,000 digits. It sees a shadow of each piece, which has the same strings, brackets and commas and none of these.
_PIECE = re.compile(rb"[^,]*,|[^,]+")
_SHADOW = bytes(ord("?") if byte > 127 else ord("1") if byte in b"0123456789" else byte for byte in range(256))
_LONG = b"1" * 16
_LONG_NUMBER = re.compile(rb"1{16,}")
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def _shadow(block: bytes) -> bytes:
    shadow = block.translate(_SHADOW).replace(b"\\u", b"\\t")
    for constant in (b"NaN", b"-Infinity", b"Infinity"):  # json takes these
        shadow = shadow.replace(constant, b"null")
    return _LONG_NUMBER.sub(b"1", shadow) if _LONG in shadow else shadow


def _pieces(first: bytes, blocks: Iterator[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The pieces of a list with their shadows; two empty ones mark the end."""
    for block in itertools.chain([first], blocks):
        yield from zip(_PIECE.findall(block), _PIECE.findall(_shadow(block)))
    yield b"", b""


def _list_rows(first: bytes, blocks: Iterator[bytes], place: _Place, row_limit: int) -> Iterator[tuple[int, object]]:
    # json judges `text`: what was read since the last row, after `before`, which makes it the beginning of a list.
    before, text, number = "", _decode(first), 0
    try:
        opening = _SPACE.match(text).end()
        if opening == len(text):
            yield 0, Problem("no rows", "empty file, expected a JSON list of rows")
            return
        if text[opening] != "[":
            found = "dict" if text[opening] == "{" else type(_DECODER.raw_decode(text, opening)[0]).__name__
            yield 0, Problem("not a list", f"expected a JSON list of rows, found {found}")
            return
        before, place, raw, ended = "[", place.after(text[: opening + 1]), bytearray(), ijson.sendable_list()
        parser = ijson.items_coro(ended, "item")
        parser.send(b"[")
        for piece, shadow in _pieces(first[opening + 1 :], blocks):
            raw += piece
            fault = None
            try:
                parser.send(shadow) if shadow else parser.close()
            except ijson.JSONError as error:
                fault = error
            if fault or ended or len(raw) > 4 * row_limit:
                text = before + _decode(raw)
            if ended:
                ended.clear()
                number += 1
                start = _SPACE.match(text, len(before)).end()
                row, end = _DECODER.raw_decode(text, start)
                yield number, _not_utf8(text[start:end], place.after(text[len(before) : start]), number) or row
                follows = text[end:].strip(" \t\n\r")
                if follows == "," and not fault:
                    before, place = "[0,", place.after(text[len(before) :])
                    raw.clear()
                elif follows not in ("", "]"):  # ijson may see a stray quote only where it closes
                    fault = fault or follows
            elif len(raw) > 4 * row_limit:
                raise ValueError(f"no end within {row_limit} characters")
            if fault:
                json.loads(text)  # raises, and names the place
                raise ValueError(str(fault).splitlines()[0])
    except json.JSONDecodeError as error:
        yield number, _broken(f"{error.msg} at {place.after(text[len(before) : error.pos])}")
    except (ValueError, RecursionError) as error:
        start = _SPACE.match(text, len(before)).end()
        yield number, _broken(f"{error} at {place.after(text[len(before) : start])}")
