"""Tables of gold scores and outputs of systems as they lie about: whatever is left out is said, whatever is ambiguous is refused."""

from __future__ import annotations

import json

import pytest
from conftest import run_script

from parts.designs import read_systems
from parts.errors import InputError
from parts.scores import read_gold_scores, read_leaderboard

GOOD = {"win_rate": {"claude-2": 10.0, "m2": 20.0, "m3": 30.0, "gpt-4": 40.0}}
LENGTH = {"avg_length": {"claude-2": 900.0, "m2": 1100.0, "m3": 1200.0, "gpt-4": 1300.0}}


def without(name: str) -> dict:
    return {column: {key: value for key, value in cells.items() if key != name} for column, cells in GOOD.items()}


@pytest.mark.parametrize(
    ("name", "text", "expected", "told"),
    [
        ("good.csv", "name,win_rate\nclaude-2,10.0\nm2,20.0\nm3,30.0\ngpt-4,40.0\n", GOOD, ""),
        ("percent.csv", 'name,win_rate,avg_length\nclaude-2,10.0%,900\nm2,20.0%,1100\nm3,30.0%,"1,200"\ngpt-4,40 %,1300\n', GOOD | LENGTH, ""),
        ("dash.csv", "name,win_rate\nclaude-2,10\nm2,-\nm3,30\ngpt-4,40\n", without("m2"), "left out: no score: win_rate of m2"),
        ("nan.csv", "name,win_rate\nclaude-2,10\nm2,nan\nm3,30\ngpt-4,40\n", without("m2"), "left out: no score: win_rate of m2"),
        ("none.csv", "name,win_rate\nclaude-2,10\nm2,N/A\nm3,30\ngpt-4,40\n", without("m2"), "left out: no score: win_rate of m2"),
        ("index.csv", ",generator,win_rate\n0,claude-2,10\n1,m2,20\n2,m3,30\n3,gpt-4,40\n", GOOD, ""),
        ("index_name.csv", ",name,win_rate\n0,claude-2,10\n1,m2,20\n2,m3,30\n3,gpt-4,40\n", GOOD, ""),
        ("saved_twice.csv", "Unnamed: 0,model,win_rate\n1,claude-2,10\n2,m2,20\n3,m3,30\n4,gpt-4,40\n", GOOD, ""),
        ("names_as_index.csv", ",win_rate\nclaude-2,10\nm2,20\nm3,30\ngpt-4,40\n", GOOD, ""),
        ("UPPER.CSV", "name,win_rate\nclaude-2,10\nm2,20\nm3,30\ngpt-4,40\n", GOOD, ""),
        ("bom_crlf.csv", "\ufeffname,win_rate\r\nclaude-2,10\r\nm2,20\r\nm3,30\r\ngpt-4,40\r\n", GOOD, ""),
        ("semi.csv", "name;win_rate\nclaude-2;10\nm2;20\nm3;30\ngpt-4;40\n", GOOD, ""),
        ("tab.tsv", "name\twin_rate\nclaude-2\t10\nm2\t20\nm3\t30\ngpt-4\t40\n", GOOD, ""),
        ("text.csv", "name,mode,win_rate\nclaude-2,a,10\nm2,b,20\nm3,c,30\ngpt-4,d,4e1\n", GOOD, "left out: columns without numbers: 'mode'"),
        ("t.json", json.dumps([{"name": name, "win_rate": value} for name, value in GOOD["win_rate"].items()]), GOOD, ""),
    ],
)  # fmt: skip
def test_leaderboards(tmp_path, capsys, name, text, expected, told):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_leaderboard(str(tmp_path / name)) == expected
    said = capsys.readouterr().err
    assert told in said and (told or not said)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name;win_rate\na;10,0\nb;20,0\n", "column 'win_rate' is '10,0', expected a point before decimals"),
        ("name,win_rate\na,10\nb,good\n", "row 2: field 'win_rate' is 'good', expected a number"),
        ("name,win_rate\na,10\nb,inf\n", "row 2: field 'win_rate' is 'inf', expected a number"),
        ("name;win_rate\na;0,512\nb;-0,433\n", "column 'win_rate' is '0,512', expected a point before decimals"),
        ("name;win_rate\na;012,345\nb;24\n", "row 1: field 'win_rate' is '012,345', expected a number"),
        ('name,win_rate\na,10\nb,"12,00"\n', "row 2: field 'win_rate' is '12,00', expected a number"),
        ("name,win_rate\na,10%\nb,0.2\n", "column 'win_rate' has percent signs in 1 of 2 cells, expected all or none"),
        ("name,win_rate,win_rate\na,10,11\nb,20,21\n", "column 'win_rate' comes twice"),
        ("name,win_rate\na,10\na,20\n", "row 2: name 'a' comes twice"),
        ("name,mode\na,x\nb,y\n", "no column of numbers"),
        ("name,win_rate\na,10\nb\n", "row 2: has more or fewer cells"),
        ("", "no rows"),
    ],
)
def test_leaderboards_that_are_refused(tmp_path, text, told):
    path = tmp_path / "board.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_leaderboard(str(path))
    assert told in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_gold_scores_by_step(tmp_path, capsys):
    path = tmp_path / "gold.csv"
    path.write_text('step,gold,share,note\n500,"1,200",40%,first\n1000,1300,50%,second\n', encoding="utf-8")
    assert read_gold_scores(str(path), [500, 1000]) == {"gold": [[1200.0], [1300.0]], "share": [[40.0], [50.0]]}
    assert "left out: columns without numbers: 'note'" in capsys.readouterr().err
    path.write_text("step,gold,human\n500,-,1\n1000,1300,2\n", encoding="utf-8")  # the first row used to decide
    assert read_gold_scores(str(path), [1000]) == {"gold": [[1300.0]], "human": [[2.0]]}
    with pytest.raises(InputError, match="row 1: field 'gold' is '-', expected a number"):
        read_gold_scores(str(path), [500])
    (tmp_path / "gold.json").write_text('[{"step": 5, "gold": true}, {"step": 6, "gold": 1.0}]', encoding="utf-8")
    with pytest.raises(InputError, match="row 1: field 'gold' is True, expected a number"):
        read_gold_scores(str(tmp_path / "gold.json"), [5])


def write_system(path, *, words: int, generator: str | None = None):
    rows = [
        {"instruction": text, "output": "word " * (words + place)} for place, text in enumerate(("Name a fruit.", "Name a city.", "Hello."))
    ]
    path.write_text(json.dumps([{**row, "generator": generator} if generator else row for row in rows]), encoding="utf-8")
    return path


def test_a_system_is_known_by_its_whole_name(tmp_path):
    files = [write_system(tmp_path / name, words=place + 1) for place, name in
             enumerate(("claude-2.json", "claude-2.1.json", "vicuna-v1.5.json", "openbuddy-llama-30b-v7.1.json"))]  # fmt: skip
    files.append(write_system(tmp_path / "x.y.json", words=2, generator="gpt-4"))
    systems = read_systems([str(path) for path in files])
    assert list(systems) == ["claude-2", "claude-2.1", "vicuna-v1.5", "openbuddy-llama-30b-v7.1", "gpt-4"]
    rows = [{"instruction": "a", "output": "b", "generator": name} for name in ("one", "two")]
    (tmp_path / "mixed.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(InputError, match="mixed.json: rows of the generators 'one', 'two', expected one system a file"):
        read_systems([str(tmp_path / "mixed.json")])
    (tmp_path / "list.json").write_text(json.dumps([{**rows[0], "generator": ["m"]}]), encoding="utf-8")
    with pytest.raises(InputError, match="list.json: row 1: field 'generator' is list, expected a name"):
        read_systems([str(tmp_path / "list.json")])


def test_win_rates_with_signs_are_ranked(tmp_path):
    """The whole column used to vanish, and the lengths were ranked in its place."""
    files = [write_system(tmp_path / f"{name}.json", words=words) for name, words in (("claude-2", 1), ("claude-2.1", 4), ("gpt-4", 7))]
    (tmp_path / "board.csv").write_text(
        "name,win_rate,avg_length\nclaude-2,30%,900\nclaude-2.1,20%,1100\ngpt-4,10%,1300\n", encoding="utf-8"
    )
    done = run_script("eval_monotonicity.py", "--rollouts", *files, f"--gold_scores={tmp_path}/board.csv", f"--output_dir={tmp_path}",
                      "--relevance_scaling=false", "--reward_branching=false", "--repetition_penalty=false")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "win_rate: SpearmanR -1.000" in done.stdout and "avg_length: SpearmanR 1.000" in done.stdout
