"""What every reward takes and gives, and users' functions as rewards. (A learned reward model is one in `parts.learned_reward`.)

A reward scores a batch: equally long columns by name, "query" and "response" among them. Its `score` returns named columns, "total"
among them; its `get_reward` returns the totals.
"""

from __future__ import annotations

import importlib.util
import inspect
import statistics
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from parts.errors import InputError
from parts.files import digest
from parts.rows import QTYPES, require_finite, say_once

TEXTS = ("query", "response", "qtype", "reference")  # columns that hold texts; a dataset's other columns may hold anything


def reward_batch(instructions: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping]) -> dict[str, list]:
    """A batch for any reward: "query", "response", and the dataset's columns by name, "reference" being a row's `output`.

    Columns that have the names of what a reward is called with are left out, which is said.

    Raises:
        InputError: a row whose `reference` is not its `output`.
    """
    names = {name for row in rows for name in row} - {"input", "instruction", "output"}
    for name in sorted(names & {"query", "response", "prompts", "completions"}):
        say_once(f"the rows' column '{name}' is left out: a reward is called with one of that name")
    names -= {"query", "response", "prompts", "completions"}
    for number, row in enumerate(rows, start=1):
        if "reference" in row and "output" in row and row["reference"] != row["output"]:
            raise InputError(
                f"row {number}: fields 'reference' and 'output' differ, expected one of them: rewards call the output reference"
            )
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


_loaded: dict[Path, ModuleType] = {}


def load_reward_function(spec: str) -> Callable:
    """The function that "path/to/file.py:name" names. A file is run once, and is a module like any other from then on.

    Its folder can be imported from, then and later: by what the function imports when it is called, and by processes that it starts.

    Raises:
        InputError: no such file, an import that fails, or no such function in it; each says so.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name:
        raise InputError(f"--reward_function is {spec!r}, expected path/to/file.py:name")
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"{path}: no such file, expected the reward function's")
    if file not in _loaded:
        _loaded[file] = _run_file(file, path)
    module = _loaded[file]
    function = getattr(module, name, None)
    if not callable(function):
        others = [key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise InputError(f"{path}: no function '{name}' in it, found {', '.join(others) or 'none'}")
    return function


def _run_file(file: Path, path: str) -> ModuleType:
    """A file as a module of its own name, or of a longer one where another module has that."""
    folder, module_name = str(file.parent), f"reward_function_{file.stem}_{digest(str(file))[:8]}"
    sys.path.insert(0, folder)
    try:
        if file.stem.isidentifier() and file.stem not in sys.modules:
            found = importlib.util.find_spec(file.stem)
            if found is not None and found.origin is not None and file.samefile(found.origin):
                module_name = file.stem
        module_spec = importlib.util.spec_from_file_location(module_name, file)
        module = sys.modules[module_name] = importlib.util.module_from_spec(module_spec)  # dataclasses and pickle look it up there
        module_spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - whatever the user's file raises is said in one line
        sys.modules.pop(module_name, None)
        raise InputError(f"{path}: its import fails ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # last: it hides nothing
    return module


class FunctionReward:
    """A user's function as a reward: called with `prompts`, `completions` and the dataset's columns by name.

    That is the convention of TRL's reward functions: `def my_reward(prompts, completions, **columns) -> list[float | None]`. `prompts` are
    raw instructions; `reference` and `qtype` are among the columns where the rows have them. None is no score for this row. In place of
    numbers it may return named columns with "total" among them, which are then logged by name. It may be `async`.

    Raises:
        InputError: the function asks for a column that the rows lack, fails, or returns something else than a finite number or None a row.
    """

    def __init__(self, function: Callable, name: str) -> None:
        self.function = function
        self.name = name
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = (parameter for parameter in parameters if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL))
        self.parameters = {parameter.name: parameter for parameter in named}

    @property
    def required_columns(self) -> list[str]:
        """The columns of a batch that the function's signature asks for."""
        own = {"prompts": "query", "completions": "response"}
        return [own.get(name, name) for name, parameter in self.parameters.items() if parameter.default is parameter.empty]

    def get_reward(self, batch: Mapping[str, Sequence]) -> list[float | None]:
        """The "total" column of `score`."""
        return self.score(batch)["total"]

    def score(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        """What the function says of a batch, as columns with "total" among them."""
        given = {name: list(column) for name, column in batch.items() if name not in ("query", "response")}
        given |= {"prompts": list(batch["query"]), "completions": list(batch["response"])}
        for column in self.required_columns:
            if column not in batch:
                raise InputError(f"reward function {self.name} asks for column '{column}', the rows have {', '.join(sorted(batch))}")
        try:
            result = self.function(**{name: column for name, column in given.items() if self.takes_all or name in self.parameters})
            result = _finished(result) if inspect.isawaitable(result) else result
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"reward function {self.name} fails ({type(error).__name__}: {error}; {place.filename}, line {place.lineno})"
            ) from error
        table = dict(result) if isinstance(result, Mapping) else {"total": result}
        if "total" not in table:
            raise InputError(f"reward function {self.name} returned columns {', '.join(table)}, expected 'total' among them")
        return {name: self._checked(name, column, len(batch["response"])) for name, column in table.items()}

    def _checked(self, name: str, column: object, rows: int) -> list:
        """A column as floats and None, or as it is where it holds texts to show beside."""
        try:
            values = None if isinstance(column, str | Mapping) else list(column) if len(column) >= 0 else None
        except TypeError:  # a number, None, a tensor without dimensions, a generator
            values = None
        if values is None:
            raise InputError(f"reward function {self.name} returned {type(column).__name__} for {name}, expected a float a row")
        if len(values) != rows:
            raise InputError(f"reward function {self.name}: {len(values)} values in {name}, expected {rows}")
        if any(isinstance(value, str) for value in values):
            if name != "total" and all(isinstance(value, str) for value in values):
                return values
            number, text = next((number, value) for number, value in enumerate(values, start=1) if isinstance(value, str))
            raise InputError(f"reward function {self.name}, {name}: row {number} has the text {text[:60]!r}, expected a finite number")
        places = [place for place, value in enumerate(values) if value is not None]
        numbers = require_finite([values[place] for place in places], f"reward function {self.name}, {name}", places)
        for place, number in zip(places, numbers):
            values[place] = number
        return values


def _finished(result: Awaitable) -> object:
    """What an async function returns in the end."""
    import asyncio

    async def wait() -> object:
        return await result

    return asyncio.run(wait())


class WeightedRewards:
    """Several user's functions as one reward: a row's total is the sum of weight times score, over the functions that score it.

    So TRL's trainers combine theirs. Each function's score is a column by its name.
    """

    def __init__(self, rewards: Mapping[str, FunctionReward], weights: Sequence[float]) -> None:
        self.rewards = dict(rewards)
        self.weights = list(weights)

    @property
    def required_columns(self) -> list[str]:
        """The columns of a batch that any of the functions asks for."""
        return list(dict.fromkeys(column for reward in self.rewards.values() for column in reward.required_columns))

    def get_reward(self, batch: Mapping[str, Sequence]) -> list[float | None]:
        """The "total" column of `score`."""
        return self.score(batch)["total"]

    def score(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        """Each function's columns, its total under its own name; and "total", None for a row that none scores."""
        table: dict[str, list] = {}
        totals = []
        for name, reward in self.rewards.items():
            columns = reward.score(batch)
            totals.append(columns.pop("total"))
            table |= {name: totals[-1], **{f"{name}.{column}": values for column, values in columns.items()}}
        table["total"] = [
            None
            if all(score is None for score in row)
            else sum(weight * score for weight, score in zip(self.weights, row) if score is not None)
            for row in zip(*totals)
        ]
        return table


def load_functions(specs: Sequence[str], weights: Sequence[float] = ()) -> FunctionReward | WeightedRewards:
    """The reward that "file.py:name" names, or several with their weights, 1 each where none are given.

    Raises:
        InputError: one cannot be loaded, or not as many weights as functions.
    """
    rewards = [FunctionReward(load_reward_function(spec), spec) for spec in specs]
    if weights and len(weights) != len(rewards):
        raise InputError(f"--reward_weights has {len(weights)} numbers, expected one for each of {len(rewards)} reward functions")
    if len(rewards) == 1 and not weights:
        return rewards[0]
    short = [spec.rpartition(":")[2] for spec in specs]
    names = short if len(set(short)) == len(short) and "total" not in short else [Path(spec).name for spec in specs]
    if len(set(names)) < len(names):
        raise InputError(f"--reward_function names {max(names, key=names.count)!r} twice, expected functions of different names")
    return WeightedRewards(dict(zip(names, rewards)), weights or [1.0] * len(rewards))


def filled(totals: Sequence[float | None]) -> list[float]:
    """Totals for a PPO step, which needs one a row: a row without a score gets the mean of the others, 0 where no row has one."""
    scores = [score for score in totals if score is not None]
    mean = sum(scores) / len(scores) if scores else 0.0
    return [mean if score is None else score for score in totals]


def require_scores(totals: Sequence[float | None], what: str) -> None:
    """Raises InputError naming the first row (from 1) without a score."""
    for number, score in enumerate(totals, start=1):
        if score is None:
            raise InputError(f"{what}: row {number} has no score, expected one of every row to compare")


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
