"""Files in and out: text, JSON and CSV are read with one-line errors, outputs are written atomically, digests name contents."""

from __future__ import annotations

import ast
import csv
import errno
import glob
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from parts.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
_HOLDER, _REPLACED = ".unfinished", "replaced"  # a folder beside what is being written; the name in it of what is replaced


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file (`.gz` is unpacked). Raises InputError where it is missing or not UTF-8 text."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error})") from None


def read_json(path: str | Path) -> dict:
    """An object from a JSON file. Raises InputError where the file is missing, broken, or holds something else."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: broken JSON ({error.msg} at line {error.lineno}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise InputError(f"{path}: broken JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file under a line of column names; semicolons and tabs part cells too, where that line has no comma.

    Raises:
        InputError: broken quotes, ragged rows, no rows, or a column's name twice.
    """
    csv.field_size_limit(sys.maxsize)
    text = read_text(path).removeprefix("\ufeff")
    first = text.split("\n", 1)[0]
    delimiter = "," if "," in first else next((mark for mark in ";\t" if mark in first), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.reader.line_num}: broken CSV ({error})") from None
    names = reader.fieldnames or []
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path}: column {twice[0]!r} comes twice, expected a name of its own for each")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {number}: has more or fewer cells than the {len(names)} columns")
    if not rows:
        raise InputError(f"{path}: no rows, expected at least one under the line of column names")
    return rows


def is_same_path(one: object, other: object) -> bool:
    """Whether two texts name one file or folder, however they are spelled."""
    return bool(one and other) and os.path.realpath(str(one)) == os.path.realpath(str(other))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(*paths: str | Path) -> str:
    """SHA-256 of what Python files compute: of their syntax trees without docstrings, so comments and layout do not count.

    Raises:
        InputError: a file is missing or is not Python.
    """
    found = hashlib.sha256()
    for path in paths:
        tree = _parsed(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        found.update(ast.dump(tree).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _parsed(path: str | Path) -> ast.Module:
    try:
        return ast.parse(read_text(path))
    except SyntaxError as error:
        raise InputError(f"{path}: not Python ({error.msg} at line {error.lineno})") from None


def code_files(path: str | Path) -> list[Path]:
    """A Python file, and what it and they import from its folder; of this project's own modules none.

    Raises:
        InputError: a file is missing or is not Python.
    """
    found, waiting = [], [Path(path)]
    own = {REPOSITORY / "reward_model.py", *(REPOSITORY / "parts").glob("*.py")}
    while waiting:
        file = waiting.pop()
        if file in found or (found and file.resolve() in own):
            continue
        found.append(file)
        for node in ast.walk(_parsed(file)):
            folder, names = Path(path).parent, []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                folder = file.parents[node.level - 1] if node.level else folder
                names = [".".join(filter(None, (node.module, *more))) for more in ((), *((alias.name,) for alias in node.names))]
            places = [folder.joinpath(*name.split(".")) for name in names if name]
            waiting += [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    return found


def digest(content: object) -> str:
    """A short name of anything that JSON can say: the first 16 hexadecimal digits of its SHA-256."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`; it takes target's place when the block ends well and vanishes otherwise.

    Works for files and for directories; an existing target directory is replaced.
    """
    target = Path(target)
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_HOLDER, dir=target.parent))
        temporary = holder / target.name
        try:
            yield temporary
            if temporary.is_dir() and target.is_dir():
                target.rename(holder / _REPLACED)
            temporary.replace(target)
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def clear_leftovers(target: str | Path) -> None:
    """Remove what a kill inside `atomic_path(target)` or `remove_folder(target)` left beside `target`.

    A kill between the two renames of a directory's exchange left nothing at `target`: the new directory, which is whole, is put there.
    Whoever calls this is alone at `target` (`parts.locks`).
    """
    target = Path(target)
    for holder in target.parent.glob(f".{glob.escape(target.name)}.{'[!.]' * 8}{_HOLDER}"):
        if (holder / _REPLACED).exists() and (holder / target.name).exists() and not target.exists():
            (holder / target.name).rename(target)
        shutil.rmtree(holder, ignore_errors=True)


def clear_folder(folder: str | Path) -> None:
    """`clear_leftovers` of all that is in a folder, for whoever is alone there."""
    for holder in Path(folder).glob(f".*{_HOLDER}"):
        clear_leftovers(holder.with_name(holder.name[1:].rsplit(".", 2)[0]))


def remove_folder(folder: str | Path) -> None:
    """Remove a directory so that a kill leaves all of it or nothing under its name."""
    folder = Path(folder)
    holder = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=_HOLDER, dir=folder.parent))
    folder.rename(holder / "removed")
    shutil.rmtree(holder)


def check_writable(path: str | Path) -> None:
    """Raise InputError where a file cannot be written, before anything is computed for it. Nothing is left there."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=next(parent for parent in path.absolute().parents if parent.exists())):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written there ({error.strerror})") from None


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file in what the system says of it: an OSError of a write (a full disk, a quota) does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None or isinstance(error, TimeoutError | ConnectionError):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented UTF-8 JSON, atomically. NaN and infinity raise ValueError: they are not JSON."""
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_json_lines(path: str | Path, rows: Iterable[object]) -> None:
    """Write one JSON value a line as UTF-8, atomically. NaN and infinity raise ValueError: they are not JSON."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


class JsonLines:
    """An append-only file of one JSON value a line. Whatever was appended survives a kill at any moment.

    One rule for a line that a kill cut short: reading ignores it, and the first append cuts it off.

    Args:
        path: the file. The first append makes it, and its folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._appending = threading.Lock()  # some callers have worker threads
        self._mended = False

    def read(self) -> Iterator[object]:
        """The values in order; none where there is no file. Raises InputError for a whole line that is not JSON."""
        for number, line in enumerate(self._whole_lines(), start=1):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{self.path}: line {number} is broken JSON; delete the file to start again") from None

    def append(self, *values: object) -> None:
        """Write values, each on a line of its own, and flush. NaN and infinity raise ValueError: they are not JSON."""
        text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
        with self._appending, naming(self.path):
            self._mend()
            self._mended = False  # until the lines are whole: a full disk may take a part of them
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
            self._mended = True

    def _mend(self) -> None:
        """Make the file, or cut off its unfinished last line, once."""
        if not self._mended:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(0)
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
            self._mended = True

    def _whole_lines(self) -> list[str]:
        return read_text(self.path).split("\n")[:-1] if self.path.is_file() else []
