"""Data files checked: every problem of a file in one pass, with exact reports, in little memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter

import pytest
from conftest import REPOSITORY, ROWS, run_script

from evaluation import training_files
from parts.chat_templates import load_template
from parts.data_checks import PromptIndex, Tokens, check_rows, examine, index_prompts, quantiles, too_long
from parts.errors import InputError
from parts.files import file_digest, write_json
from parts.rows import QTYPES, Problem, iterate_rows
from parts.runs import Checkpoint

SCRIPT = REPOSITORY / "data" / "validate.py"


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in path.name else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def problems(path, **options):
    return [str(row) for _, row in iterate_rows(path, **options) if isinstance(row, Problem)]


# ---------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("chunk", [1, 5, 64, 2**20])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "rows.jsonl.gz"])
def test_rows_come_as_they_were_written_whatever_the_chunks(tmp_path, name, chunk):
    rows = [{"input": 'é "quoted" \\ \n\u2028 😀 ][}{,'}, {}, [], [1e-07, -2.5e10, True, None], "text", 12345678901234, 1e-5]
    assert list(iterate_rows(write(tmp_path / name, rows), chunk=chunk)) == list(enumerate(rows, start=1))


def test_a_list_may_hold_any_white_space(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\n\t [\r\n\r\n {"input"\n:\t"a"}\n\n,' + " " * 3000 + '{"input": "b"}\n]\n \n', encoding="utf-8")
    assert list(iterate_rows(path)) == [(1, {"input": "a"}), (2, {"input": "b"})]


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize(
    ("name", "content", "rows", "found"),
    [
        ("a.json", b"", 0, ["empty file, expected a JSON list of rows"]),
        ("a.json", b" [ ] ", 0, ["no rows, expected at least one"]),
        ("a.jsonl", b"\n\n", 0, ["no rows, expected at least one"]),
        ("a.json", b'{"input": "a"}', 0, ["expected a JSON list of rows, found dict"]),
        ("a.json", b" 12", 0, ["expected a JSON list of rows, found int"]),
        ("a.json", b'[{"input": "a"},\n {"input": ', 1, ["broken JSON (Expecting value at line 2, column 12)"]),
        ("a.json", b'[{"input": "a"}\n\n{"input": "b"}]', 1, ["broken JSON (Expecting ',' delimiter at line 3, column 1)"]),
        ("a.json", b'[{"input": "a"},\n{"input": "b}]', 1, ["broken JSON (Unterminated string starting at at line 2, column 11)"]),
        ("a.json", b'["a", "b",]', 2, ["broken JSON (Expecting value at line 1, column 11)"]),
        ("a.json", b'["a"]\n["b"]', 1, ["broken JSON (Extra data at line 2, column 1)"]),
        ("a.jsonl", b'{"a": 1}\n{oops}\n\n{"b": 2}\n[1', 2, [
            "line 2: broken JSON (Expecting property name enclosed in double quotes at column 2)",
            "line 5: broken JSON (Expecting ',' delimiter at column 3)",
        ]),
        ("a.json", '["é", "\u20ac", "'.encode() + b'\xe9", "c", "d\xff"]', 3, ["row 3: byte 15 is not UTF-8 text", "row 5: byte 26 is not UTF-8 text"]),
        ("a.jsonl", '"é"\n"\u20ac'.encode() + b'\xe9"\n"c"\n', 2, ["row 2: byte 9 is not UTF-8 text"]),
        ("a.json", b'\xef\xbb\xbf["a", "\xff"]', 1, [
            "the file begins with a byte order mark, which JSON does not allow", "row 2: byte 10 is not UTF-8 text"
        ]),
        ("a.json.gz", b"no gzip", 0, ["not a whole gzip file (Not a gzipped file (b'no'))"]),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_whole(tmp_path, name, content, rows, found, chunk):
    path = tmp_path / name
    path.write_bytes(content)
    assert problems(path, chunk=chunk) == found
    assert sum(not isinstance(row, Problem) for _, row in iterate_rows(path, chunk=chunk)) == rows


def test_a_gzip_file_cut_short_and_a_spoilt_one(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", [{"input": str(number)} for number in range(20000)]).read_bytes()
    cut, spoilt = tmp_path / "cut.jsonl.gz", tmp_path / "spoilt.jsonl.gz"
    cut.write_bytes(whole[:-20])
    spoilt.write_bytes(whole[:40] + b"\xff" * 40 + whole[80:])
    assert problems(cut)[-1] == "not a whole gzip file (Compressed file ended before the end-of-stream marker was reached)"
    assert "not a whole gzip file (Error -3 while decompressing data" in problems(spoilt)[-1]


@pytest.mark.parametrize(("name", "place"), [("a.json", ""), ("a.jsonl", "line 1: ")])
def test_a_row_without_end_and_one_nested_too_deeply(tmp_path, name, place):
    opening = "" if ".jsonl" in name else "["
    (tmp_path / name).write_text(opening + '"' + "a" * 5000 + '"' + "]" * len(opening), encoding="utf-8")
    at = "" if place else " at line 1, column 2"
    assert problems(tmp_path / name, chunk=100, row_limit=1000) == [f"{place}broken JSON (no end within 1000 characters{at})"]
    (tmp_path / name).write_text(opening + "[" * 90000 + "]" * 90000 + "]" * len(opening), encoding="utf-8")
    (found,) = problems(tmp_path / name, chunk=100, row_limit=10**6)
    assert "recursion" in found


# ---------------------------------------------------------------------------------------------------------------- prompts


def test_repeated_prompts_and_those_of_another_file():
    index, other = PromptIndex(), PromptIndex()
    for number, prompt in [
        (1, "Name a cat."),
        (2, "Name a dog."),
        (4, " name  A\nCAT. "),
        (5, "STRASSE"),
        (9, "straße"),
        (10, "Name a cat."),
    ]:
        index.add(number, prompt)
    for number, prompt in [(3, "name a dog."), (5, "Name a cow."), (6, "Name a dog."), (7, "\ud800")]:
        other.add(number, prompt)
    assert [found.tolist() for found in index.repeated()] == [[4, 9, 10], [1, 5, 1]]
    assert [found.tolist() for found in index.held_by(other)] == [[2], [3]]
    assert [found.tolist() for found in other.held_by(index)] == [[3, 6], [2, 2]]
    for empty in (PromptIndex().repeated(), index.held_by(PromptIndex()), PromptIndex().held_by(index)):
        assert [found.tolist() for found in empty] == [[], []]


def test_prompts_are_indexed_from_either_kind_of_file_or_refused(tmp_path):
    training = index_prompts(write(tmp_path / "train.jsonl", [{"input": "a"}, {"input": "b"}]))
    evaluation = index_prompts(write(tmp_path / "eval.json", [{"instruction": "B"}]))
    assert [found.tolist() for found in training.held_by(evaluation)] == [[2], [1]]
    with pytest.raises(InputError, match=r"bad.json: row 2: field 'instruction' is empty, expected a prompt$"):
        index_prompts(write(tmp_path / "bad.json", [{"instruction": "a"}, {"instruction": " \n"}]))
    with pytest.raises(InputError, match=r"bad.jsonl: line 1: broken JSON"):
        (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
        index_prompts(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match=r"nowhere.json: no such file$"):
        index_prompts(tmp_path / "nowhere.json")


# ---------------------------------------------------------------------------------------------------------------- scripts


def test_scripts_get_the_rows_and_one_warning(tmp_path, capsys):
    rows = [{"input": text, "qtype": "OPENENDED"} for text in ("a", "b", " B ", "c", "C")]
    train, dev = write(tmp_path / "train.json", rows), write(tmp_path / "dev.jsonl", [{"input": "b"}, {"input": "x"}])
    fields = {"input": None, "qtype": QTYPES}
    assert check_rows(dev, {"input": None}, against=[dev]) == [{"input": "b"}, {"input": "x"}]
    assert capsys.readouterr().out == ""  # a file shares its prompts with itself
    assert check_rows(train, fields, against=[train, dev]) == rows
    assert capsys.readouterr().out == (
        f"warning: {train}: of 5 prompts 2 repeat an earlier one, 2 are also in {dev} "
        f"(`python data/validate.py {train} --against {dev}` lists them)\n"
    )
    assert check_rows(train, fields) == rows
    assert capsys.readouterr().out == (
        f"warning: {train}: of 5 prompts 2 repeat an earlier one (`python data/validate.py {train}` lists them)\n"
    )
    with pytest.raises(InputError, match=r"nowhere.json: no such file$"):
        check_rows(train, fields, against=[tmp_path / "nowhere.json"])


def test_training_says_the_first_problem_and_how_many_more_there_are(tmp_path, tiny_model, rows_file):
    path = write(tmp_path / "bad.json", BAD_ROWS)
    done = run_script("run_ppo.py", f"--model_name={tiny_model}", "--chat_template_name=tokenizer", "--length_incentive=true",
                      "--reward_branching=true", "--rouge_l=true", f"--dataset_path={path}", f"--dev_prompt_path={rows_file}",
                      f"--output_dir={tmp_path / 'run'}")  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        f"error: {path}: row 2: field 'input' is empty, expected a prompt; 7 more problems: "
        f"`python data/validate.py {path} --require output qtype` lists all"
    )
    assert sum(examine(path, ["output", "qtype"]).errors.values()) == 8


def test_a_prompt_must_have_fewer_tokens_than_the_limit():
    assert too_long(9, 10) is None
    assert too_long(10, 10) == "field 'input' makes a prompt of 10 tokens, expected fewer than 10"


def test_evaluation_compares_with_the_files_that_were_trained_on(tmp_path, rows_file):
    digests = {"a": file_digest(rows_file), "b": file_digest(rows_file), "changed": "0" * 64}
    for name, digest in digests.items():
        record = {"settings": {"dataset_path": str(rows_file)}, "data": {"dataset_path": digest}}
        write_json(tmp_path / name / "training_record.json", record)
    assert training_files([Checkpoint(tmp_path / name) for name in ("a", "b", "no_record")]) == [str(rows_file)]
    assert training_files([Checkpoint(tmp_path / "changed")]) == []


# ----------------------------------------------------------------------------------------------------------------- report


def test_quantiles_are_lengths_that_occur():
    assert quantiles(Counter({7: 1})) == {"min": 7, "5%": 7, "50%": 7, "95%": 7, "max": 7}
    assert quantiles(Counter(range(1, 101))) == {"min": 1, "5%": 5, "50%": 50, "95%": 95, "max": 100}
    assert quantiles(Counter({0: 96, 10: 3, 30: 1})) == {"min": 0, "5%": 0, "50%": 0, "95%": 0, "max": 30}


BAD_ROWS = [
    {"input": "Name a cat.", "output": "Tom", "qtype": "CONSTRAINED"},
    {"input": "", "output": "x", "qtype": "OPENENDED"},
    {"input": " \n", "output": 3, "qtype": "OPEN"},
    ["Name a cow."],
    {"output": "x", "qtype": "OPENENDED"},
    {"input": "NAME A  CAT. ", "output": " ", "qtype": "OPENENDED"},
    {"input": "Name a dog.", "qtype": "OPENENDED"},
    {"input": "Name a caf\u00c3\u00a9.", "output": "one \ufffd two \ufffd", "qtype": "CONSTRAINED"},
    {"input": "Name a bell \u0007 sound.", "output": "a\ufeffb", "qtype": "CONSTRAINED"},
    {"input": "It\u00e2\u20ac\ud800\u2122s a long one", "output": "word " * 30, "qtype": "CONSTRAINED"},
]
LISTED = [
    "error: {0}: row 2: field 'input' is empty, expected a prompt",
    "error: {0}: row 3: field 'input' is empty, expected a prompt",
    "error: {0}: row 3: field 'output' is int, expected text",
    "error: {0}: row 3: field 'qtype' is 'OPEN', expected OPENENDED or CONSTRAINED",
    "error: {0}: row 4: expected an object, found list",
    "error: {0}: row 5: field 'input' is missing, expected text",
    "error: {0}: row 7: field 'output' is missing, expected text",
    "error: {0}: row 10: field 'input' holds half of a surrogate pair (U+D800) at character 5, expected text",
    "warning: {0}: row 6: field 'output' is empty",
    "warning: {0}: row 8: field 'input' holds 'Ã©', as UTF-8 does that was read as another encoding, at character 11",
    "warning: {0}: row 8: field 'output' holds the replacement character (U+FFFD) at character 5",
    "warning: {0}: row 9: field 'input' holds a control character (U+0007) at character 13",
    "warning: {0}: row 9: field 'output' holds a byte order mark (U+FEFF) at character 2",
    "warning: {0}: row 10: field 'input' holds 'â€', as UTF-8 does that was read as another encoding, at character 3",
    "warning: {0}: row 10: field 'output' has 150 characters",
    "warning: {0}: row 6: field 'input' is the prompt of row 1",
    "warning: {0}: row 7: field 'input' is the prompt of row 2 of {1}",
    "{0}: 10 rows; qtype CONSTRAINED 40.0%, OPENENDED 40.0%, unknown 10.0%",
    "                          min       5%      50%      95%      max",
    "  input words               0        0        3        5        5",
    "  output words              0        0        1       30       30",
    "  errors      empty prompt 2, not text 1, unknown value 1, not an object 1, missing field 2, lone surrogate 1",
    "  warnings    empty output 1, suspicious encoding 5, long text 1, repeated prompt 1, contamination 1",
]


@pytest.mark.parametrize("name", ["bad.json", "bad.jsonl.gz"])
def test_all_problems_are_listed_counted_and_written(tmp_path, name):
    path = write(tmp_path / name, BAD_ROWS)
    evaluated = write(tmp_path / "eval.json", [{"instruction": "Name a cow."}, {"instruction": "name a dog."}])
    done = run_script(SCRIPT, path, evaluated, "--against", evaluated, "--require", "output", "--long_text=100",
                      "--output", tmp_path / "out" / "report.json")  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: 10 problems in 2 of 2 files\n")
    lines = done.stdout.splitlines()
    assert lines[: len(LISTED)] == [line.format(path, evaluated) for line in LISTED]
    assert lines[len(LISTED) :][:2] == [
        f"error: {evaluated}: row 1: field 'output' is missing, expected text",
        f"error: {evaluated}: row 2: field 'output' is missing, expected text",
    ]
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["provenance"]["settings"]["require"] == ["output"]
    first, second = report["files"]
    assert {key: first[key] for key in first if key != "examples"} == {
        "path": str(path),
        "prompt_field": "input",
        "rows": 10,
        "qtypes": {"CONSTRAINED": 4, "OPENENDED": 4, "unknown": 1},
        "lengths": {
            "input words": {"min": 0, "5%": 0, "50%": 3, "95%": 5, "max": 5},
            "output words": {"min": 0, "5%": 0, "50%": 1, "95%": 30, "max": 30},
        },
        "errors": {"empty prompt": 2, "not text": 1, "unknown value": 1, "not an object": 1, "missing field": 2, "lone surrogate": 1},
        "warnings": {"empty output": 1, "suspicious encoding": 5, "long text": 1, "repeated prompt": 1, "contamination": 1},
    }
    assert first["examples"]["contamination"] == [{"row": 7, "text": f"field 'input' is the prompt of row 2 of {evaluated}"}]
    assert (second["prompt_field"], second["qtypes"], second["errors"]) == ("instruction", {"none": 2}, {"missing field": 2})
    assert second["warnings"] == {}  # a file is not contaminated by itself


def test_no_more_than_the_wanted_number_of_each_kind_is_listed(tmp_path):
    rows = [{"input": "same", "qtype": "X"} for _ in range(9)]
    path = write(tmp_path / "rows.jsonl", rows)
    report = examine(path, show=2)
    assert (report.errors, report.warnings) == ({"unknown value": 9}, {"repeated prompt": 8})
    assert {kind: [problem.row for problem in found] for kind, found in report.examples.items()} == {
        "unknown value": [1, 2], "repeated prompt": [2, 3]
    }  # fmt: skip
    assert f"error: {path}: 7 more of this kind (unknown value)" in report.describe()
    assert f"warning: {path}: 6 more of this kind (repeated prompt)" in report.describe()
    silent = examine(path, show=0)
    assert (silent.errors, silent.warnings) == (report.errors, report.warnings)
    assert silent.describe().count("row ") == 0


def test_references_and_qtypes_are_missed_only_where_they_are_required(tmp_path):
    path = write(tmp_path / "rows.json", [{"input": "a"}, {"input": "b", "output": "c", "qtype": "OPENENDED"}])
    assert examine(path).errors == {}
    assert examine(path).qtypes == {"none": 1, "OPENENDED": 1}
    assert examine(path, ["qtype", "output"]).errors == {"missing field": 2}
    empty = write(tmp_path / "null.json", [{"input": "a", "output": None, "qtype": None}])  # as pandas writes empty cells
    assert examine(empty).errors == {} and examine(empty).qtypes == {"none": 1}
    assert examine(empty, ["output"]).errors == {"not text": 1}
    assert examine(write(tmp_path / "x.json", [{"input": "a", "qtype": "x"}]), ["qtype"]).errors == {"unknown value": 1}


def test_the_french_and_the_portuguese_are_not_suspicious(tmp_path):
    texts = ["Voilà\u00a0! «\u00a0café\u00a0»", "NÃO, MAÇÃ, Ângela", "Tab\there\r\nnew line", "😀 \u200b ñ"]
    report = examine(write(tmp_path / "rows.json", [{"input": text} for text in texts]))
    assert report.warnings == {}


def test_prompts_are_counted_in_tokens_as_for_training(tmp_path, tiny_model, rows_file):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lengths = [len(tokenizer(f"<|im_start|>user\n{row['input']}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]) for row in ROWS]
    longest = max(lengths)
    words = [SCRIPT, rows_file, "--tokenizer", tiny_model, "--chat_template_name=tokenizer", "--output", tmp_path / "report.json"]
    assert run_script(*words, f"--max_prompt_length={longest + 1}").returncode == 0
    (report,) = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["files"]
    assert (report["lengths"]["input tokens"]["min"], report["lengths"]["input tokens"]["max"]) == (min(lengths), longest)
    assert report["lengths"]["output tokens"]["min"] == min(len(tokenizer(row["output"])["input_ids"]) for row in ROWS)
    unreadable = write(tmp_path / "half.json", [{"input": "a\ud800", "output": "b"}])
    report = examine(unreadable, tokens=Tokens(tokenizer, load_template("tokenizer", tokenizer), 512))
    assert (report.errors, list(report.lengths)) == ({"lone surrogate": 1}, ["input words", "output words", "output tokens"])
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "A cat?"}]
    asked = write(tmp_path / "turns.json", [{"input": "User: Hi\n\nAssistant: Hello\n\nUser: A cat?", "output": "b", "messages": turns}])
    report = examine(asked, tokens=Tokens(tokenizer, load_template("tokenizer", tokenizer), 512))
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert list(report.lengths["input tokens"]) == [len(tokenizer(own)["input_ids"])]
    done = run_script(*words, f"--max_prompt_length={longest}")
    row = lengths.index(longest) + 1
    assert (done.returncode, done.stderr) == (2, f"error: {lengths.count(longest)} problem in 1 of 1 files\n")
    assert done.stdout.splitlines()[0] == (
        f"error: {rows_file}: row {row}: field 'input' makes a prompt of {longest} tokens, expected fewer than {longest}"
    )


def test_unusable_settings_and_files_that_are_not_there(tmp_path, rows_file):
    done = run_script(SCRIPT, tmp_path / "nowhere.json", rows_file)
    assert (done.returncode, done.stderr) == (2, "error: 1 problem in 1 of 2 files\n")
    assert done.stdout.splitlines()[0] == f"error: {tmp_path}/nowhere.json: no such file"
    before = rows_file.read_bytes()
    for words, message in [
        ((rows_file, "--output", rows_file), f"--output is {rows_file}, which is one of the files to validate"),
        ((rows_file, "--show=-1"), "--show is -1, expected 0 or more"),
        ((rows_file, "--against", tmp_path / "eval.json"), f"{tmp_path}/eval.json: no such file"),
    ]:
        done = run_script(SCRIPT, *words)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
    assert rows_file.read_bytes() == before


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_is_never_in_memory(tmp_path, name):
    """60 MB of rows; read whole, their text alone would take as much, and their objects more."""
    path = tmp_path / name
    is_list = name == "rows.json"
    with path.open("w", encoding="utf-8") as file:
        file.write("[" * is_list)
        for number in range(30000):
            row = json.dumps({"input": f"{number // 2}. " + "Name a word. " * 70, "output": "A word. " * 130, "qtype": "OPENENDED"})
            file.write(",\n"[not is_list] * (number > 0) + row)
        file.write("]" * is_list)
    assert path.stat().st_size > 59e6
    program = (
        "import resource, sys\n"
        "from parts.data_checks import examine\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "report = examine(sys.argv[1], show=1)\n"
        "print(report.rows, dict(report.warnings), (peak() - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found, grown = done.stdout.strip().rsplit(" ", 1)
    assert found == "30000 {'repeated prompt': 15000}"
    assert int(grown) < 25  # MiB
