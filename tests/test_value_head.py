"""The comparison of value heads, from literal numbers."""

from __future__ import annotations

import json

import pytest
from conftest import run_script

from benchmarks.value_head import as_table, compare, curve
from parts.errors import InputError


def seed_curve(rewards: list[float], explained: float) -> dict[str, list[float]]:
    return {"reward": rewards, "explained": [explained] * 5 + [explained / 2] * 5, "kl": [0.0] * 9 + [4.0]}


def test_what_a_setting_gains():
    without = [seed_curve([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], -1.0)] * 2
    sooner = [seed_curve([0, 0, 1, 1, 1, 1, 1, 1.5, 1.5, 1.5], 0.5), seed_curve([0, 0, 1, 1, 1, 1, 1, 1, 1, 1], 0.5)]
    first, second = compare({"as published": without, "--flag": sooner})
    assert first == {"name": "as published", "explained": [-1.0, -0.5], "gained": 0.0, "error_over_seeds": 0.0, "reached": 10, "kl": 4.0}
    assert second["explained"] == [0.5, 0.25] and second["reached"] == 7
    assert second["gained"] == pytest.approx(0.15) and second["error_over_seeds"] == pytest.approx(0.15)  # 0.3 and 0
    assert as_table([first, second]).splitlines()[-1] == "| --flag | +0.50 | +0.25 | +0.15 (0.15) | 7 | 4.0 |"


def test_a_run_that_is_too_short_is_one_line(tmp_path):
    (tmp_path / "logs").mkdir()
    rows = [{"step": step, "reward/total": 1.0, "ppo/val/var_explained": 0.0, "objective/kl": 0.0} for step in (1, 2)]
    (tmp_path / "logs" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert curve(str(tmp_path), 2)["reward"] == [1.0, 1.0]
    with pytest.raises(InputError, match="metrics.jsonl: has no step 3, expected 3 steps$"):
        curve(str(tmp_path), 3)


def test_an_unknown_variant_is_one_line():
    done = run_script("benchmarks/value_head.py", "--variants=warm")
    assert done.returncode == 2 and done.stderr == "error: --variants holds 'warm', expected some of warmup, rate, qtype\n"
