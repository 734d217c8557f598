"""Files in and out: one clear line for what is wrong, all or nothing for what is written."""

from __future__ import annotations

import gzip
import json
import subprocess

import pytest

from parts.errors import InputError
from parts.files import REPOSITORY, JsonLines, atomic_path, read_json, write_json
from parts.rows import QTYPES, read_rows, require_finite
from parts.runs import provenance

FIELDS = {"input": None, "qtype": QTYPES}
GOOD = [{"input": "a", "qtype": "OPENENDED"}, {"input": "b", "qtype": "CONSTRAINED"}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
def test_reading(tmp_path, name):
    text = json.dumps(GOOD) if name.endswith(".json") else "\n".join(map(json.dumps, GOOD)) + "\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_rows(path, FIELDS) == GOOD


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"", "rows.json: empty file, expected a JSON list of rows"),
        ("rows.json", b"[]", "rows.json: no rows, expected at least one"),
        ("rows.jsonl", b"\n\n", "rows.jsonl: no rows, expected at least one"),
        ("rows.json", b'[{"input": ', r"rows.json: broken JSON \(Expecting value at line 1, column"),
        ("rows.jsonl", b'{"input": "a", "qtype": "OPENENDED"}\n{oops}\n', "rows.jsonl: line 2: broken JSON"),
        ("rows.json", b'{"input": "a"}', "expected a JSON list of rows, found dict"),
        ("rows.json", b'[{"input": "a", "qtype": "OPENENDED"}, {"qtype": "OPENENDED"}]', "row 2: field 'input' is missing, expected text"),
        ("rows.json", b'[{"input": 3, "qtype": "OPENENDED"}]', "row 1: field 'input' is int, expected text"),
        ("rows.json", b'[{"input": "a", "qtype": "OPEN"}]', "row 1: field 'qtype' is 'OPEN', expected OPENENDED or CONSTRAINED"),
        ("rows.json", b'[{"input": " ", "qtype": "OPENENDED"}]', "row 1: field 'input' is empty, expected a prompt"),
        ("rows.json", b'["a"]', "row 1: expected an object, found str"),
        ("rows.json", b'["\xff"]', "byte 2 is not UTF-8 text"),
        ("rows.json.gz", b"no gzip", "not a whole gzip file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_rows(path, FIELDS)
    assert "\n" not in str(error.value)


def test_the_first_problem_and_the_number_of_the_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "a", "qtype": "X"}\n{oops}\n{"input": " "}\n{"input": "b", "qtype": "OPENENDED"}\n', encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_rows(path, FIELDS)
    assert str(error.value) == (
        f"{path}: row 1: field 'qtype' is 'X', expected OPENENDED or CONSTRAINED; 3 more problems: "
        f"`python data/validate.py {path} --require qtype` lists all"
    )
    with pytest.raises(InputError) as error:
        read_rows(path, {"input": None})
    assert str(error.value).endswith(f"; 1 more problem: `python data/validate.py {path}` lists all")


def test_a_byte_order_mark_does_not_matter(tmp_path):
    for name, text in (("rows.json", json.dumps(GOOD)), ("rows.jsonl", "\r\n".join(map(json.dumps, GOOD)))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_rows(tmp_path / name, FIELDS) == GOOD


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="nowhere.json: no such file"):
        read_rows(tmp_path / "nowhere.json", FIELDS)
    with pytest.raises(InputError, match="nowhere.json: no such file"):
        read_json(tmp_path / "nowhere.json")


def test_finite():
    assert require_finite([1, 2.5], "score") == [1.0, 2.5]
    with pytest.raises(InputError, match="score: row 2 has the value inf"):
        require_finite([1.0, float("inf")], "score")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "out.json"
    write_json(target, {"a": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert read_json(target) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_directory_is_replaced_whole(tmp_path):
    target = tmp_path / "checkpoint"
    for name in ("first", "second"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name, encoding="utf-8")
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "out.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_provenance_names_commit_and_versions(monkeypatch, tmp_path):
    record = provenance(seed=7)
    assert record["seed"] == 7
    assert record["packages"]["trl"] == "0.9.6"
    monkeypatch.setattr("parts.runs.REPOSITORY", tmp_path)
    assert provenance()["commit"] == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1", encoding="utf-8")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert provenance()["commit"] == head
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert provenance()["commit"] == f"{head}-dirty"


def test_json_lines_survive_a_cut_at_any_byte(tmp_path):
    whole = JsonLines(tmp_path / "whole.jsonl")
    assert list(whole.read()) == []
    whole.append({"row": 1, "text": "é\n"}, [2, 0.5])
    content = whole.path.read_bytes()
    lines = content.split(b"\n")
    for cut in range(len(content) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        log = JsonLines(path)
        kept = [{"row": 1, "text": "é\n"}, [2, 0.5]][: content[:cut].count(b"\n")]
        assert list(log.read()) == kept
        log.append("more")
        assert list(JsonLines(path).read()) == [*kept, "more"]
    (tmp_path / "whole.jsonl").write_bytes(lines[0] + b"\n{\n" + lines[1])
    with pytest.raises(InputError, match=r"whole.jsonl: line 2 is broken JSON"):
        list(whole.read())
    with pytest.raises(ValueError, match="not JSON compliant"):
        whole.append(float("nan"))


def test_what_a_reward_function_imports_from_its_folder_is_its_code(tmp_path):
    """Another number in a file that is imported is another reward; one that is not imported changes nothing."""
    from parts.files import code_files
    from reward_model import RewardSettings

    (tmp_path / "mine.py").write_text(
        "import json\nfrom weights import W\n\ndef reward(prompts, completions, **_):\n    import kit.more\n    return [W] * len(prompts)\n"
    )
    (tmp_path / "weights.py").write_text("from kit import scale\nW = 1\n")
    (tmp_path / "other.py").write_text("A = 1\n")
    (tmp_path / "kit").mkdir()
    for name, text in (("__init__", ""), ("scale", ""), ("unused", ""), ("more", "from .deep import B\nfrom . import side"), ("side", ""),
                       ("deep", "from reward_model import length_incentive\nB = 1")):  # fmt: skip
        (tmp_path / "kit" / f"{name}.py").write_text(f"{text}\n")
    names = {str(file.relative_to(tmp_path)) for file in code_files(tmp_path / "mine.py")}
    assert names == {"mine.py", "weights.py", "kit/__init__.py", "kit/scale.py", "kit/more.py", "kit/deep.py", "kit/side.py"}
    assert code_files(REPOSITORY / "examples" / "my_reward.py") == [REPOSITORY / "examples" / "my_reward.py"]  # uses reward_model.py

    def source():
        return RewardSettings(reward_function=[f"{tmp_path / 'mine.py'}:reward"]).reward_source()["mine.py"]

    before = source()
    (tmp_path / "other.py").write_text("A = 2\n")
    assert source() == before
    (tmp_path / "weights.py").write_text("from kit import scale\nW = 2\n")
    assert source() != before


def test_a_broken_checkpoint_is_none_of_the_newest(tmp_path, monkeypatch):
    """Else it would be kept in the place of the one just saved."""
    from parts import ppo_checkpoints

    for step in (0, 500, 1000, 1500):
        folder = tmp_path / f"run_step_{step}"
        folder.mkdir()
        (folder / ppo_checkpoints.RECORD).write_text(json.dumps({"step": step}), encoding="utf-8")
    monkeypatch.setattr(ppo_checkpoints, "fault", lambda folder: "cut short" if folder.name.endswith("1500") else None)
    ppo_checkpoints.prune(str(tmp_path / "run"), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_step_0", "run_step_1000", "run_step_1500"]


def test_processes_that_begin_apart_are_refused(monkeypatch):
    from pathlib import Path

    from parts import ppo_setup

    others = {"starts": []}
    monkeypatch.setattr(ppo_setup, "gather_object", lambda own: own + others["starts"])
    ppo_setup.check_same_start(Path("out_step_500"), 500)
    others["starts"] = [("None", 0)]
    with pytest.raises(InputError, match="one process begins at out_step_500, at step 500, another at the start: expected an output_dir"):
        ppo_setup.check_same_start(Path("out_step_500"), 500)
