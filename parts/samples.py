"""Several responses to each prompt, as `evaluation.py --num_samples` writes them: reading, and the best of them as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from parts.errors import InputError
from parts.files import read_json
from parts.rows import read_rows
from parts.runs import BaseModel, Checkpoint, meta_path


@dataclass(frozen=True)
class Samples:
    """A file of several responses to each prompt, as `evaluation.py --num_samples` writes it."""

    path: Path

    @property
    def name(self) -> str:
        """What its results are named by: the policy's name in files of `evaluation.py`."""
        return self.path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json").removeprefix("samples-")

    @cached_property
    def meta(self) -> dict:
        """How the samples were made; empty for a file that `evaluation.py` did not write."""
        path = meta_path(self.path)
        return read_json(path) if path.is_file() else {}

    @property
    def policy(self) -> Checkpoint:
        """Whose samples they are."""
        if "model" in self.meta and self.meta.get("adapter") is None:
            return BaseModel(self.path.parent, self.meta["model"])
        return Checkpoint(self.path.parent)

    @cached_property
    def rows(self) -> list[dict]:
        """The rows, read once.

        Raises:
            InputError: an unusable file, a row without a list of at least two responses, rows of different numbers of them, or not as
                many rows as the record says.
        """
        rows = read_rows(self.path, {"instruction": None})
        for number, row in enumerate(rows, start=1):
            found = row.get("responses")
            if not isinstance(found, list) or not all(isinstance(each, dict) and isinstance(each.get("output"), str) for each in found):
                raise InputError(
                    f"{self.path}: row {number}: no field 'responses' of {{output}}, expected what evaluation.py --num_samples writes"
                )
            if len(found) != max(2, len(rows[0]["responses"])):
                expected = "at least 2" if number == 1 else f"{len(rows[0]['responses'])} as in row 1"
                raise InputError(f"{self.path}: row {number}: {len(found)} responses, expected {expected}")
        if len(rows) != (expected := self.meta.get("rows", len(rows))):
            raise InputError(f"{self.path}: {len(rows)} rows, expected the {expected} of its record: is the file whole?")
        return rows

    @property
    def instructions(self) -> list[str]:
        return [row["instruction"] for row in self.rows]

    @property
    def outputs(self) -> list[list[str]]:
        """[rows][samples] texts."""
        return [[each["output"] for each in row["responses"]] for row in self.rows]

    @property
    def flat(self) -> tuple[list[str], list[str]]:
        """The instruction and the text of every sample, those of the first row first."""
        return [text for text in self.instructions for _ in range(self.count)], [text for texts in self.outputs for text in texts]

    @property
    def count(self) -> int:
        """The number of samples a row."""
        return len(self.rows[0]["responses"])

    def references(self, fields: Mapping[str, Sequence[str] | None]) -> list[dict]:
        """Each row's own columns of the dataset, `output` being the reference. Raises InputError for a row without one of `fields`."""
        read_rows(
            self.path, {"instruction": None, **{"reference" if name == "output" else name: allowed for name, allowed in fields.items()}}
        )
        return [{name: row[own] for name, own in (("qtype", "qtype"), ("output", "reference")) if own in row} for row in self.rows]


def require_same_prompts(several: Sequence[Samples]) -> None:
    """Raises InputError for a file of other prompts than the first one's, or of a name that comes twice: results are named by it."""
    first = several[0]
    for place, other in enumerate(several[1:], start=1):
        if other.name in [earlier.name for earlier in several[:place]]:
            raise InputError(f"{other.path}: samples of the name {other.name} come twice, expected one file of each")
        if other.instructions != first.instructions:
            pairs = zip(other.instructions, first.instructions)
            number = next((number for number, (one, two) in enumerate(pairs, start=1) if one != two), None)
            what = f"row {number}: another instruction" if number else f"{len(other.rows)} rows, not {len(first.rows)}"
            raise InputError(f"{other.path}: {what}, expected the prompts of {first.path}")


def best_rows(samples: Samples, references: Sequence[Mapping], proxy: np.ndarray, n: int) -> list[dict]:
    """`{input, output, qtype}` rows for `train_sft.py`: of each row's first `n` samples the one that the proxy ranks first.

    Of equals it is the first. Turns that a prompt was put together from stay with it, as `messages`. A row whose best response is empty is
    left out: there is nothing to learn in it.
    """
    rows = []
    for row, outputs, reference, best in zip(samples.rows, samples.outputs, references, proxy[:, :n].argmax(axis=1)):
        more = {name: given[name] for name, given in (("qtype", reference), ("messages", row)) if given.get(name)}
        if outputs[best].strip():
            rows.append({"input": row["instruction"], "output": outputs[best], **more})
    return rows
