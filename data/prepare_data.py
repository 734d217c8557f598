"""Public data, or your own, into the project's rows.

    python data/prepare_data.py alpacafarm      # -> data/alpacafarm_train.json, data/alpacafarm_val.json
    python data/prepare_data.py alpaca_eval     # -> data/alpaca_eval.json
    python data/prepare_data.py superni         # -> data/natural-instructions/, the test tasks of the default track
    python data/prepare_data.py FILE --input_column question --output_column answer --output data/mine.json
    python data/prepare_data.py OWNER/NAME --split train --input_column question --output_column answer --output data/mine.json

FILE is .json, .jsonl, .csv (each also .gz) or .parquet; OWNER/NAME is a dataset of the hub. The first three are pinned: a commit, and for
files of the hub their checksums. The hub's own variables hold here: HF_ENDPOINT (a mirror), HF_HOME (the cache), HF_TOKEN (for gated data).

Every output has a `.meta.json` beside it: source, commit, checksums, licence. An output that is already what the command makes is left
alone, any other needs --overwrite. A cut connection is resumed by the hub's client; after a failed or interrupted run the same command
resumes with the files that are complete in the cache.
"""

from __future__ import annotations

import os
import sys

# The modules lie one folder up, which Python does not search for a script in a folder of its own.
sys.path.insert(0, os.path.realpath(f"{__file__}/../.."))

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from parts.cli import Settings, parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import atomic_path, file_digest, read_csv, read_json, read_text, write_json
from parts.rows import QTYPES, Problem, lone_surrogate, one_prompt, read_rows, say_once, without_other_turns
from parts.runs import provenance

TABLES = (".json", ".jsonl", ".csv", ".parquet")
NON_COMMERCIAL = "CC BY-NC 4.0 (research only), https://creativecommons.org/licenses/by-nc/4.0/"
APACHE = "Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0; each task names the licence of its source in 'Instance License'"
SUPERNI_COMMIT = "55a365637381ce7f3748fa2eac7aef1a113bbb82"
TASKS_AT_ONCE = 10  # tasks fetched together: few round trips, and a bar that moves


@dataclass
class DataSettings(Settings):
    source: list[str] = setting(
        [], "alpacafarm, alpaca_eval, superni, a file, or a dataset of the hub (owner/name)", positional=True, path=True
    )
    data_dir: str = setting("data", "folder that receives alpacafarm, alpaca_eval and superni", written=True)
    output: str = setting("", "file (.json) that receives the rows of a file or of a hub dataset", written=True)
    input_column: str = setting("input", "column with the instruction")
    output_column: str = setting("output", "column with the reference answer; empty for none")
    split: str = setting("train", "split of a hub dataset")
    subset: str = setting("", "subset of a hub dataset that has several")
    revision: str = setting("", "commit (of a hub dataset also a branch or tag); empty is the pinned one, or main of a hub dataset")
    url: str = setting("https://github.com/allenai/natural-instructions", "git repository of superni")
    overwrite: bool = setting(False, "replace an output that exists")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_column == self.output_column:
            raise InputError(f"--input_column and --output_column are both {self.input_column!r}, expected two columns")


# Which settings a source reads, besides `source` and `overwrite`; any other is refused.
READS = {
    "alpacafarm": {"data_dir", "revision"},
    "alpaca_eval": {"data_dir", "revision"},
    "superni": {"data_dir", "revision", "url"},
    "file": {"output", "input_column", "output_column"},
    "hub": {"output", "input_column", "output_column", "split", "subset", "revision"},
}


@dataclass(frozen=True)
class Published:
    """A file of a hub dataset at a pinned commit. `checksum` is what `git hash-object` prints for it."""

    output: str
    dataset: str
    commit: str
    file: str
    checksum: str
    convert: Callable[[Path], list[dict]]


# ------------------------------------------------------------------------------------------------------------------- rows


def alpacafarm_rows(path: Path) -> list[dict]:
    """AlpacaFarm's {instruction, input, output} as {input, output}: the material, if any, under `### Input:`."""
    rows = read_rows(path, {"instruction": None, "input": None})  # which joins them
    return [{name: row[name] for name in ("input", "output") if name in row} for row in rows]


def alpaca_eval_rows(path: Path) -> list[dict]:
    names = ("dataset", "instruction", "output", "generator")
    return [{name: row[name] for name in names} for row in read_rows(path, dict.fromkeys(names))]


def table_rows(path: Path, columns: Sequence[str]) -> list[dict]:
    """The rows of a .json (a list, or an object a line), .jsonl, .csv or .parquet file, in file order; `columns` are in each.

    Raises:
        InputError: another kind of file, a broken one, no rows, or a row without one of `columns` (rows count from 1).
    """
    kind = table_kind(path.name)
    if kind == ".parquet":
        rows = _parquet_rows(path, columns)
    elif kind == ".csv":
        rows = read_csv(path)
    elif kind == ".json" and read_text(path).lstrip("\ufeff \t\r\n").startswith("{"):
        rows = _json_lines(path)
    else:
        rows = read_rows(path, {}, as_they_are=True)
    rows = whole_prompts([_without_unread_turns(row, columns) for row in rows], path)
    for number, row in enumerate(rows, start=1):
        _require_columns(row, columns, f"{path}: row {number}")
    return rows


def _without_unread_turns(row: dict, columns: Sequence[str]) -> dict:
    """A row without a conversation that nothing is asked of: the columns are all there beside it, and none is made of it."""
    unread = columns and set(columns) <= row.keys() and not {"input", "instruction"} & set(columns)
    return {name: value for name, value in row.items() if not (unread and name == "messages")}


def whole_prompts(rows: Sequence[dict], path: Path) -> list[dict]:
    """Rows with their whole prompts, as `parts.rows.one_prompt` puts them together, which is said."""
    rows = [without_other_turns(row) for row in rows]
    whole = [one_prompt(row, number) for number, row in enumerate(rows, start=1)]
    if joined := sum(row is not own for row, own in zip(whole, rows)):
        say_once(f"{path}: {joined} prompts are put together from 'instruction' and 'input', or from 'messages'")
    for problem in whole:
        if isinstance(problem, Problem):
            raise InputError(f"{path}: {problem}")
    return whole


def table_kind(name: str) -> str:
    """The suffix of a table's name without `.gz`, "" where it is none of `TABLES`."""
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in TABLES else ""


def _require_columns(found: Iterable[str], columns: Sequence[str], where: str) -> None:
    for column in columns:
        if column not in found:
            raise InputError(f"{where}: no column '{column}', expected one of those found: {', '.join(found)}")


def _json_lines(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number}: broken JSON ({error.msg} at column {error.colno})") from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise InputError(f"{path}: line {number}: broken JSON ({error})") from None
            if not isinstance(rows[-1], dict):
                raise InputError(f"{path}: line {number}: expected an object, found {type(rows[-1]).__name__}")
    return rows


def _parquet_rows(path: Path, columns: Sequence[str]) -> list[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        if "messages" not in names:  # of which prompts and answers are made
            _require_columns(names, columns, str(path))
        wanted = {*columns, "qtype", "instruction", "input", "messages"}
        rows = parquet.read_table(path, columns=[name for name in names if name in wanted]).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    if not rows:
        raise InputError(f"{path}: no rows, expected at least one")
    return rows


def own_rows(paths: Sequence[Path], input_column: str, output_column: str) -> list[dict]:
    """Rows {input, output, qtype} of tables with any columns: `output` where a column is named, `qtype` where all rows have a valid one.

    A row whose prompt is a conversation of several turns keeps them as `messages`.

    Raises:
        InputError: an unusable file, a missing column, or a cell that is not text.
    """
    names = {input_column: "input"} | ({output_column: "output"} if output_column else {})
    rows, labels = [], []
    for path in paths:
        for number, row in enumerate(table_rows(path, list(names)), start=1):
            for column in names:
                if not isinstance(row[column], str):
                    raise InputError(f"{path}: row {number}: column '{column}' is {type(row[column]).__name__}, expected text")
                if (place := lone_surrogate(row[column])) is not None:
                    half = f"half of a surrogate pair at character {place + 1}"
                    raise InputError(f"{path}: row {number}: column '{column}' holds {half}, expected text")
            if not row[input_column].strip():
                raise InputError(f"{path}: row {number}: column '{input_column}' is empty, expected a prompt")
            turns = row.get("messages") if input_column in ("input", "instruction") else None
            kept = {"messages": turns} if turns and len(turns) > 1 else {}
            rows.append({name: row[column] for column, name in names.items()} | kept)
            labels.append(row.get("qtype"))
    if all(label in QTYPES for label in labels):
        return [{**row, "qtype": label} for row, label in zip(rows, labels)]
    if any(label is not None for label in labels):
        print(f"column 'qtype' is left out: not every row has {' or '.join(QTYPES)} there")
    return rows


# -------------------------------------------------------------------------------------------------------------- the hub


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the hub client's errors into one line.

    Raises:
        InputError: something that is not there, may not be had, or may not be fetched because HF_HUB_OFFLINE is set.
        ConnectionError: the hub cannot be reached, cut the connection, or answered with another error.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except (OSError, errors.HTTPError) as error:
        cause = error  # the hub's answer, or what kept it from answering, inside what its client and `datasets` make of it
        while not isinstance(cause, errors.HfHubHTTPError) and isinstance(cause.__cause__, (OSError, errors.HTTPError)):
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise  # a full disk, a cache without permission ...: the system's own words
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{what}: not cached, and HF_HUB_OFFLINE is set (the Makefile does); HF_HUB_OFFLINE=0 fetches it") from None
        if isinstance(cause, errors.GatedRepoError):
            raise InputError(f"{what}: gated; accept its terms on {constants.ENDPOINT} and set HF_TOKEN") from None
        if isinstance(cause, errors.RepositoryNotFoundError):
            raise InputError(f"{what}: no such dataset on {constants.ENDPOINT}, or a private one (HF_TOKEN)") from None
        if isinstance(cause, (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)):
            missing = "revision" if isinstance(cause, errors.RevisionNotFoundError) else "file at this revision"
            raise InputError(f"{what}: no such {missing} on {constants.ENDPOINT}") from None
        reason = f"{type(cause).__name__}: {str(cause).strip() or 'no answer'}".splitlines()[0]
        raise ConnectionError(f"{what}: {constants.ENDPOINT} did not deliver it ({reason}); run the same command again") from None


def content_checksum(path: Path, like: str) -> str:
    """SHA-256 of a file where `like` has its 64 digits, else git's object id (SHA-1 of a header and the content)."""
    if len(like) == 64:
        return file_digest(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fetch(dataset: str, file: str, commit: str, checksum: str = "") -> Path:
    """A file of a hub dataset in the hub's cache, checked against `checksum`, or against what the hub states of it.

    Raises:
        InputError, ConnectionError: as `hub_errors`.
        OSError: the content has another checksum; it is taken out of the cache.
    """
    from huggingface_hub import HfApi, hf_hub_download

    what = f"{dataset}: {file} at {commit}"
    with hub_errors(what):
        if not checksum:
            stated = HfApi().get_paths_info(dataset, file, revision=commit, repo_type="dataset")
            if not stated:
                raise InputError(f"{what}: no such file")
            checksum = stated[0].lfs.sha256 if stated[0].lfs else stated[0].blob_id
        path = Path(hf_hub_download(dataset, file, repo_type="dataset", revision=commit))
    found = content_checksum(path, checksum)
    if found != checksum:
        for name in {path.resolve(), path}:
            name.unlink()
        raise OSError(f"{what}: the checksum is {found}, expected {checksum}; the file is removed, the same command fetches it again")
    return path


def hub_split(dataset: str, subset: str, split: str, commit: str) -> list[str]:
    """The files that make up a split of a hub dataset, as the `datasets` library finds them."""
    from datasets import load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    with hub_errors(dataset):
        try:
            found = load_dataset_builder(dataset, subset or None, revision=commit).config.data_files or {}
        except ValueError as error:  # an unknown subset, or none named of several
            raise InputError(f"{dataset}: --subset is {subset!r}: {' '.join(str(error).split())}") from None
        except (RuntimeError, EmptyDatasetError, DataFilesNotFoundError) as error:  # a dataset script, no data
            raise InputError(f"{dataset}: {' '.join(str(error).split())}") from None
    if not found.get(split):
        raise InputError(f"{dataset}: no split '{split}', expected one of {', '.join(str(name) for name in found if found[name])}")
    files = [url.removeprefix(f"hf://datasets/{dataset}@{commit}/") for url in found[split]]
    for file in files:
        if not table_kind(file):
            raise InputError(f"{dataset}: split '{split}' is {file}, expected {', '.join(TABLES)}")
    return files


# -------------------------------------------------------------------------------------------------------------- outputs


def record_path(target: Path) -> Path:
    return target.with_suffix(".meta.json")


def output_checksums(target: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file of a folder, by its path from the folder that `target` is in."""
    files = sorted(path for path in target.rglob("*") if path.is_file()) if target.is_dir() else [target]
    return {str(path.relative_to(target.parent)): file_digest(path) for path in files}


def is_wanted(target: Path, source: dict, overwrite: bool) -> bool:
    """Whether `target` has to be made: not where it is already what this command makes, to the byte.

    Raises:
        InputError: something else is there, and `overwrite` is off.
    """
    if not target.exists():
        return True
    record = read_json(record_path(target)) if record_path(target).is_file() else {}
    if record.get("source") == source and record.get("outputs") == output_checksums(target):
        print(f"{target}: already there, as this command makes it")
        return False
    if not overwrite:
        raise InputError(f"{target}: exists and is not what this command makes; --overwrite=true replaces it")
    return True


def check_earlier(target: Path, source: dict, files: dict[str, str]) -> None:
    """Raise OSError where the record of an earlier run has another checksum for a file of the same source."""
    record = read_json(record_path(target)) if record_path(target).is_file() else {}
    for name, checksum in files.items():
        earlier = record.get("files", {}).get(name, checksum) if record.get("source") == source else checksum
        if earlier != checksum:
            raise OSError(f"{name}: the SHA-256 is {checksum}, and {record_path(target)} has {earlier} for the same revision")


def write_rows(target: Path, rows: list[dict], source: dict, files: dict[str, Path], licence: str) -> None:
    """Write the rows and their record; `files` are what they come from, by name."""
    checksums = {name: file_digest(path) for name, path in files.items()}
    check_earlier(target, source, checksums)
    write_json(target, rows)
    record = {"source": source, "files": checksums, "licence": licence, "rows": len(rows), "outputs": output_checksums(target)}
    write_json(record_path(target), provenance(**record))
    print(f"{target}: {len(rows)} rows. Licence of the data: {licence}")


# -------------------------------------------------------------------------------------------------------------- sources

_FARM = ("tatsu-lab/alpaca_farm", "e576524ca841af3c36fd6912e68e5920430928c1")
_EVAL = ("tatsu-lab/alpaca_eval", "2edc6fad8be6b14ea7230aabfd08188da6b8b814")
_UNLABELED, _VAL = "alpaca_instructions/unlabeled.json", "alpaca_instructions/val.json"
PUBLISHED = {
    "alpacafarm": [
        Published("alpacafarm_train.json", *_FARM, _UNLABELED, "9b7955c8bbc3cb7046bd6fc86be20af85daa9256", alpacafarm_rows),
        Published("alpacafarm_val.json", *_FARM, _VAL, "4e1c23b433249a5b3165da9864a5630d9a12615a", alpacafarm_rows),
    ],
    "alpaca_eval": [
        Published("alpaca_eval.json", *_EVAL, "alpaca_eval.json", "18a8add191d60f5eead7ee12f453f718a0b17879", alpaca_eval_rows),
    ],
}


def prepare_published(settings: DataSettings, published: Sequence[Published]) -> None:
    """The outputs of a pinned hub dataset, or of its files at another revision, which are checked against what the hub states."""
    from huggingface_hub import HfApi

    commit = published[0].commit
    if settings.revision:
        with hub_errors(f"{published[0].dataset} at {settings.revision}"):
            commit = HfApi().dataset_info(published[0].dataset, revision=settings.revision).sha
    wanted = []
    for item in published:
        target, source = Path(settings.data_dir) / item.output, {"dataset": item.dataset, "file": item.file, "revision": commit}
        if is_wanted(target, source, settings.overwrite):
            wanted.append((item, target, source))
    for item, target, source in wanted:
        path = fetch(item.dataset, item.file, commit, item.checksum if commit == item.commit else "")
        write_rows(target, item.convert(path), source, {item.file: path}, NON_COMMERCIAL)


def prepare_hub_dataset(settings: DataSettings, dataset: str) -> None:
    from huggingface_hub import HfApi

    with hub_errors(dataset):
        info = HfApi().dataset_info(dataset, revision=settings.revision or None)
    names = ("split", "subset", "input_column", "output_column")
    source = {"dataset": dataset, "revision": info.sha, **{name: getattr(settings, name) for name in names}}
    if is_wanted(Path(settings.output), source, settings.overwrite):
        files = {file: fetch(dataset, file, info.sha) for file in hub_split(dataset, settings.subset, settings.split, info.sha)}
        rows = own_rows(list(files.values()), settings.input_column, settings.output_column)
        licence = info.card_data.get("license") if info.card_data else None
        write_rows(Path(settings.output), rows, source, files, str(licence or "not stated on the hub"))


def prepare_file(settings: DataSettings, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    names = ("input_column", "output_column")
    source = {"file": str(path), "sha256": file_digest(path), **{name: getattr(settings, name) for name in names}}
    if is_wanted(Path(settings.output), source, settings.overwrite):
        rows = own_rows([path], settings.input_column, settings.output_column)
        write_rows(Path(settings.output), rows, source, {str(path): path}, "that of your file")


def git(folder: Path, *words: str) -> None:
    """Run git in `folder`. Raises OSError with git's last line where it fails, and where the other side sends nothing for a minute."""
    impatient = ("-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=60")
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # a missing repository must not ask for a password
    done = subprocess.run(["git", "-C", str(folder), *impatient, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("fatal:", "error:"))] or done.stderr.splitlines()[-1:]
        raise OSError(f"git {words[0]}: {said[0] if said else f'exit code {done.returncode}'}")


def prepare_superni(settings: DataSettings) -> None:
    """LICENSE, splits/default and the test tasks of natural-instructions at one commit; git checks all content against the commit."""
    from tqdm import tqdm

    commit = settings.revision or SUPERNI_COMMIT
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise InputError(f"--revision is {commit!r}, expected a whole commit hash for superni")
    address = urlsplit(settings.url)
    if address.scheme in ("http", "https") and ("@" in address.netloc or address.query):
        raise InputError("--url holds credentials or a query, which the record would keep: leave them to git's credential helper")
    if shutil.which("git") is None:
        raise InputError("git is not installed, and superni is fetched with it")
    url = str(Path(settings.url).resolve()) if Path(settings.url).is_dir() else settings.url
    target, source = Path(settings.data_dir) / "natural-instructions", {"repository": url, "revision": commit}
    if not is_wanted(target, source, settings.overwrite):
        return
    with atomic_path(target) as folder:
        folder.mkdir()
        git(folder, "init", "--quiet")
        git(folder, "remote", "add", "origin", url)
        # Contents are left out here and come with the checkouts below: the other 1,500 tasks are most of the repository.
        git(folder, "fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", commit)
        git(folder, "sparse-checkout", "set", "--no-cone", "/LICENSE", "/splits/default/")
        git(folder, "checkout", "--quiet", "--detach", "FETCH_HEAD")
        split = folder / "splits" / "default" / "test_tasks.txt"
        if not split.is_file():
            raise InputError(f"{url}: no splits/default/test_tasks.txt at {commit}")
        names = [name.strip() for name in read_text(split).splitlines() if name.strip()]
        with tqdm(total=len(names), desc="test tasks", unit="task") as bar:
            for start in range(0, len(names), TASKS_AT_ONCE):
                some = names[start : start + TASKS_AT_ONCE]
                git(folder, "sparse-checkout", "add", *(f"/tasks/{name}.json" for name in some))
                for name in some:
                    if not (folder / "tasks" / f"{name}.json").is_file():
                        raise InputError(f"{url}: no tasks/{name}.json at {commit}, which splits/default/test_tasks.txt names")
                bar.update(len(some))
        shutil.rmtree(folder / ".git")
    record = {"source": source, "licence": APACHE, "tasks": len(names), "outputs": output_checksums(target)}
    write_json(record_path(target), provenance(**record))
    print(f"{target}: {len(names)} tasks. Licence of the data: {APACHE}")


def is_hub_name(source: str) -> bool:
    """Whether the hub may have a dataset of this name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def source_kind(settings: DataSettings) -> str:
    """Which of `READS` the source is. Raises InputError for another source and for settings that it does not read."""
    if len(settings.source) != 1:
        raise InputError(f"{len(settings.source)} sources given, expected one: {' '.join(settings.source)}")
    source = settings.source[0]
    kind = source if source in (*PUBLISHED, "superni") else "file" if table_kind(source) else "hub"
    if kind == "hub" and (Path(source).exists() or "/" not in source or not is_hub_name(source)):
        raise InputError(f"{source}: expected alpacafarm, alpaca_eval, superni, a {', '.join(TABLES)} file or owner/name of the hub")
    for field in fields(settings):
        if field.init and field.name not in {*READS[kind], "overwrite"} and getattr(settings, field.name) != field.default:
            raise InputError(f"--{field.name} has no meaning for {source}")
    if "output" in READS[kind] and Path(settings.output).suffix != ".json":
        raise InputError(f"--output is {settings.output!r}, expected a .json file for the rows of {source}")
    return kind


def main() -> None:
    settings = parse_settings(DataSettings, description=__doc__)
    kind = source_kind(settings)
    if kind in PUBLISHED:
        prepare_published(settings, PUBLISHED[kind])
    elif kind == "superni":
        prepare_superni(settings)
    elif kind == "file":
        prepare_file(settings, Path(settings.source[0]))
    else:
        prepare_hub_dataset(settings, settings.source[0])


if __name__ == "__main__":
    run_main(main)
