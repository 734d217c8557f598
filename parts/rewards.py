"""What every reward takes and gives, and the rewards besides the proxy: a user's function, a learned reward model.

A reward scores a batch: equally long columns by name, "query" and "response" among them. Its `score` returns named columns, "total"
among them; its `get_reward` returns the totals.
"""

from __future__ import annotations

import importlib.util
import inspect
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from parts.errors import InputError
from parts.rows import QTYPES, require_finite

TEXTS = ("query", "response", "qtype", "reference")  # columns that hold texts; a dataset's other columns may hold anything


def reward_batch(instructions: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping]) -> dict[str, list]:
    """A batch for any reward: "query", "response", and the dataset's columns by name, "reference" being a row's `output`."""
    names = {name for row in rows for name in row} - {"input", "instruction", "output", "query", "response"}
    columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
    if any("output" in row for row in rows):
        columns["reference"] = [row.get("output") for row in rows]
    return {"query": list(instructions), "response": list(responses), **columns}


def check_batch(batch: Mapping[str, Sequence], columns: Sequence[str]) -> None:
    """Raises InputError for a missing or short column, a cell that is not text, or an unknown qtype (rows count from 1)."""
    for column in columns:
        if batch.get(column) is None:
            raise InputError(f"reward: column '{column}' is missing, expected it with these settings")
        if len(batch[column]) != len(batch["response"]):
            raise InputError(f"reward: column '{column}' has {len(batch[column])} rows, expected {len(batch['response'])}")
        for number, cell in enumerate(batch[column] if column in TEXTS else (), start=1):
            if not isinstance(cell, str):
                raise InputError(f"reward: row {number}: {column} is {type(cell).__name__}, expected text")
            if column == "qtype" and cell not in QTYPES:
                raise InputError(f"reward: row {number}: qtype is {cell!r}, expected {' or '.join(QTYPES)}")


def column_mean(column: Sequence) -> float | None:
    """The mean over the numbers of a column; None where it has none."""
    numbers = [value for value in column if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return sum(numbers) / len(numbers) if numbers else None


def load_reward_function(spec: str) -> Callable:
    """The function that "path/to/file.py:name" names.

    Raises:
        InputError: no such file, an import that fails, or no such function in it; each says so.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name:
        raise InputError(f"--reward_function is {spec!r}, expected path/to/file.py:name")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no such file, expected the reward function's")
    module_spec = importlib.util.spec_from_file_location(f"reward_function_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(file.resolve().parent))  # its own neighbours can be imported
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - whatever the user's file raises is said in one line
        raise InputError(f"{path}: its import fails ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    function = getattr(module, name, None)
    if not callable(function):
        others = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise InputError(f"{path}: no function '{name}' in it, found {', '.join(others) or 'none'}")
    return function


class FunctionReward:
    """A user's function as a reward: called with `prompts`, `completions` and the dataset's columns by name.

    That is the convention of TRL's reward functions: `def my_reward(prompts, completions, **columns) -> list[float]`. `prompts` are raw
    instructions; `reference` and `qtype` are among the columns where the rows have them. In place of floats it may return
    named columns with "total" among them, which are then logged by name.

    Raises:
        InputError: the function asks for a column that the rows lack, or returns something else than a finite number a row.
    """

    def __init__(self, function: Callable, name: str) -> None:
        self.function = function
        self.name = name
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self.parameters = {parameter.name: parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}

    @property
    def required_columns(self) -> list[str]:
        """The columns of a batch that the function's signature asks for."""
        own = {"prompts": "query", "completions": "response"}
        return [own.get(name, name) for name, parameter in self.parameters.items() if parameter.default is parameter.empty]

    def get_reward(self, batch: Mapping[str, Sequence]) -> list[float]:
        """The "total" column of `score`."""
        return self.score(batch)["total"]

    def score(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        """What the function says of a batch, as columns with "total" among them."""
        given = {name: list(column) for name, column in batch.items() if name not in ("query", "response")}
        given |= {"prompts": list(batch["query"]), "completions": list(batch["response"])}
        for column in self.required_columns:
            if column not in batch:
                raise InputError(f"reward function {self.name} asks for column '{column}', the rows have {', '.join(sorted(batch))}")
        result = self.function(**{name: column for name, column in given.items() if self.takes_all or name in self.parameters})
        table = dict(result) if isinstance(result, Mapping) else {"total": result}
        if "total" not in table:
            raise InputError(f"reward function {self.name} returned columns {', '.join(table)}, expected 'total' among them")
        for name, column in table.items():
            if isinstance(column, str) or not hasattr(column, "__len__") or not hasattr(column, "__iter__"):
                raise InputError(f"reward function {self.name} returned {type(column).__name__} for {name}, expected a float a row")
            if len(column) != len(batch["response"]):
                raise InputError(f"reward function {self.name}: {len(column)} values in {name}, expected {len(batch['response'])}")
            if not all(isinstance(value, str) for value in column):  # texts may be shown beside; numbers are floats from here on
                table[name] = require_finite(column, f"reward function {self.name}, {name}")
        return table


ENSEMBLES = ("mean", "wco", "uwo")


def ensemble_total(scores: Sequence[Sequence[float]], how: str, coefficient: float) -> list[float]:
    """One reward a row from the [members][rows] scores of an ensemble.

    "mean" of the members; "wco", worst-case optimisation, the lowest; "uwo", uncertainty-weighted optimisation, the mean less `coefficient`
    times the members' variance (over members, not of a sample). Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization".
    """
    rows = list(zip(*scores))
    if how == "wco":
        return [min(row) for row in rows]
    return [statistics.fmean(row) - (coefficient * statistics.pvariance(row) if how == "uwo" else 0.0) for row in rows]


class LearnedReward:
    """A learned reward model, or an ensemble of them, as a reward: the gold stage's models, with `score` for the logs.

    Args:
        names: hub names, folders or adapter folders.
        device: where they score; by default what `load_gold_reward_model` chooses.
        batch_size: most rows per forward pass.
        ensemble, coefficient: how several become one, as `ensemble_total` says.
        offload: keep them in host memory, and on the device only one at a time, for its turn.
    """

    required_columns = ["query", "response"]

    def __init__(
        self,
        names: Sequence[str],
        device: str | None,
        batch_size: int,
        ensemble: str = "mean",
        coefficient: float = 0.0,
        offload: bool = False,
    ) -> None:
        from parts.gold_models import load_gold_reward_model

        self.ensemble = ensemble
        self.coefficient = coefficient
        self.offload = offload
        self.members = {}
        for column, name in member_columns(names).items():
            self.members[column] = load_gold_reward_model(name, device=device, batch_size=batch_size)
            self.device = self.members[column].model.device
            self._move(column, "cpu")

    def get_reward(self, batch: Mapping[str, Sequence]) -> list[float]:
        """One float a row."""
        return self.score(batch)["total"]

    def score(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        """The column "total"; of an ensemble each member's scores besides, by name, and "disagreement", their standard deviation a row."""
        scores = {}
        for column, model in self.members.items():
            self._move(column, self.device)
            scores[column] = model.get_reward(batch)
            self._move(column, "cpu")
        if len(scores) == 1:
            return {"total": next(iter(scores.values()))}
        rows = list(zip(*scores.values()))
        total = ensemble_total(list(scores.values()), self.ensemble, self.coefficient)
        return {**scores, "disagreement": [statistics.pstdev(row) for row in rows], "total": total}

    def _move(self, column: str, device: object) -> None:
        if self.offload:
            self.members[column].model.to(device)


def reward_name(settings: Mapping) -> str:
    """The reward models of a run's settings in words: a name, or "uwo 0.1 of a, b"; empty where there is none.

    Records of runs from before there were ensembles hold one text.
    """
    names = settings.get("reward_model_name") or []
    names = [names] if isinstance(names, str) else names
    how = settings.get("reward_ensemble", "mean")
    how += f" {settings['uwo_coefficient']}" if how == "uwo" else ""
    return f"{how} of {', '.join(names)}" if len(names) > 1 else "".join(names)


def member_columns(names: Sequence[str]) -> dict[str, str]:
    """A column for each member of an ensemble: the last part of its name, or all of it where that is another's or a column of ours."""
    last = [Path(name).name for name in names]
    return {
        short if last.count(short) == 1 and short not in ("total", "disagreement", *TEXTS) else name: name
        for short, name in zip(last, names)
    }
