"""The scoring command: the mean of each of a reward's columns, per file of rollouts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parts.chat_templates import ChatTemplate
from parts.cli import Settings, setting
from parts.errors import InputError
from parts.files import check_writable, is_same_path, read_json, write_json
from parts.models import check_device, use_cache
from parts.rewards import column_mean, reward_batch
from parts.rows import match_rows, read_rows
from parts.runs import Checkpoint, meta_path, provenance, without_records
from parts.scores import Proxies, template_and_length

if TYPE_CHECKING:
    from typing import Any


@dataclass
class ScoreFileSettings(Settings):
    files: list[str] = setting([], "rollouts in AlpacaEval's format: rows of instruction and output", positional=True, path=True)
    data_path: str = setting(
        "", "rows of the same instructions with qtype and reference (`output`), where the reward reads them", path=True, group=("files", "")
    )
    chat_template_name: str = setting("", "template whose stop strings end a response; empty means that of the file's record, else alpaca")
    output_max_length: int = setting(
        0, "longest response in tokens, as the rescaling F uses it; 0 means that of the run's record, else 512", least=0
    )
    cache_dir: str = setting("", "where hub downloads are kept; empty means the default cache", written=True)
    device: str = setting("", "cuda, cpu, ...; empty means the GPU where there is one")
    output: str = setting("", "file for the components of every row, as JSON", written=True)
    json: bool = setting(False, "print the means as JSON in place of a table")


def score_files(settings: ScoreFileSettings, rewards: Any) -> None:
    """Score the files and print the means; `rewards` are the settings of the reward (`reward_model.RewardSettings`).

    Raises:
        InputError: an unusable file or reward.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    use_cache(settings.cache_dir)

    # 1. Everything a user can get wrong, before any model loads.
    rollouts = {path: read_rows(path, {"instruction": None, "output": None}) for path in without_records(settings.files)}
    known = rewards.dataset_fields
    if known and not settings.data_path:
        raise InputError("--data_path is missing, expected the rows' qtype and reference (or --reward_branching=false)")
    batches = {}
    for path, rows in rollouts.items():
        instructions = [row["instruction"] for row in rows]
        data = match_rows(settings.data_path, instructions, known, path) if settings.data_path else [{} for _ in rows]
        batches[path] = reward_batch(instructions, [row["output"] for row in rows], data)
    rewards.check_reward()
    if settings.output:
        if read := next((path for path in (*rollouts, settings.data_path) if is_same_path(path, settings.output)), None):
            raise InputError(f"--output: {settings.output} is {read}, which is read, expected another file")
        check_writable(settings.output)
    check_device(settings.device)
    ways = {path: how_made(settings, path) for path in rollouts}

    # 2. Scores.
    from tqdm import tqdm

    proxies, every = Proxies(settings.device or None), {"every_feature": True} if rewards.is_proxy else {}
    tables = {}
    for path, batch in tqdm(batches.items(), desc="scores", unit="file", disable=None):
        reward = proxies(rewards, *ways[path])
        tables[path] = reward.score(batch, **every)

    # 3. Table, file.
    means = {path: {name: column_mean(column) for name, column in table.items()} for path, table in tables.items()}
    scored = {path: sum(value is not None for value in table["total"]) for path, table in tables.items()}
    for path, count in scored.items():
        if count < len(rollouts[path]):
            print(f"{path}: {count} of {len(rollouts[path])} rows have a reward, whose mean is over these", file=sys.stderr)
    if settings.output:
        record = provenance(
            dtype=getattr(reward, "dtype", "float32"),
            template={path: template.name for path, (template, _) in ways.items()},
            model=rewards.named or rewards.relevance_model_name,
            reward_source=rewards.reward_source(),
            settings={**asdict(settings), **asdict(rewards)},
        )
        per_row = {path: list(rows_of(batches[path], table)) for path, table in tables.items()}
        write_json(settings.output, {"rows": per_row, "means": means, "scored_rows": scored, "provenance": record})
    if settings.json:
        shown = {path: {"rows": len(rollouts[path]), "scored_rows": scored[path], **mean} for path, mean in means.items()}
        print(json.dumps(shown, indent=1, allow_nan=False))
    else:
        print_table({path: len(rows) for path, rows in rollouts.items()}, means)


def how_made(settings: ScoreFileSettings, path: str) -> tuple[ChatTemplate, int]:
    """The template whose stop strings end a file's responses, and their longest length: the settings', else those of the records beside it."""
    meta = read_json(meta_path(path)) if meta_path(path).is_file() else {}
    return template_and_length(settings.chat_template_name, settings.output_max_length, meta, Checkpoint(Path(path).parent).trained)


def rows_of(batch: Mapping[str, list], table: Mapping[str, list]):
    """Every row's number (from 1), instruction and components."""
    for number, (query, *values) in enumerate(zip(batch["query"], *table.values()), start=1):
        yield {"row": number, "instruction": query, **dict(zip(table, values))}


def print_table(rows: Mapping[str, int], means: Mapping[str, Mapping[str, float | None]]) -> None:
    """A line a file: its number of rows, and the mean of each column that has one anywhere."""
    names = dict.fromkeys(name for mean in means.values() for name, value in mean.items() if value is not None)
    width = max(map(len, means))
    print(f"{'file':<{width}} {'rows':>6} " + " ".join(f"{name:>{max(len(name), 8)}}" for name in names))
    for path, mean in means.items():
        cells = (f"{'-' if mean.get(name) is None else format(mean[name], '.4f'):>{max(len(name), 8)}}" for name in names)
        print(f"{path:<{width}} {rows[path]:>6} " + " ".join(cells))
