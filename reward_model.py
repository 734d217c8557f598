"""The reward module: white-box features, the reverse-engineered reward, and the door for rewards of your own.

    from reward_model import ReversedEngineeredRewardForInference
    reward = ReversedEngineeredRewardForInference("alpaca", repetition_penalty=True, relevance_scaling=True, reward_branching=True)
    reward.get_reward({"query": [...], "response": [...], "qtype": [...], "reference": [...]})   # -> list of floats

As a command it scores rollouts in AlpacaEval's format and prints the mean of each component per file:

    python reward_model.py outputs/*/alpaca-eval-*.json --data_path data/eval.json
    python reward_model.py outputs/*/alpaca-eval-*.json --data_path data/eval.json --output scores.json --json=true

To design your own reward, edit a feature or `compose` below, or leave this file alone and write a function
(`--reward_function examples/my_reward.py:my_reward`).

Formulas: Kim and Seo, "Rethinking the Role of Proxy Rewards in Language Model Alignment", EMNLP 2024.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nltk.tokenize import wordpunct_tokenize

from parts.chat_templates import ChatTemplate, load_template
from parts.cli import parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import file_digest, write_json
from parts.models import check_device, check_model_name
from parts.overlap import bleu, rouge_l
from parts.rows import QTYPES, match_rows, read_rows, require_finite
from parts.runs import provenance

if TYPE_CHECKING:
    import torch

OPENENDED, CONSTRAINED = QTYPES
DEFAULT_RELEVANCE = "facebook/contriever"
ROWS_PER_BLOCK = 1024  # rows whose embeddings are in memory at a time


# --------------------------------------------------------------------------------------------------------------- features


def length_incentive(tokens: Sequence[str]) -> float:
    """LI = number of tokens / 100. Range [0, inf): unbounded by design; 0 for an empty response. (Kim and Seo 2024)"""
    return len(tokens) / 100


def targeted_length(tokens: Sequence[str], target: int) -> float:
    """1 - |number of tokens / target - 1|. Range (-inf, 1]: 1 at the target, 0 for an empty response or one twice as long.

    The length-only reward of Singhal et al. 2023, "A Long Way to Go: Investigating Length Correlations in RLHF".
    """
    return 1 - abs(len(tokens) / target - 1)


def repetition_penalty(tokens: Sequence[str]) -> float:
    """RP = unique trigrams / trigrams. Range (0, 1]; 1.0 for fewer than three tokens. (Kim and Seo 2024)"""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:]))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def query_relevance(queries: torch.Tensor, responses: torch.Tensor) -> list[float]:
    """QR = M(query) . M(response), row by row of two [rows, dimension] embeddings. (Kim and Seo 2024)

    Any number: the raw dot product, not a cosine, not clamped.
    """
    return (queries * responses).sum(dim=-1).tolist()


def reference_relevance(references: torch.Tensor, responses: torch.Tensor) -> list[float]:
    """RAR = M(reference) . M(response), row by row of two [rows, dimension] embeddings. (Kim and Seo 2024)

    Any number: the raw dot product, not a cosine, not clamped.
    """
    return (references * responses).sum(dim=-1).tolist()


def rescale(value: float, max_sequence_length: int) -> float:
    """F(r) = r / 3.5 * max_sequence_length / 100: maps [0, 3.5] onto [0, 5.12] for 512 tokens; linear, not clipped. (Kim and Seo 2024)"""
    return value / 3.5 * (max_sequence_length / 100)


MATCHES = {"rouge_l": rouge_l, "bleu": bleu}  # features of (reference, response)


def query_text(query: str, template: ChatTemplate) -> str:
    """The instruction as the relevance model sees it, from a raw instruction or a rendered prompt.

    The template's frame and role headings are removed, and `</s>`; `### Input:`, " : " and runs of white space become one space; outer colons go.
    """
    text = template.raw_instruction(query)
    for heading in (*template.role_headings, "</s>"):
        text = text.replace(heading, "")
    text = re.sub(r"### Input:\n?", " ", text)
    return re.sub(r"\s+", " ", text.replace(" : ", " ")).strip(" :")


# ------------------------------------------------------------------------------------------------------- the proxy reward


class RewardModel(Protocol):
    """Anything that scores a batch of equally long columns, "query" and "response" among them."""

    def get_reward(self, batch: Mapping[str, Sequence]) -> list[float]: ...


class ReversedEngineeredRewardForInference:
    """The white-box proxy reward.

    With the features above as LI, RP, QR, RAR, F, and each part 1 where its switch is off:

        no branching                     R = LI * QR * RP * ROUGE * BLEU
        branching, qtype OPENENDED       R = LI * QR * RP
        branching, qtype CONSTRAINED     R = F(RAR) * RP * ROUGE * BLEU

    The paper's full design is LI, RP, relevance and branching; ROUGE-L and BLEU to the reference are off unless asked for.
    A response may be any text. An empty one (or one of white space, or one cut at its very start) has LI 0 and RP 1; the
    relevance model sees it uncut, as its special tokens where there is nothing else.

    Args:
        template: a template name ("alpaca") or a `ChatTemplate`: its stop strings end a response, its frame is taken off queries.
        max_sequence_length: the longest response in tokens, as F uses it.
        length_incentive, repetition_penalty, relevance_scaling, reward_branching: the parts, as above.
        length_target: tokens; where above 0, `targeted_length` takes LI's place.
        rouge_l, bleu: the two matches with the reference.
        do_strip: cut responses at the first stop string before counting and matching. The relevance model always sees the uncut response.
        relevance_model_name: hub name or folder of the encoder M; loaded only with `relevance_scaling`.
        device: of the encoder; the best there is by default.
        batch_size: most texts per encoder batch.
        cache_dir: where hub downloads are kept.
        embedding_cache: file that keeps the embeddings of queries and references over runs; without it they last as long as this object.

    Raises:
        InputError: unknown template, unusable model or cache, or a length that is out of range.
    """

    def __init__(
        self,
        template: str | ChatTemplate,
        max_sequence_length: int = 512,
        length_incentive: bool = True,
        repetition_penalty: bool = False,
        relevance_scaling: bool = False,
        reward_branching: bool = False,
        length_target: int = 0,
        rouge_l: bool = False,
        bleu: bool = False,
        do_strip: bool = True,
        relevance_model_name: str = DEFAULT_RELEVANCE,
        device: str | None = None,
        batch_size: int = 32,
        cache_dir: str | None = None,
        embedding_cache: str = "",
    ) -> None:
        if max_sequence_length < 1:
            raise InputError(f"max_sequence_length is {max_sequence_length}, expected at least 1")
        if length_target < 0:
            raise InputError(f"length_target is {length_target}, expected 0 (off) or a number of tokens")
        has_branches = relevance_scaling or rouge_l or bleu
        if reward_branching and not has_branches:
            warnings.warn("reward_branching without relevance_scaling changes nothing: the reward has no branches", stacklevel=2)
        self.template = load_template(template) if isinstance(template, str) else template
        self.max_sequence_length = max_sequence_length
        self.length_incentive = length_incentive
        self.length_target = length_target
        self.repetition_penalty = repetition_penalty
        self.relevance_scaling = relevance_scaling
        self.reward_branching = reward_branching and has_branches
        self.rouge_l = rouge_l
        self.bleu = bleu
        self.do_strip = do_strip
        self.relevance_model = None
        if relevance_scaling:
            from parts.relevance import RelevanceModel

            self.relevance_model = RelevanceModel(relevance_model_name, device, batch_size, cache_dir, embedding_cache)

    @property
    def required_columns(self) -> list[str]:
        """The columns of a batch that these settings read."""
        columns = ["response"]
        if self.relevance_scaling:
            columns.append("query")
        if self.reward_branching:
            columns.append("qtype")
        if self.reward_branching or self.rouge_l or self.bleu:
            columns.append("reference")
        return columns

    def remember(self, batch: Mapping[str, Sequence]) -> None:
        """Embed the queries and references of a batch ahead of its scores.

        A run that does this once, at its start, gets the same last digits wherever it is interrupted and resumed: an embedding depends
        a little on the texts that share its batch.
        """
        if self.relevance_model is not None:
            for column, prepare in (("query", lambda text: query_text(text, self.template)), ("reference", str)):
                if column in self.required_columns:
                    texts = [prepare(text) for text in batch[column]]
                    for start in range(0, len(texts), ROWS_PER_BLOCK):
                        self.relevance_model.embed_once(texts[start : start + ROWS_PER_BLOCK])

    def get_reward(self, batch: Mapping[str, Sequence]) -> list[float]:
        """The rewards of a batch, one float a row: the "total" column of `score`."""
        return self.score(batch)["total"]

    def score(self, batch: Mapping[str, Sequence], every_feature: bool = False) -> dict[str, list]:
        """The named components of every row's reward.

        Args:
            batch: equally long columns of texts: "query" (raw instruction or rendered prompt), "response", "qtype" and
                "reference", the last three only where the settings use them; other columns are ignored.
            every_feature: compute each feature that is switched on for all rows, whatever a row's own branch uses.

        Returns:
            Columns "length" (LI or targeted), "repetition" (RP), "query_relevance" (QR), "reference_relevance" (RAR), "rouge_l"
            and "bleu" where they are on, "branch" and "total". A feature that a row's branch does not use is None.

        Raises:
            InputError: a missing or short column, a cell that is not text, an unknown qtype, or a reward that is not finite.
        """
        check_batch(batch, self.required_columns)
        branch = list(batch["qtype"]) if self.reward_branching else [OPENENDED] * len(batch["response"])
        by_query = [every_feature or name == OPENENDED for name in branch]
        by_reference = [(every_feature and "reference" in batch) or name == CONSTRAINED for name in branch]

        table: dict[str, list] = {"length": [], "repetition": []}
        matches = {name: [] for name in MATCHES if getattr(self, name)}
        for row, response in enumerate(batch["response"]):
            text = self.template.strip_response(response) if self.do_strip else response
            tokens = wordpunct_tokenize(text)
            table["length"].append(targeted_length(tokens, self.length_target) if self.length_target else length_incentive(tokens))
            table["repetition"].append(repetition_penalty(tokens))
            for name, column in matches.items():
                used = by_reference[row] or not self.reward_branching
                column.append(MATCHES[name](batch["reference"][row], text) if used else None)
        table["query_relevance"], table["reference_relevance"] = self._relevances(batch, by_query, by_reference)
        table |= matches
        table["branch"] = branch
        rows = [dict(zip(table, row)) for row in zip(*table.values())]
        table["total"] = require_finite([self.compose(row) for row in rows], "proxy reward")
        return table

    def compose(self, row: Mapping[str, float | str | None]) -> float:
        """The formula: one row of components to its reward."""
        length = row["length"] if self.length_incentive else 1.0
        repetition = row["repetition"] if self.repetition_penalty else 1.0
        to_query = row["query_relevance"] if self.relevance_scaling else 1.0
        if self.reward_branching and row["branch"] == OPENENDED:
            return length * to_query * repetition
        match = (row["rouge_l"] if self.rouge_l else 1.0) * (row["bleu"] if self.bleu else 1.0)
        if not self.reward_branching:
            return length * to_query * repetition * match
        to_reference = rescale(row["reference_relevance"], self.max_sequence_length) if self.relevance_scaling else 1.0
        return to_reference * repetition * match

    def _relevances(self, batch: Mapping[str, Sequence], by_query: list[bool], by_reference: list[bool]) -> tuple[list, list]:
        """The columns QR and RAR; None where their mask is False, or without a relevance model."""
        responses, model = batch["response"], self.relevance_model
        to_query: list[float | None] = [None] * len(responses)
        to_reference: list[float | None] = [None] * len(responses)
        if model is None:
            return to_query, to_reference
        kinds = (
            (to_query, by_query, lambda row: query_text(batch["query"][row], self.template), query_relevance),
            (to_reference, by_reference, lambda row: batch["reference"][row], reference_relevance),
        )
        order = sorted(range(len(responses)), key=lambda row: len(responses[row]))
        for start in range(0, len(order), ROWS_PER_BLOCK):
            block = order[start : start + ROWS_PER_BLOCK]
            embedded = model.embed([responses[row] for row in block])
            for column, wanted, anchor, feature in kinds:
                places = [place for place, row in enumerate(block) if wanted[row]]
                if places:
                    anchors = model.embed_once([anchor(block[place]) for place in places])
                    for place, value in zip(places, feature(anchors, embedded[places])):
                        column[block[place]] = value
        return to_query, to_reference


def check_batch(batch: Mapping[str, Sequence], columns: Sequence[str]) -> None:
    """Raises InputError for a missing or short column, a cell that is not text, or an unknown qtype (rows count from 1)."""
    for column in columns:
        if batch.get(column) is None:
            raise InputError(f"reward: column '{column}' is missing, expected it with these settings")
        if len(batch[column]) != len(batch["response"]):
            raise InputError(f"reward: column '{column}' has {len(batch[column])} rows, expected {len(batch['response'])}")
        for number, cell in enumerate(batch[column], start=1):
            if not isinstance(cell, str):
                raise InputError(f"reward: row {number}: {column} is {type(cell).__name__}, expected text")
            if column == "qtype" and cell not in QTYPES:
                raise InputError(f"reward: row {number}: qtype is {cell!r}, expected {' or '.join(QTYPES)}")


# --------------------------------------------------------------------------------------------------------- other rewards


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


class LearnedReward:
    """A learned reward model as a reward: the gold stage's models, with `score` for the logs."""

    required_columns = ["query", "response"]

    def __init__(self, name_or_path: str, device: str | None, batch_size: int) -> None:
        from parts.gold_models import load_gold_reward_model

        self.model = load_gold_reward_model(name_or_path, device=device, batch_size=batch_size)

    def get_reward(self, batch: Mapping[str, Sequence]) -> list[float]:
        """One float a row."""
        return self.model.get_reward(batch)

    def score(self, batch: Mapping[str, Sequence]) -> dict[str, list]:
        """The one column "total"."""
        return {"total": self.get_reward(batch)}


@dataclass
class RewardSettings:
    """Which reward: the proxy's switches, a user's function, or a learned reward model. Shared by every script that scores."""

    length_incentive: bool = setting(True, "proxy reward: LI")
    length_target: int = setting(0, "proxy reward: tokens; above 0, 1 - |tokens / length_target - 1| takes LI's place")
    repetition_penalty: bool = setting(False, "proxy reward: RP")
    relevance_scaling: bool = setting(False, "proxy reward: QR, and RAR with branching")
    reward_branching: bool = setting(False, "proxy reward: CONSTRAINED rows by reference relevance, OPENENDED ones by query relevance")
    rouge_l: bool = setting(False, "proxy reward: ROUGE-L to the reference (with branching, of CONSTRAINED rows)")
    bleu: bool = setting(False, "proxy reward: BLEU to the reference (with branching, of CONSTRAINED rows)")
    relevance_model_name: str = setting(DEFAULT_RELEVANCE, "sentence encoder of the relevances")
    embedding_cache: str = setting("", "file that keeps the embeddings of queries and references over runs; empty means for this run")
    reward_function: str = setting("", "your own reward in place of the proxy: path/to/file.py:name")
    reward_model_name: str = setting("", "reward model to use in place of the proxy (the paper's baseline rows)")
    reward_model_batch_size: int = setting(8, "rows per batch of the relevance encoder or the reward model")

    def __post_init__(self) -> None:
        if self.reward_model_batch_size < 1:
            raise InputError(f"--reward_model_batch_size is {self.reward_model_batch_size}, expected at least 1")
        if self.length_target < 0:
            raise InputError(f"--length_target is {self.length_target}, expected 0 (off) or a number of tokens")
        if self.reward_function and self.reward_model_name:
            raise InputError("--reward_function and --reward_model_name are both set, expected one reward")
        if self.is_proxy and not (self.length_incentive or self.repetition_penalty or self.relevance_scaling or self.rouge_l or self.bleu):
            raise InputError("every part of the proxy reward is off, expected at least one to learn from")

    @property
    def is_proxy(self) -> bool:
        return not (self.reward_function or self.reward_model_name)

    @property
    def reads_qtypes(self) -> bool:
        return self.is_proxy and self.reward_branching and (self.relevance_scaling or self.rouge_l or self.bleu)

    @property
    def reads_references(self) -> bool:
        return self.is_proxy and (self.reads_qtypes or self.rouge_l or self.bleu)

    @property
    def dataset_fields(self) -> dict[str, tuple[str, ...] | None]:
        """What each row must carry for this reward, as `read_rows` takes it."""
        fields = {"output": None} if self.reads_references else {}
        return {**fields, "qtype": QTYPES} if self.reads_qtypes else fields

    def check_reward(self) -> None:
        """Raises InputError for what can be known to be unusable before a model loads."""
        if self.reward_function:
            load_reward_function(self.reward_function)
        elif self.reward_model_name:
            check_model_name(self.reward_model_name)
        elif self.relevance_scaling:
            check_model_name(self.relevance_model_name)

    def reward_source(self) -> dict[str, str]:
        """SHA-256 of the files that the reward's code is in, by name: a record of what scored, for readers who edit it."""
        files = [Path(__file__)] + ([Path(self.reward_function.rpartition(":")[0])] if self.reward_function else [])
        return {file.name: file_digest(file) for file in files}

    def load_reward(
        self, template: ChatTemplate, max_sequence_length: int, device: str | None, cache_dir: str | None = None
    ) -> ReversedEngineeredRewardForInference | FunctionReward | LearnedReward:
        """The reward that these settings describe; `max_sequence_length` is the longest response in tokens."""
        if self.reward_function:
            return FunctionReward(load_reward_function(self.reward_function), self.reward_function)
        if self.reward_model_name:
            return LearnedReward(self.reward_model_name, device, self.reward_model_batch_size)
        return ReversedEngineeredRewardForInference(
            template,
            max_sequence_length=max_sequence_length,
            length_incentive=self.length_incentive,
            length_target=self.length_target,
            repetition_penalty=self.repetition_penalty,
            relevance_scaling=self.relevance_scaling,
            reward_branching=self.reward_branching,
            rouge_l=self.rouge_l,
            bleu=self.bleu,
            relevance_model_name=self.relevance_model_name,
            device=device,
            batch_size=self.reward_model_batch_size,
            cache_dir=cache_dir,
            embedding_cache=self.embedding_cache,
        )


ProxyOverrides = make_dataclass(
    "ProxyOverrides",
    [
        (field.name, f"{field.type} | None", setting(None, f"{field.metadata['help']} (None: as the run was trained)"))
        for field in fields(RewardSettings)
        if field.name != "reward_model_batch_size"
    ],
)
FULL_DESIGN = {"repetition_penalty": True, "relevance_scaling": True, "reward_branching": True}


def proxy_of_run(trained: Mapping, batch_size: int = 8, overrides: Mapping | None = None) -> RewardSettings:
    """The proxy of a run from its recorded settings; the paper's full design where there are none, or no proxy in them.

    Args:
        trained: the run's settings; empty where there is no record.
        batch_size: rows per batch of the reward's models.
        overrides: what to read in place of the record; None values are as the record has them.
    """
    names = {field.name for field in fields(RewardSettings)}
    found = {name: value for name, value in trained.items() if name in names}
    if found.get("reward_model_name"):
        print("trained against a reward model: judged by the full proxy design")
        found = {"relevance_model_name": found["relevance_model_name"]}
    found |= {name: value for name, value in (overrides or {}).items() if name in names and value is not None}
    return RewardSettings(**{**FULL_DESIGN, **found, "reward_model_batch_size": batch_size})


def reward_batch(instructions: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping]) -> dict[str, list]:
    """A batch for any reward: "query", "response", and the dataset's columns by name, "reference" being a row's `output`."""
    names = {name for row in rows for name in row} - {"input", "instruction", "output", "query", "response"}
    columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
    if any("output" in row for row in rows):
        columns["reference"] = [row.get("output") for row in rows]
    return {"query": list(instructions), "response": list(responses), **columns}


# ---------------------------------------------------------------------------------------------------------- command line


@dataclass
class ScoreSettings(RewardSettings):
    files: list[str] = setting([], "rollouts in AlpacaEval's format: rows of instruction and output", positional=True)
    data_path: str = setting("", "rows of the same instructions with qtype and reference (`output`), where the reward reads them")
    chat_template_name: str = setting("alpaca", "template whose stop strings end a response")
    output_max_length: int = setting(512, "longest response in tokens, as the rescaling F uses it")
    cache_dir: str = setting("", "where hub downloads are kept; empty means the default cache")
    device: str = setting("", "cuda, cpu, ...; empty means the GPU where there is one")
    output: str = setting("", "file for the components of every row, as JSON")
    json: bool = setting(False, "print the means as JSON in place of a table")
    repetition_penalty: bool = setting(True, "proxy reward: RP")
    relevance_scaling: bool = setting(True, "proxy reward: QR, and RAR with branching")
    reward_branching: bool = setting(True, "proxy reward: CONSTRAINED rows by reference relevance, OPENENDED ones by query relevance")


def column_mean(column: Sequence) -> float | None:
    """The mean over the numbers of a column; None where it has none."""
    numbers = [value for value in column if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return sum(numbers) / len(numbers) if numbers else None


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(ScoreSettings, description=__doc__)

    # 1. Everything a user can get wrong, before any model loads.
    fields = {"instruction": None, "output": None}
    rollouts = {path: read_rows(path, fields) for path in settings.files}
    known = settings.dataset_fields
    if known and not settings.data_path:
        raise InputError("--data_path is missing, expected the rows' qtype and reference (or --reward_branching=false)")
    batches = {}
    for path, rows in rollouts.items():
        instructions = [row["instruction"] for row in rows]
        data = match_rows(settings.data_path, instructions, known, path) if settings.data_path else [{} for _ in rows]
        batches[path] = reward_batch(instructions, [row["output"] for row in rows], data)
    settings.check_reward()
    check_device(settings.device)
    template = load_template(settings.chat_template_name)

    # 2. Scores.
    from tqdm import tqdm

    reward = settings.load_reward(template, settings.output_max_length, settings.device or None, settings.cache_dir or None)
    every = {"every_feature": True} if settings.is_proxy else {}
    tables = {path: reward.score(batch, **every) for path, batch in tqdm(batches.items(), desc="scores", unit="file", disable=None)}

    # 3. Table, files.
    means = {path: {name: column_mean(column) for name, column in table.items()} for path, table in tables.items()}
    names = [name for name in next(iter(means.values())) if any(mean[name] is not None for mean in means.values())]
    record = provenance(
        dtype="float32",
        template=template.name,
        model=settings.reward_model_name or settings.relevance_model_name,
        reward_source=settings.reward_source(),
        settings=asdict(settings),
    )
    if settings.output:
        per_row = {
            path: [
                {"row": number, "instruction": query, **dict(zip(table, values))}
                for number, (query, *values) in enumerate(zip(batches[path]["query"], *table.values()), start=1)
            ]
            for path, table in tables.items()
        }
        write_json(settings.output, {"rows": per_row, "means": means, "provenance": record})
    if settings.json:
        print(json.dumps({path: {"rows": len(rollouts[path]), **mean} for path, mean in means.items()}, indent=1, allow_nan=False))
        return
    width = max(map(len, means))
    print(f"{'file':<{width}} {'rows':>6} " + " ".join(f"{name:>{max(len(name), 8)}}" for name in names))
    for path, mean in means.items():
        cells = (f"{'-' if mean[name] is None else format(mean[name], '.4f'):>{max(len(name), 8)}}" for name in names)
        print(f"{path:<{width}} {len(rollouts[path]):>6} " + " ".join(cells))


if __name__ == "__main__":
    run_main(main)
