"""Files in and out: rows are read and validated here, outputs are written atomically with their provenance.

Everything a user can get wrong in a file raises `InputError`, whose text is one line naming file, row, field and what was
expected; `run_main` turns it into that line on stderr and exit code 2.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from rows import Problem, iterate_rows, row_problems

REPOSITORY = Path(__file__).resolve().parent
LOCAL_PREFIXES = ("models/", "outputs/", "assets/", "/", ".", "~")  # names that can only be folders, never on a hub
QTYPES = ("OPENENDED", "CONSTRAINED")
_RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "sentence-transformers", "datasets", "huggingface_hub", "openai",
    "scikit-learn", "nltk", "numpy", "scipy",
)  # fmt: skip


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, and what was expected."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main` and say in one line on stderr why it could not finish.

    Exit codes: 2 for an `InputError`, 1 for a number that is not finite (`FloatingPointError`) and for what the system refuses (a full
    disk ...: `OSError`), 130 for Ctrl-C and SIGTERM.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"\nerror: {error}", file=sys.stderr)  # on a line of its own: a progress bar may stand on this one
        sys.exit(1)
    except OSError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is kept", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------- reading


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
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


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


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file under a line of column names. Raises InputError for broken quotes, ragged rows, or none."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.reader.line_num}: broken CSV ({error})") from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {number}: has more or fewer cells than the {len(reader.fieldnames)} columns")
    if not rows:
        raise InputError(f"{path}: no rows, expected at least one under the line of column names")
    return rows


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def digest(content: object) -> str:
    """A short name of anything that JSON can say: the first 16 hexadecimal digits of its SHA-256."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rollouts_path(checkpoint: str | Path) -> Path:
    """Where a checkpoint's AlpacaEval rollouts are; `<same>.meta.json` beside them records how they were made."""
    checkpoint = Path(os.path.abspath(checkpoint))
    return checkpoint / f"alpaca-eval-{checkpoint.name}.json"


# ----------------------------------------------------------------------------------------------------------------- models


def check_model_name(name_or_path: str) -> None:
    """Raise InputError for a model that cannot be loaded, as far as can be told without loading anything."""
    path = Path(name_or_path)
    if (path / "adapter_config.json").is_file():
        adapter_base(name_or_path)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name_or_path}: no config.json in this folder, expected a model or an adapter")
    elif not path.is_dir() and (name_or_path.startswith(LOCAL_PREFIXES) or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name_or_path)):
        hint = "; `python embedded_models.py` unpacks the embedded models" if name_or_path.startswith("models/") else ""
        raise InputError(f"{name_or_path}: no such folder, expected a model's folder or its hub name{hint}")


def check_device(name: str) -> None:
    """Raise InputError for a device that PyTorch does not know or that is not here; the empty name is the best there is."""
    import torch

    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        raise InputError(f"--device is {name!r}, expected cpu, cuda or another device of PyTorch") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    here["xpu"] = torch.xpu.device_count() if hasattr(torch, "xpu") else 0
    if (device.index or 0) >= here.get(device.type, 0):
        raise InputError(f"--device is {name!r}, and PyTorch finds no such device here")


def adapter_base(adapter: str | Path) -> str:
    """The base model of a PEFT adapter folder; a relative folder is looked for here and beside this file.

    Raises:
        InputError: the folder does not exist in either place and the name is not one of a hub.
    """
    base = read_json(Path(adapter) / "adapter_config.json")["base_model_name_or_path"]
    for candidate in (Path(base), REPOSITORY / base):
        if candidate.is_dir():
            return str(candidate)
    check_model_name(base)
    return base


@contextmanager
def loading(name_or_path: str, what: str) -> Iterator[None]:
    """Turn "not found", "hub not reachable" and "not such a model" into one line. `what`: a policy, a tokenizer ...

    Raises:
        InputError: the block raised OSError or ValueError, with their first line.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name_or_path}: cannot be loaded as {what} ({str(error).splitlines()[0]})") from None
    except RuntimeError as error:  # torch's word for weights of other shapes
        if "size mismatch" not in str(error):
            raise
        raise InputError(f"{name_or_path}: cannot be loaded as {what} (its weights have other shapes)") from None


# ---------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`; it takes target's place when the block ends well and vanishes otherwise.

    Works for files and for directories; an existing target directory is replaced.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary = holder / target.name
    try:
        yield temporary
        if temporary.is_dir() and target.is_dir():
            target.rename(holder / "replaced")
        temporary.replace(target)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented UTF-8 JSON, atomically. NaN and infinity raise ValueError: they are not JSON."""
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def provenance(**facts: object) -> dict:
    """What every output records: commit, package versions and command line, plus the facts given (seed, dtype, model ...)."""
    return {"commit": _commit(), "packages": _package_versions(), "command": sys.argv, **facts}


def _commit() -> str:
    """The commit of this checkout, with `-dirty` where tracked files differ from it; "unknown" outside a git checkout."""
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    described = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


def _package_versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
