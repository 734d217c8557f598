"""Whatever bytes a file holds: its rows, or one line that names it. Whatever text is rewarded: a finite number."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parts.chat_templates import load_template
from parts.cli import Settings, parse_settings, setting
from parts.data_checks import examine, index_prompts
from parts.designs import read_systems
from parts.errors import InputError
from parts.features import tokens_of
from parts.files import JsonLines, read_csv, read_json, read_text
from parts.models import adapter_base
from parts.preferences import read_pairs
from parts.rows import match_rows, read_rows
from parts.runs import Checkpoint
from parts.scores import ScoreStore, read_gold_scores, read_leaderboard
from parts.superni import read_instances
from reward_model import ReversedEngineeredRewardForInference

QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["1", "40%", "-", "\ud800", "1,200"])
)
NAMES = st.sampled_from(
    ["instruction", "input", "output", "messages", "preference", "output_1", "output_2", "generator", "step", "gold", "qtype"]
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content"]), st.sampled_from(["user", "assistant", "a"]) | SCALARS, max_size=2), max_size=3
)
ROWS = st.lists(st.dictionaries(NAMES, SCALARS | MESSAGES, max_size=6), max_size=4)
TABLES = st.lists(
    st.lists(st.sampled_from(["step", "name", "gold", "1", "2", "40%", "-", '"', "", "1,2", "x"]), min_size=1, max_size=3), max_size=4
)


def spelled(rows: object) -> bytes:
    return json.dumps(rows).encode()


CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    ROWS.map(spelled),
    ROWS.map(lambda rows: b"\n".join(map(spelled, rows))),
    st.tuples(ROWS.map(spelled), st.integers(0, 200)).map(lambda cut: cut[0][: cut[1]]),
    st.dictionaries(
        NAMES | st.sampled_from(["name", "base_model_name_or_path", "settings", "scorer"]) | st.text(max_size=5), SCALARS, max_size=3
    ).map(spelled),
    st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"[1e999]", b"\xef\xbb\xbf[]", b"[{}]", b"null", b"NaN"]),
)
CSVS = st.one_of(CONTENTS, *(TABLES.map(lambda rows, mark=mark: "\n".join(map(mark.join, rows)).encode()) for mark in ",;\t"))


@dataclass
class Example(Settings):
    step: int = setting(1, "a number", least=1)
    gold: bool = setting(False, "a switch")
    name: list[str] = setting([], "names", path=True)


def config_file(path: Path) -> None:
    parse_settings(Example, [f"--config={path}"])


def checkpoint(path: Path) -> None:
    folder = path.parent / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "training_record.json").write_bytes(path.read_bytes())
    _ = Checkpoint(folder).trained


def adapter(path: Path) -> None:
    (path.parent / "adapter_config.json").write_bytes(path.read_bytes())
    adapter_base(path.parent)


def superni(path: Path) -> None:
    root = path.parent / "superni"
    for folder in (root / "splits" / "default", root / "tasks"):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "splits" / "default" / "test_tasks.txt").write_text("task1\n", encoding="utf-8")
    (root / "tasks" / "task1.json").write_bytes(path.read_bytes())
    read_instances(str(root), [], 3)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "text": ("a.txt", read_text),
    "text.gz": ("a.txt.gz", read_text),
    "object": ("a.json", read_json),
    "lines": ("a.jsonl", lambda path: list(JsonLines(path).read())),
    "scores": ("a.scores.jsonl", lambda path: ScoreStore(path, {})),
    "csv": ("a.csv", read_csv),
    "rows": ("a.json", lambda path: read_rows(path, {"input": None})),
    "rows of lines": ("a.jsonl", lambda path: read_rows(path, {"instruction": None, "output": None})),
    "rows.gz": ("a.json.gz", lambda path: read_rows(path, {})),
    "matched": ("a.json", lambda path: match_rows(path, ["a", "b"], {"output": None}, "x")),
    "prompts": ("a.json", index_prompts),
    "validation": ("a.jsonl", lambda path: examine(path).describe()),
    "pairs": ("a.json", lambda path: read_pairs(str(path))),
    "leaderboard": ("a.csv", lambda path: read_leaderboard(str(path))),
    "leaderboard rows": ("a.json", lambda path: read_leaderboard(str(path))),
    "gold scores": ("a.csv", lambda path: read_gold_scores(str(path), [1])),
    "gold rows": ("a.jsonl", lambda path: read_gold_scores(str(path), [1])),
    "systems": ("a.json", lambda path: read_systems([str(path)])),
    "settings": ("a.yaml", config_file),
    "record": ("a.json", checkpoint),
    "adapter": ("a.json", adapter),
    "superni": ("a.json", superni),
}


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_rows_or_one_line(name, tmp_path):
    file, read = READERS[name]
    path = tmp_path / file

    @QUICK
    @given(CSVS if file.endswith(".csv") else CONTENTS, st.booleans())
    def holds(content: bytes, is_packed: bool) -> None:
        path.write_bytes(gzip.compress(content) if file.endswith(".gz") and is_packed else content)
        try:
            read(path)
        except InputError as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 2000
            assert any(part in str(error) for part in (str(tmp_path), "--")), str(error)

    holds()


TEXTS = (
    st.text(max_size=80)
    | st.text(st.sampled_from("ab \n#:\u200b\ud800漢🙂.,²½Ⅷ_٣"), max_size=80)
    | st.sampled_from(["", " ", "### Instruction:", "\x00"])
)


def test_any_text_has_a_finite_reward():
    """Ten thousand texts, in the batches that scoring makes: every feature that loads no model, and each template's stop strings."""
    seen = 0

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        st.lists(st.tuples(TEXTS, TEXTS), min_size=100, max_size=100),
        st.sampled_from(["alpaca", "mistral", "tulu", "zephyr"]),
        st.integers(0, 40),
    )
    def holds(rows: list[tuple[str, str]], template: str, target: int) -> None:
        nonlocal seen
        reward = ReversedEngineeredRewardForInference(
            load_template(template), repetition_penalty=True, length_target=target, rouge_l=True, bleu=True
        )
        texts = [text for text, _ in rows]
        table = reward.score({"query": texts, "response": texts, "reference": [reference for _, reference in rows]})
        assert len(table["total"]) == 100 and all(math.isfinite(total) for total in table["total"])
        assert all(0 < value <= 1 for value in table["repetition"])
        seen += 100

    holds()
    assert seen >= 10_000


@QUICK
@given(TEXTS)
def test_tokens_are_nltk_s(text):
    from nltk.tokenize import wordpunct_tokenize

    assert tokens_of(text) == wordpunct_tokenize(text)
