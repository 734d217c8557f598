"""Public data and one's own into rows: against a look-alike of the hub on loopback, and a git repository made on the spot."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import prepare_data
import pytest
from conftest import REPOSITORY

from parts.errors import InputError
from parts.files import read_json
from parts.rows import read_rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FARM, FARM_COMMIT = "tatsu-lab/alpaca_farm", "e576524ca841af3c36fd6912e68e5920430928c1"
EVAL, EVAL_COMMIT = "tatsu-lab/alpaca_eval", "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
UNLABELED, VALIDATION = "alpaca_instructions/unlabeled.json", "alpaca_instructions/val.json"
TRAIN = [
    {"instruction": "Name a colour.", "input": "", "output": "Green."},
    {"instruction": "Give the plural.", "input": "goose", "output": "Geese."},
    {"instruction": "Say no more.", "input": "", "output": ""},
    {"instruction": "Say more.", "input": ""},
]
VAL = [{"instruction": "Größe?", "input": "", "output": "Klein.", "sample_mode": "x"}]


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """As much of the hub's interface as its client asks for: datasets, alike at every commit, their files whole or from an offset on."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: set[str] = set()  # files in large file storage, whose SHA-256 the hub states
        self.licences: dict[str, str] = {}
        self.stated: dict[str, str] = {}  # another checksum than the file has
        self.cuts: dict[str, list[int]] = {}  # bytes after which the next answers are cut
        self.requests: list[tuple[str, str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            do_GET = do_POST = do_HEAD

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0)).decode()
        self.requests.append((handler.command, path, handler.headers.get("Range") or ""))
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        dataset = "/".join(parts[:2])
        if dataset == "me/gated":
            self.send(handler, 403, b"", {"X-Error-Code": "GatedRepo"})
        elif dataset not in self.files:
            self.send(handler, 404, b"", {"X-Error-Code": "RepoNotFound"})
        elif len(parts) > 3 and parts[3] not in ("main", COMMIT, FARM_COMMIT, EVAL_COMMIT):
            self.send(handler, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif not path.startswith("/api/"):
            self.send_file(handler, dataset, parts[3], "/".join(parts[4:]))
        elif parts[2:3] == ["paths-info"]:
            asked = parse_qs(body)["paths"]
            self.send_json(handler, [self.entry(dataset, file) for file in self.files[dataset] if file in asked])
        elif parts[2:3] == ["tree"]:
            self.send_json(handler, self.tree(dataset, "/".join(parts[4:]), "recursive=true" in urlsplit(handler.path).query.lower()))
        else:
            card = {"license": self.licences[dataset]} if dataset in self.licences else {}
            self.send_json(handler, {"id": dataset, "sha": COMMIT, "cardData": card, "tags": [], "siblings": []})

    def entry(self, dataset: str, file: str) -> dict:
        content = self.files[dataset][file]
        entry = {"type": "file", "path": file, "size": len(content), "oid": self.stated.get(file, git_id(content))}
        if file in self.large:
            oid = self.stated.get(file, hashlib.sha256(content).hexdigest())
            entry |= {"oid": "0" * 40, "lfs": {"oid": oid, "size": len(content), "pointerSize": 130}}
        return entry

    def tree(self, dataset: str, folder: str, recursive: bool) -> list[dict]:
        under = f"{folder}/" if folder else ""
        files = [file for file in self.files[dataset] if file.startswith(under)]
        folders = {str(parent) for file in files for parent in Path(file).parents} - {".", folder}
        entries = [self.entry(dataset, file) for file in files]
        entries += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        return [entry for entry in entries if recursive or "/" not in entry["path"].removeprefix(under)]

    def send_file(self, handler: BaseHTTPRequestHandler, dataset: str, commit: str, file: str) -> None:
        if file not in self.files[dataset]:
            self.send(handler, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content = self.files[dataset][file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_id(content)}"', "Accept-Ranges": "bytes"}
        asked = handler.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        cuts = self.cuts.get(file)
        self.send(handler, 206 if asked else 200, content, headers, cuts.pop(0) if cuts and handler.command == "GET" else None)

    def send_json(self, handler: BaseHTTPRequestHandler, content: object) -> None:
        self.send(handler, 200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict, cut: int | None = None) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body[:cut])
        if cut is not None:
            handler.close_connection = True


@pytest.fixture
def hub():
    hub = Hub()
    hub.files[FARM] = {
        UNLABELED: json.dumps(TRAIN).encode(),
        VALIDATION: json.dumps(VAL).encode(),
    }
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def prepare(tmp_path: Path, *words: object, endpoint: str = "http://127.0.0.1:1", offline: str = "0") -> subprocess.CompletedProcess:
    """The command as a user types it, with the hub at `endpoint` and an own cache."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": offline}
    command = [sys.executable, "data/prepare_data.py", *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)


def last_line(done: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def run(monkeypatch, *words: object) -> None:
    """The same in this process, for what needs no hub."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
    prepare_data.main()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------- the hub


def test_alpacafarm_and_a_connection_that_is_cut(hub, tmp_path):
    words = ("alpacafarm", "--revision", "main", "--data_dir", tmp_path / "data")
    hub.files[FARM][UNLABELED] += 12_000_000 * b" "  # the client keeps what it has in pieces of 10 MiB
    hub.cuts = {UNLABELED: [11_000_000], VALIDATION: [30] + 5 * [0]}
    done = prepare(tmp_path, *words, endpoint=hub.url)
    assert done.returncode == 1
    assert last_line(done).startswith(f"error: {FARM}: {VALIDATION} at {COMMIT}: {hub.url} did not deliver it (RemoteProtocolError: ")
    assert last_line(done).endswith("; run the same command again")
    assert ("GET", f"/datasets/{FARM}/resolve/{COMMIT}/{UNLABELED}", "bytes=10485760-") in hub.requests
    assert names(tmp_path / "data") == ["alpacafarm_train.json", "alpacafarm_train.meta.json"]
    assert read_rows(tmp_path / "data" / "alpacafarm_train.json", {"input": None}) == [
        {"input": "Name a colour.", "output": "Green."},
        {"input": "Give the plural.\n\n### Input:\ngoose", "output": "Geese."},
        {"input": "Say no more.", "output": ""},
        {"input": "Say more."},
    ]

    done = prepare(tmp_path, *words, endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/data/alpacafarm_train.json: already there, as this command makes it\n" in done.stdout
    assert f"{tmp_path}/data/alpacafarm_val.json: 1 rows. Licence of the data: CC BY-NC 4.0 (research only)" in done.stdout
    assert read_rows(tmp_path / "data" / "alpacafarm_val.json", {}) == [{"input": "Größe?", "output": "Klein."}]
    record = read_json(tmp_path / "data" / "alpacafarm_val.meta.json")
    assert record["source"] == {"dataset": FARM, "file": VALIDATION, "revision": COMMIT}
    assert record["files"] == {VALIDATION: hashlib.sha256(hub.files[FARM][VALIDATION]).hexdigest()}
    assert (record["rows"], record["licence"][:12]) == (1, "CC BY-NC 4.0")


def test_a_pinned_file_with_other_content_is_refused(hub, tmp_path):
    done = prepare(tmp_path, "alpacafarm", "--data_dir", tmp_path / "data", endpoint=hub.url)
    found, pinned = git_id(hub.files[FARM][UNLABELED]), "9b7955c8bbc3cb7046bd6fc86be20af85daa9256"
    assert done.returncode == 1
    assert last_line(done).startswith(f"error: {FARM}: {UNLABELED} at {FARM_COMMIT}: the checksum is {found}, expected {pinned}; ")
    assert not (tmp_path / "data").exists()


def test_a_checksum_other_than_the_hub_states(hub, tmp_path):
    rows = [{"dataset": "d", "instruction": "i", "output": "o", "generator": "g"}]
    content = json.dumps([{**row, "extra": 1} for row in rows]).encode()
    hub.files[EVAL], hub.large, hub.stated = {"alpaca_eval.json": content}, {"alpaca_eval.json"}, {"alpaca_eval.json": 32 * "ab"}
    words = ("alpaca_eval", "--revision", "main", "--data_dir", tmp_path / "data")
    done = prepare(tmp_path, *words, endpoint=hub.url)
    found = hashlib.sha256(content).hexdigest()
    assert done.returncode == 1
    assert f"error: {EVAL}: alpaca_eval.json at {COMMIT}: the checksum is {found}, expected {32 * 'ab'}; the file is" in last_line(done)
    assert not (tmp_path / "data").exists()

    hub.stated.clear()
    done = prepare(tmp_path, *words, endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "data" / "alpaca_eval.json", {}) == rows
    assert [request[0] for request in hub.requests if request[1].endswith("/alpaca_eval.json")] == ["HEAD", "GET", "HEAD", "GET"]


def test_a_hub_dataset(hub, tmp_path):
    content = b"question,answer,qtype\n2 + 3?,5,CONSTRAINED\n"
    card = b"---\nconfigs:\n- config_name: one\n  data_files: one/*.csv\n- config_name: two\n  data_files: two/*.csv\n---\n"
    hub.files["me/mine"] = {"README.md": card, "one/a.csv": b"x\n1\n", "two/a.csv": content, "two/b.csv": content}
    hub.licences["me/mine"] = "mit"
    words = ("me/mine", "--subset=two", "--input_column=question", "--output_column=answer", "--output", tmp_path / "mine.json")
    done = prepare(tmp_path, *words, endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/mine.json: 2 rows. Licence of the data: mit\n"
    assert read_rows(tmp_path / "mine.json", {}) == 2 * [{"input": "2 + 3?", "output": "5", "qtype": "CONSTRAINED"}]
    checksum = hashlib.sha256(content).hexdigest()
    assert read_json(tmp_path / "mine.meta.json")["files"] == {"two/a.csv": checksum, "two/b.csv": checksum}
    done = prepare(tmp_path, *words[:2], "--split=dev", "--output", tmp_path / "dev.json", endpoint=hub.url)
    assert (done.returncode, last_line(done)) == (2, "error: me/mine: no split 'dev', expected one of train")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["alpaca_eval", "--revision", "main"], "tatsu-lab/alpaca_eval at main: no such dataset on {url}, or a private one (HF_TOKEN)"),
        (["alpacafarm", "--revision", "v9"], "tatsu-lab/alpaca_farm at v9: no such revision on {url}"),
        (["alpacafarm", "--revision", "main"], f"{FARM}: {VALIDATION} at {COMMIT}: no such file"),
        (["me/gated", "--output", "x.json"], "me/gated: gated; accept its terms on {url} and set HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_give(hub, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(prepare_data, "PUBLISHED", {**prepare_data.PUBLISHED, "alpacafarm": prepare_data.PUBLISHED["alpacafarm"][1:]})
    del hub.files[FARM][VALIDATION]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        run(monkeypatch, *words)
    assert str(error.value) == message.format(url=hub.url)
    assert list(tmp_path.iterdir()) == []


def test_no_hub_to_be_reached(tmp_path):
    done = prepare(tmp_path, "alpaca_eval", "--revision", "main", "--data_dir", tmp_path / "data")
    assert done.returncode == 1
    assert last_line(done).startswith("error: tatsu-lab/alpaca_eval at main: http://127.0.0.1:1 did not deliver it (ConnectError: ")
    done = prepare(tmp_path, "alpaca_eval", "--data_dir", tmp_path / "data", offline="1")
    assert done.returncode == 2
    assert last_line(done).endswith(
        f"at {EVAL_COMMIT}: not cached, and HF_HUB_OFFLINE is set (the Makefile does); HF_HUB_OFFLINE=0 fetches it"
    )
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif("RER_REAL_DATA" not in os.environ, reason="RER_REAL_DATA is not set")
def test_the_pinned_files_are_the_published_ones(hub, tmp_path):
    """The real rows, written as the publishers wrote them, have the pinned checksums and come out as they are used."""
    real = Path(os.environ["RER_REAL_DATA"]) / "data"
    validation = [{"input": row["input"], "output": row["output"]} for row in read_rows(real / "alpacafarm_val.json", {"output": None})]
    parts = [row["input"].partition("\n\n### Input:\n") for row in validation]
    rows = [{"instruction": part[0], "input": part[2], "output": row["output"]} for part, row in zip(parts, validation)]
    path = tmp_path / "val.json"
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    pinned = prepare_data.PUBLISHED["alpacafarm"][1].checksum
    assert prepare_data.content_checksum(path, pinned) == pinned
    assert prepare_data.alpacafarm_rows(path) == validation

    fields = ("dataset", "instruction", "output", "generator")
    rows = [{field: row[field] for field in fields} for row in read_rows(real / "alpaca_eval.json", dict.fromkeys(fields))]
    hub.files[EVAL] = {"alpaca_eval.json": json.dumps(rows, indent=2).encode()}
    done = prepare(tmp_path, "alpaca_eval", "--data_dir", tmp_path, endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "alpaca_eval.json", {}) == rows
    assert len(rows) == 805


# ----------------------------------------------------------------------------------------------------------- one's own file


def write_table(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif "lines" in path.name:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")


@pytest.mark.parametrize("name", ["mine.json", "lines.jsonl", "lines.json", "mine.csv", "mine.parquet"])
def test_a_file_of_ones_own(tmp_path, monkeypatch, capsys, name):
    path, target = tmp_path / name, tmp_path / "out" / "rows.json"
    rows = [
        {"question": 'Was, "bitte"?', "answer": "Eine\nZeile.", "qtype": "OPENENDED", "id": "1"},
        {"question": "2 + 3?", "answer": "5", "qtype": "CONSTRAINED", "id": "2"},
    ]
    write_table(path, rows)
    words = (path, "--input_column", "question", "--output_column", "answer", "--output", target)
    run(monkeypatch, *words)
    assert capsys.readouterr().out == f"{target}: 2 rows. Licence of the data: that of your file\n"
    assert read_rows(target, {}) == [
        {"input": 'Was, "bitte"?', "output": "Eine\nZeile.", "qtype": "OPENENDED"},
        {"input": "2 + 3?", "output": "5", "qtype": "CONSTRAINED"},
    ]
    assert names(target.parent) == ["rows.json", "rows.meta.json"]

    run(monkeypatch, *words)
    assert capsys.readouterr().out == f"{target}: already there, as this command makes it\n"
    with pytest.raises(InputError, match="column 'question'|rows.json: exists and is not what this command makes; --overwrite=true"):
        run(monkeypatch, path, "--input_column", "question", "--output_column=", "--output", target)
    run(monkeypatch, path, "--input_column", "question", "--output_column=", "--output", target, "--overwrite=true")
    assert read_rows(target, {}) == [
        {"input": 'Was, "bitte"?', "qtype": "OPENENDED"},
        {"input": "2 + 3?", "qtype": "CONSTRAINED"},
    ]


def test_an_output_that_was_edited_stays(tmp_path, monkeypatch):
    path, target = tmp_path / "mine.json", tmp_path / "rows.json"
    write_table(path, [{"input": "a", "output": "b"}])
    run(monkeypatch, path, "--output", target)
    target.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="rows.json: exists and is not what this command makes"):
        run(monkeypatch, path, "--output", target)
    assert target.read_text(encoding="utf-8") == "[]"


def test_another_checksum_than_an_earlier_run_recorded(tmp_path, monkeypatch):
    path, target = tmp_path / "mine.json", tmp_path / "rows.json"
    write_table(path, [{"input": "a", "output": "b"}])
    run(monkeypatch, path, "--output", target)
    record = read_json(tmp_path / "rows.meta.json")
    found = record["files"][str(path)]
    record["files"][str(path)] = "0" * 64
    (tmp_path / "rows.meta.json").write_text(json.dumps(record), encoding="utf-8")
    target.unlink()
    with pytest.raises(OSError, match=f"the SHA-256 is {found}, and .*rows.meta.json has {'0' * 64} for the same revision"):
        run(monkeypatch, path, "--output", target)
    assert not target.exists()


def test_a_qtype_that_is_not_ours_is_left_out(tmp_path, monkeypatch, capsys):
    write_table(tmp_path / "mine.json", [{"input": "a", "output": "b", "qtype": "factoid"}, {"input": "c", "output": "d"}])
    run(monkeypatch, tmp_path / "mine.json", "--output", tmp_path / "rows.json")
    assert read_rows(tmp_path / "rows.json", {}) == [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    assert "column 'qtype' is left out: not every row has OPENENDED or CONSTRAINED there\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"input": "x", "answer": "y"}]', "a.json: row 1: no column 'output', expected one of those found: input, answer"),
        ("a.jsonl", '{"input": "x", "output": "y"}\n{"input": "x", "output": 3}\n', "row 2: column 'output' is int, expected text"),
        ("a.json", '{"input": "x", "output": "y"}\n{"input"\n', "a.json: line 2: broken JSON"),
        (
            "a.jsonl",
            '{"input": "bad \\ud83d", "output": "y"}\n',
            "a.jsonl: row 1: column 'input' holds half of a surrogate pair at character 5",
        ),
        ("a.json", '{"input": "x", "output": %s}\n{"input": "y"}\n' % ("1" * 5000), "a.json: line 1: broken JSON .Exceeds the limit"),
        ("a.csv", "input,output\nx,y\nz\n", "a.csv: row 2: has more or fewer cells than the 2 columns"),
        ("a.csv", "input,output\n", "a.csv: no rows, expected at least one"),
        ("a.csv", "input,output\nx,y\n ,y\n", "a.csv: row 2: column 'input' is empty, expected a prompt"),
        ("a.csv", 'input,output\n"x,y\n', "a.csv: line 2: broken CSV"),
        ("a.csv", "question,output\nx,y\n", "a.csv: row 1: no column 'input', expected one of those found: question, output"),
        ("a.parquet", "no", "a.parquet: not a Parquet file"),
        ("b.json", None, "b.json: no such file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, monkeypatch, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        run(monkeypatch, tmp_path / name, "--output", tmp_path / "rows.json")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "rows.json").exists()


def test_lines_in_a_json_file_with_a_byte_order_mark(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('\ufeff{"input": "x", "output": "y"}\n{"input": "z", "output": ""}\n', encoding="utf-8")
    run(monkeypatch, tmp_path / "a.json", "--output", tmp_path / "rows.json")
    assert read_rows(tmp_path / "rows.json", {}) == [{"input": "x", "output": "y"}, {"input": "z", "output": ""}]


def test_parquet_without_the_column(tmp_path, monkeypatch):
    write_table(tmp_path / "a.parquet", [{"q": "x", "a": "y"}])
    with pytest.raises(InputError, match="a.parquet: no column 'input', expected one of those found: q, a"):
        run(monkeypatch, tmp_path / "a.parquet", "--output", tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["alpaca_farm"], "alpaca_farm: expected alpacafarm, alpaca_eval, superni, a .json"),
        (["hub"], "hub: expected alpacafarm"),
        (["me/my--set"], "me/my--set: expected alpacafarm"),
        (["./mine"], "./mine: expected alpacafarm"),
        (["superni", "--url", "https://:secret@example.org/x"], "--url holds credentials"),
        (["superni", "--url", "https://example.org/x?private_token=secret"], "--url holds credentials or a query"),
        (["alpacafarm", "--output", "x.json"], "--output has no meaning for alpacafarm"),
        (["alpaca_eval", "superni"], "2 sources given, expected one: alpaca_eval superni"),
        (["superni", "--revision", "master"], "--revision is 'master', expected a whole commit hash for superni"),
        (["superni", "--url", "https://secret@example.org/x"], "--url holds credentials"),
        (["me/mine"], "--output is '', expected a .json file for the rows of me/mine"),
    ],
)
def test_settings_that_do_not_fit(monkeypatch, words, message):
    with pytest.raises(InputError, match=message) as error:
        run(monkeypatch, *words)
    assert "secret" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- superni


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """A git repository in the shape of the benchmark's: its folder, and its one commit."""
    folder = tmp_path / "remote"
    task = {"Definition": ["Add."], "Categories": ["Arithmetic"], "Instances": [{"id": "i", "input": "2 + 3", "output": ["5"]}]}
    files = {"LICENSE": "Apache", "README.md": "no", "splits/default/test_tasks.txt": "task1_a\ntask2_b\n", "splits/xlingual/x.txt": "no"}
    for name, text in {**files, **{f"tasks/{name}.json": json.dumps(task) for name in ("task1_a", "task2_b", "task3_c")}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["config", "uploadpack.allowFilter", "true"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setattr(prepare_data, "TASKS_AT_ONCE", 1)
    return folder, head


def test_superni(tmp_path, monkeypatch, capsys, benchmark):
    from parts.superni import read_instances

    folder, commit = benchmark
    words = ("superni", "--url", folder, "--revision", commit, "--data_dir", tmp_path / "data")
    run(monkeypatch, *words)
    target = tmp_path / "data" / "natural-instructions"
    assert f"{target}: 2 tasks. Licence of the data: Apache-2.0" in capsys.readouterr().out
    assert names(target) == ["LICENSE", "splits/default/test_tasks.txt", "tasks/task1_a.json", "tasks/task2_b.json"]
    instances = read_instances(str(target), [], 100)
    assert [(row.task, row.instruction, row.references) for row in instances] == [
        ("task1_a", "Add.\n\n2 + 3", ("5",)),
        ("task2_b", "Add.\n\n2 + 3", ("5",)),
    ]
    record = read_json(tmp_path / "data" / "natural-instructions.meta.json")
    assert record["source"] == {"repository": str(folder), "revision": commit}
    assert record["outputs"]["natural-instructions/LICENSE"] == hashlib.sha256(b"Apache").hexdigest()

    run(monkeypatch, *words)
    assert capsys.readouterr().out == f"{target}: already there, as this command makes it\n"
    (target / "tasks" / "task1_a.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="natural-instructions: exists and is not what this command makes"):
        run(monkeypatch, *words)
    run(monkeypatch, *words, "--overwrite=true")
    assert len(read_instances(str(target), [], 100)) == 2


def test_superni_that_cannot_be_fetched_leaves_nothing(tmp_path, monkeypatch, benchmark):
    folder, commit = benchmark
    for url, revision, message in ((tmp_path / "nowhere", commit, "git fetch: fatal: "), (folder, "0" * 40, "git fetch: ")):
        with pytest.raises(OSError, match=message):
            run(monkeypatch, "superni", "--url", url, "--revision", revision, "--data_dir", tmp_path / "data")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for lost, message in (
        ("tasks/task2_b.json", "no tasks/task2_b.json at {}, which splits/default/test_tasks.txt names"),
        ("splits/default/test_tasks.txt", "no splits/default/test_tasks.txt at {}"),
    ):
        subprocess.run([*git, "rm", "-q", lost], check=True)
        subprocess.run([*git, "commit", "-qm", "y"], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        with pytest.raises(InputError, match=message.format(head)):
            run(monkeypatch, "superni", "--url", folder, "--revision", head, "--data_dir", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_conversation_keeps_its_turns(tmp_path, monkeypatch):
    """The policy is to see all turns, as where such a file is read without preparing."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Name a dog."}]
    answer = {"role": "assistant", "content": "Rex"}
    path, target = tmp_path / "talk.jsonl", tmp_path / "rows.json"
    path.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in ([*turns, answer], [turns[0], answer])), encoding="utf-8"
    )
    run(monkeypatch, path, "--output", target)
    first, second = json.loads(target.read_text(encoding="utf-8"))
    assert first == {"input": "User: Hi\n\nAssistant: Hello\n\nUser: Name a dog.", "output": "Rex", "messages": turns}
    assert second == {"input": "Hi", "output": "Rex"}
    assert read_rows(target, {})[0]["messages"] == turns
    write_table(tmp_path / "talk.parquet", [{"messages": [*turns, answer]}, {"messages": [turns[0], answer]}])
    path.rename(tmp_path / "lines.json")
    for other in ("talk.parquet", "lines.json"):
        run(monkeypatch, tmp_path / other, "--output", tmp_path / f"{other}.rows.json")
        assert json.loads((tmp_path / f"{other}.rows.json").read_text(encoding="utf-8")) == [first, second]


def test_turns_that_are_not_the_prompt_are_left_out(tmp_path, monkeypatch):
    """They may hold the answer, and a policy would be shown them in the prompt's place."""
    path, target = tmp_path / "both.jsonl", tmp_path / "rows.json"
    turns = [{"role": "user", "content": "Name a dog."}, {"role": "assistant", "content": "Rex"}]
    rows = [{"input": "Name a dog.", "output": "Rex", "messages": messages} for messages in (turns, "see thread 3", None)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_rows(path, {}) == [{"input": "Name a dog.", "output": "Rex"}] * 3
    run(monkeypatch, path, "--output", target)
    assert json.loads(target.read_text(encoding="utf-8")) == [{"input": "Name a dog.", "output": "Rex"}] * 3


@pytest.mark.parametrize("name", ["both.jsonl", "both.json", "both.parquet"])
def test_turns_beside_the_columns_asked_for_are_not_read(tmp_path, monkeypatch, name):
    path, target = tmp_path / name, tmp_path / "rows.json"
    turns = [{"role": "user", "content": "Name a dog."}, {"role": "tool", "content": "{}"}]
    rows = [{"question": "Name a dog.", "answer": "Rex", "messages": turns}]
    if name.endswith("parquet"):
        write_table(path, rows)
    else:
        path.write_text(json.dumps(rows if name.endswith("json") else rows[0]), encoding="utf-8")
    run(monkeypatch, path, "--input_column=question", "--output_column=answer", "--output", target)
    assert json.loads(target.read_text(encoding="utf-8")) == [{"input": "Name a dog.", "output": "Rex"}]
    with pytest.raises(InputError, match="row 1: field 'messages' has the roles"):
        run(monkeypatch, path, "--output", tmp_path / "other.json")


def test_one_column_is_not_both(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--input_column and --output_column are both 'text', expected two columns"):
        run(monkeypatch, tmp_path / "a.json", "--input_column=text", "--output_column=text", "--output", tmp_path / "b.json")
