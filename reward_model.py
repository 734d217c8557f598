"""The reward: white-box features, the formula that composes them, and the choice of another reward.

    from reward_model import ReversedEngineeredRewardForInference
    reward = ReversedEngineeredRewardForInference("alpaca", repetition_penalty=True, relevance_scaling=True, reward_branching=True)
    reward.get_reward({"query": [...], "response": [...], "qtype": [...], "reference": [...]})   # -> list of floats

As a command it scores rollouts in AlpacaEval's format and prints the mean of each feature per file:

    python reward_model.py outputs/full_step_500/alpaca-eval-full_step_500.json --data_path data/eval.json
    python reward_model.py FILE FILE --data_path data/eval.json --output scores.json --json=true

To add a feature: write a function and name it in `FEATURES`. Its flag, help text, columns and log name follow from that line; the names
of its parameters say what it reads (`parts/features.py`).
To change the formula: edit `compose`. To leave this file alone: `--reward_function examples/my_reward.py:hedging`.

Formulas: Kim and Seo, "Rethinking the Role of Proxy Rewards in Language Model Alignment", EMNLP 2024, section 2.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from parts.chat_templates import ChatTemplate, load_template
from parts.cli import parse_settings, setting
from parts.errors import InputError, run_main
from parts.features import UNBRANCHED, Feature, by_switch, switches_of, tokens_of
from parts.files import REPOSITORY, code_digest, code_files
from parts.models import check_model_name
from parts.overlap import bleu, rouge_l
from parts.rewards import ENSEMBLES, FunctionReward, WeightedRewards, check_batch, load_functions, reward_name
from parts.rows import QTYPES, require_finite

if TYPE_CHECKING:
    import torch

    from parts.learned_reward import LearnedReward

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


def length(tokens: Sequence[str], length_target: int) -> float:
    """LI = number of tokens / 100. With `length_target`, `targeted_length` in its place."""
    return targeted_length(tokens, length_target) if length_target else length_incentive(tokens)


def repetition_penalty(tokens: Sequence[str]) -> float:
    """RP = unique trigrams / trigrams. Range (0, 1]; 1.0 for fewer than three tokens. (Kim and Seo 2024)"""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:]))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def query_relevance(query_embeddings: torch.Tensor, response_embeddings: torch.Tensor) -> list[float]:
    """QR = M(query) · M(response). Row by row of two [rows, dimension] embeddings. (Kim and Seo 2024)

    Any number: the raw dot product, not a cosine, not clamped.
    """
    return (query_embeddings * response_embeddings).sum(dim=-1).tolist()


def reference_relevance(reference_embeddings: torch.Tensor, response_embeddings: torch.Tensor) -> list[float]:
    """RAR = M(reference) · M(response). Row by row of two [rows, dimension] embeddings. (Kim and Seo 2024)

    Any number: the raw dot product, not a cosine, not clamped.
    """
    return (reference_embeddings * response_embeddings).sum(dim=-1).tolist()


def rescale(value: float, max_sequence_length: int) -> float:
    """F(r) = r / 3.5 * max_sequence_length / 100: maps [0, 3.5] onto [0, 5.12] for 512 tokens; linear, not clipped. (Kim and Seo 2024)"""
    return value / 3.5 * (max_sequence_length / 100)


BY_QUERY, BY_REFERENCE = (UNBRANCHED, OPENENDED), (CONSTRAINED,)
FEATURES = [
    Feature("length", length, "length_incentive", True, BY_QUERY, symbol="LI", always_shown=True),
    Feature("repetition", repetition_penalty, "repetition_penalty", symbol="RP", always_shown=True),
    Feature("query_relevance", query_relevance, "relevance_scaling", False, BY_QUERY, symbol="relevance", always_shown=True),
    Feature("reference_relevance", reference_relevance, "relevance_scaling", False, BY_REFERENCE, rescale, "relevance", always_shown=True),
    Feature("rouge_l", rouge_l, "rouge_l", rows=(UNBRANCHED, CONSTRAINED)),
    Feature("bleu", bleu, "bleu", rows=(UNBRANCHED, CONSTRAINED)),
]


def query_text(query: str, template: ChatTemplate) -> str:
    """The instruction as the relevance model sees it, from a raw instruction or a rendered prompt.

    The template's frame and role headings are removed, and `</s>`; `### Input:`, " : " and runs of white space become one space; outer colons go.
    """
    text = template.raw_instruction(query)
    for heading in (*template.role_headings, "</s>"):
        text = text.replace(heading, "")
    text = re.sub(r"### Input:\n?", " ", text)
    return re.sub(r"\s+", " ", text.replace(" : ", " ")).strip(" :")


# --------------------------------------------------------------------------------------------------------------- settings


@dataclass
class ProxySettings(switches_of(FEATURES)):
    """The proxy reward: a switch for each feature, and what they share."""

    reward_branching: bool = setting(False, "proxy reward: CONSTRAINED rows by their reference, OPENENDED ones by their query")
    length_target: int = setting(
        0,
        "proxy reward: tokens; above 0, 1 - |tokens / length_target - 1| takes LI's place",
        least=0,
        expected="0 (off) or a number of tokens",
    )
    relevance_model_name: str = setting(DEFAULT_RELEVANCE, "sentence encoder of the relevances", path=True)
    embedding_cache: str = setting(
        "", "file that keeps the embeddings of queries and references over runs; empty means for this run", written=True
    )

    @property
    def on(self) -> list[Feature]:
        """The features whose switch is on."""
        return [feature for feature in FEATURES if getattr(self, feature.switch)]

    @property
    def has_branches(self) -> bool:
        """Whether CONSTRAINED rows are rewarded by something that OPENENDED rows are not."""
        return any(CONSTRAINED in feature.rows and OPENENDED not in feature.rows for feature in self.on)

    @property
    def branches(self) -> bool:
        return self.reward_branching and self.has_branches

    @property
    def used(self) -> list[Feature]:
        """The features that are on and multiply some row's reward."""
        kinds = set(QTYPES) if self.branches else {UNBRANCHED}
        return [feature for feature in self.on if kinds & set(feature.rows)]

    @property
    def needs_encoder(self) -> bool:
        return any(feature.is_embedded for feature in self.on)

    @property
    def columns(self) -> list[str]:
        """The columns of a batch that the features in use read, besides "response" and "qtype"."""
        return list(dict.fromkeys(column for feature in self.used for column in feature.columns))

    @property
    def switched_on(self) -> dict[str, str]:
        """The switches that are on, by symbol; a target stands beside LI."""
        target = {"LI": f"LI (target {self.length_target})"} if self.length_target else {}
        found = {target.get(feature.symbol, feature.symbol or feature.column): feature.switch for feature in self.on}
        return {**found, "branching": "reward_branching"} if self.reward_branching else found

    @property
    def design(self) -> str:
        """The settings that are on, in words."""
        names = [*by_switch(FEATURES), "reward_branching", "length_target"]
        on = ", ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name))
        return on + (f", relevance by `{self.relevance_model_name}`" if self.needs_encoder else "")


FULL_DESIGN = {"repetition_penalty": True, "relevance_scaling": True, "reward_branching": True}


# ------------------------------------------------------------------------------------------------------- the proxy reward


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
        length_incentive, repetition_penalty, relevance_scaling, reward_branching: the paper's switches.
        do_strip: cut responses at the first stop string before counting and matching. The relevance model always sees the uncut response.
        device: of the encoder; the best there is by default.
        batch_size: most texts per encoder batch.
        cache_dir: where hub downloads are kept.
        lazy: load the encoder with the first text to embed, not now.
        more: any other field of `ProxySettings`: a feature's switch, `length_target`, `relevance_model_name`, `embedding_cache`.

    Raises:
        InputError: unknown template, unusable model or cache, or a length that is out of range.
        TypeError: a keyword that is no setting.
    """

    def __init__(
        self,
        template: str | ChatTemplate,
        max_sequence_length: int = 512,
        length_incentive: bool = True,
        repetition_penalty: bool = False,
        relevance_scaling: bool = False,
        reward_branching: bool = False,
        do_strip: bool = True,
        *,
        device: str | None = None,
        batch_size: int = 32,
        cache_dir: str | None = None,
        lazy: bool = False,
        **more: object,
    ) -> None:
        if max_sequence_length < 1:
            raise InputError(f"max_sequence_length is {max_sequence_length}, expected at least 1")
        self.settings = ProxySettings(
            length_incentive=length_incentive,
            repetition_penalty=repetition_penalty,
            relevance_scaling=relevance_scaling,
            reward_branching=reward_branching,
            **more,
        )
        if reward_branching and not self.settings.has_branches:
            warnings.warn("reward_branching without relevance_scaling changes nothing: the reward has no branches", stacklevel=2)
        self.template = load_template(template) if isinstance(template, str) else template
        self.max_sequence_length = max_sequence_length
        self.do_strip = do_strip
        self.relevance_model = None
        if self.settings.needs_encoder:
            from parts.relevance import RelevanceModel

            self.relevance_model = RelevanceModel(
                self.settings.relevance_model_name, device, batch_size, cache_dir, self.settings.embedding_cache
            )
            if not lazy:
                self.relevance_model.load()

    def compose(self, row: Mapping[str, float | str | None]) -> float:
        """The formula: R of one row, the product of the features in use.

        `value` holds only these, so another formula need not know what is off: `return sum(value.values())` is the sum of what is on.
        """
        value = self.in_use(row)
        LI, QR, F_RAR, RP = (value.pop(name, 1.0) for name in ("length", "query_relevance", "reference_relevance", "repetition"))
        return LI * QR * F_RAR * RP * math.prod(value.values())

    def in_use(self, row: Mapping[str, float | str | None]) -> dict[str, float]:
        """By column, the features that are on and that the row's branch uses; RAR as F(RAR)."""
        kind = row["branch"] if self.settings.branches else UNBRANCHED
        return {
            feature.column: feature.scale(row[feature.column], self.max_sequence_length) if feature.scale else row[feature.column]
            for feature in self.settings.on
            if kind in feature.rows
        }

    def variant(self, **switches: bool) -> ReversedEngineeredRewardForInference:
        """The same reward with other switches, for `compose`; it shares the encoder."""
        other = copy.copy(self)
        other.settings = replace(self.settings, **switches)
        return other

    @property
    def required_columns(self) -> list[str]:
        """The columns of a batch that these settings read."""
        read = self.settings.columns
        first = ["query"] if "query" in read else []
        qtype = ["qtype"] if self.settings.branches else []
        return ["response", *first, *qtype, *(column for column in read if column not in ("query", "qtype"))]

    def remember(self, batch: Mapping[str, Sequence]) -> None:
        """Embed the queries and references of a batch ahead of its scores.

        A run that does this once, at its start, gets the same last digits wherever it is interrupted and resumed: an embedding depends
        a little on the texts that share its batch.
        """
        read = dict.fromkeys(name for feature in self.settings.used for name in feature.reads if name.endswith("_embeddings"))
        rows = range(len(batch["response"]))
        for name in read:
            for start in range(0, len(rows), ROWS_PER_BLOCK):
                if name != "response_embeddings":
                    self._column(name, batch, rows[start : start + ROWS_PER_BLOCK])

    def get_reward(self, batch: Mapping[str, Sequence]) -> list[float]:
        """The rewards of a batch, one float a row: the "total" column of `score`."""
        return self.score(batch)["total"]

    def score(self, batch: Mapping[str, Sequence], every_feature: bool = False) -> dict[str, list]:
        """The features of every row, and its reward.

        Args:
            batch: equally long columns: "query" (raw instruction or rendered prompt), "response", "qtype", "reference" and others of the
                dataset, as far as the settings use them (`required_columns`); further columns are ignored.
            every_feature: compute each feature that is switched on for all rows, whatever a row's own branch uses.

        Returns:
            A column for each feature that is on or `always_shown`, "branch" and "total". A feature that a row's branch does not use is None.

        Raises:
            InputError: a missing or short column, a cell that is not text, an unknown qtype, or a reward that is not finite.
        """
        check_batch(batch, self.required_columns)
        count = len(batch["response"])
        branch = list(batch["qtype"]) if self.settings.branches else [OPENENDED] * count
        kinds = branch if self.settings.branches else [UNBRANCHED] * count

        shown = [feature for feature in FEATURES if feature.always_shown or feature in self.settings.on]
        table: dict[str, list] = {feature.column: [None] * count for feature in shown}
        masks = {feature: self._rows_of(feature, kinds, batch, every_feature) for feature in shown}
        self._read_texts({feature: mask for feature, mask in masks.items() if not feature.is_embedded}, batch, table)
        self._read_embeddings({feature: mask for feature, mask in masks.items() if feature.is_embedded}, batch, table)
        table["branch"] = branch
        table["total"] = require_finite([self.compose(dict(zip(table, row))) for row in zip(*table.values())], "proxy reward")
        return table

    def _rows_of(self, feature: Feature, kinds: Sequence[str], batch: Mapping[str, Sequence], every_feature: bool) -> list[bool]:
        """Whether a feature is computed, row by row."""
        is_on = feature in self.settings.on
        for_all = feature.always_shown and not feature.columns  # it reads the response alone
        for_all |= is_on and every_feature and all(None not in batch.get(column, [None]) for column in feature.columns)
        return [for_all or (is_on and kind in feature.rows) for kind in kinds]

    def _read_texts(self, masks: Mapping[Feature, list[bool]], batch: Mapping[str, Sequence], table: dict[str, list]) -> None:
        """Fill in the features that read texts, row by row."""
        for row, response in enumerate(batch["response"]):
            text = self.template.strip_response(response) if self.do_strip else response
            given = {"text": text, "tokens": tokens_of(text), **self._options}
            for feature, mask in masks.items():
                if mask[row]:
                    values = {name: given[name] if name in given else batch[name][row] for name in feature.reads}
                    table[feature.column][row] = feature.function(**values)

    def _read_embeddings(self, masks: Mapping[Feature, list[bool]], batch: Mapping[str, Sequence], table: dict[str, list]) -> None:
        """Fill in the features that read embeddings, block by block, responses of similar length together."""
        if self.relevance_model is None:
            return
        from parts.batching import batches_by_length

        responses = batch["response"]
        for block in batches_by_length(list(map(len, responses)), ROWS_PER_BLOCK):
            embedded = self.relevance_model.embed([responses[row] for row in block])
            for feature, mask in masks.items():
                places = [place for place, row in enumerate(block) if mask[row]]
                rows = [block[place] for place in places]
                if rows:
                    given = {"response_embeddings": embedded[places], **self._options}
                    values = {name: given[name] if name in given else self._column(name, batch, rows) for name in feature.reads}
                    for row, value in zip(rows, feature.function(**values)):
                        table[feature.column][row] = value

    def _column(self, name: str, batch: Mapping[str, Sequence], rows: Sequence[int]) -> torch.Tensor | list:
        """Some rows of what a feature of embeddings reads: those of "query_embeddings" are kept, so each text is embedded once."""
        column = name.removesuffix("_embeddings")
        cells = [batch[column][row] for row in rows]
        if column == name:
            return cells
        return self.relevance_model.embed_once([query_text(cell, self.template) if column == "query" else cell for cell in cells])

    @property
    def _options(self) -> dict[str, int]:
        return {"length_target": self.settings.length_target, "max_sequence_length": self.max_sequence_length}


# ------------------------------------------------------------------------------------------------------- which reward


@dataclass
class RewardSettings(ProxySettings):
    """Which reward: the proxy, a user's function, or a learned reward model."""

    reward_function: list[str] = setting(
        [],
        "your own reward in place of the proxy: path/to/file.py:name, or several",
        path=True,
        group=("another reward", "In the proxy's place."),
    )
    reward_weights: list[float] = setting([], "weights of several reward functions; empty means 1 each")
    reward_model_name: list[str] = setting(
        [], "reward model to use in place of the proxy (the paper's baseline rows); several are an ensemble", path=True
    )
    reward_ensemble: str = setting(
        "mean",
        "how several reward models become one: mean, wco (the lowest), uwo (mean minus uwo_coefficient * variance)",
        choices=ENSEMBLES,
    )
    uwo_coefficient: float = setting(0.1, "how much the members' variance counts under uwo", least=0)
    reward_offload: bool = setting(False, "reward models wait in host memory, and are on the GPU one at a time")
    reward_model_batch_size: int = setting(8, "rows per batch of the relevance encoder or the reward model", least=1)

    def __post_init__(self) -> None:
        for name in ("reward_function", "reward_model_name"):  # a lone one, as older records have it
            if isinstance(text := getattr(self, name), str):
                setattr(self, name, [text] if text else [])
        super().__post_init__()
        if self.reward_weights and not self.reward_function:
            raise InputError("--reward_weights are for --reward_function, which is missing")
        if self.reward_function and self.reward_model_name:
            raise InputError("--reward_function and --reward_model_name are both set, expected one reward")
        for name in self.reward_model_name:
            if sum(Path(other).resolve() == Path(name).resolve() for other in self.reward_model_name) > 1:
                raise InputError(f"--reward_model_name names {name} twice, expected different reward models")
        if self.reward_ensemble != "mean" and len(self.reward_model_name) < 2:
            raise InputError(f"--reward_ensemble is {self.reward_ensemble}, expected at least two --reward_model_name with it")
        if self.reward_offload and not self.reward_model_name:
            raise InputError("--reward_offload=true is for reward models, expected --reward_model_name with it")
        if self.uwo_coefficient != 0.1 and self.reward_ensemble != "uwo":
            raise InputError(f"--uwo_coefficient is {self.uwo_coefficient} and --reward_ensemble is {self.reward_ensemble}, expected uwo")
        if self.is_proxy and self.length_target and not self.length_incentive:
            raise InputError(f"--length_target is {self.length_target} and --length_incentive is off, expected it on: it takes LI's place")
        if self.is_proxy and not self.on:
            raise InputError("every part of the proxy reward is off, expected at least one to learn from")

    @property
    def functions(self) -> str:
        """The reward functions in words, with their weights; empty where there are none."""
        weights = self.reward_weights or [1.0] * len(self.reward_function)
        several = len(self.reward_function) > 1 or self.reward_weights
        return " + ".join(f"{weight:g} * {name}" if several else name for weight, name in zip(weights, self.reward_function))

    @property
    def named(self) -> str:
        """The reward where it is not the proxy: functions, a reward model, or an ensemble of them; else empty."""
        return self.functions or reward_name(asdict(self))

    @property
    def design(self) -> str:
        return super().design if self.is_proxy else self.named

    @property
    def is_proxy(self) -> bool:
        return not (self.reward_function or self.reward_model_name)

    def reads_besides(self, *known: str) -> bool:
        """Whether the reward reads columns of the rows besides their prompt and these; a user's function may read any."""
        return bool(set(self.dataset_fields) - set(known) or self.reward_function)

    @property
    def dataset_fields(self) -> dict[str, tuple[str, ...] | None]:
        """What each row must carry for this reward besides its prompt, as `read_rows` takes it."""
        columns = self.columns if self.is_proxy else []
        found = {"output" if column == "reference" else column: None for column in columns if column != "query"}
        return {**found, "qtype": QTYPES} if self.is_proxy and self.branches else found

    def check_reward(self) -> None:
        """Raises InputError for what can be known to be unusable before a model loads."""
        if self.reward_function:
            load_functions(self.reward_function, self.reward_weights)
        elif self.reward_model_name:
            for name in self.reward_model_name:
                check_model_name(name)
        elif self.needs_encoder:
            check_model_name(self.relevance_model_name)
            if self.embedding_cache:
                from parts.relevance import EmbeddingStore

                EmbeddingStore(self.embedding_cache, "").close()

    @property
    def models(self) -> list[str]:
        """The names of the models that the reward computes with."""
        if self.is_proxy:
            return [self.relevance_model_name] if self.needs_encoder else []
        return list(self.reward_model_name)

    def reward_source(self) -> dict[str, str]:
        """Digests of the code that computes the reward, comments and docstrings left out: another digest means other scores."""
        parts = ["features.py", "relevance.py", "chat_templates.py", "overlap.py"]
        parts += ["learned_reward.py", "rewards.py", "gold_models.py", "conversations.py"] if self.reward_model_name else []
        own = [Path(__file__), *(REPOSITORY / "parts" / name for name in parts)]
        source = {str(path.relative_to(REPOSITORY)): code_digest(path) for path in own}
        for path in dict.fromkeys(Path(function.rpartition(":")[0]) for function in self.reward_function):
            source[path.name if path.name not in source else str(path)] = code_digest(*code_files(path))
        return source

    def load_reward(
        self, template: ChatTemplate, max_sequence_length: int, device: str | None, cache_dir: str | None = None, lazy: bool = False
    ) -> ReversedEngineeredRewardForInference | FunctionReward | WeightedRewards | LearnedReward:
        """The reward that these settings describe; `max_sequence_length` is the longest response in tokens, `lazy` as for the proxy."""
        if self.reward_function:
            return load_functions(self.reward_function, self.reward_weights)
        if self.reward_model_name:
            from parts.learned_reward import LearnedReward

            how = (self.reward_ensemble, self.uwo_coefficient, self.reward_offload)
            return LearnedReward(self.reward_model_name, device, self.reward_model_batch_size, *how)
        proxy = {field.name: getattr(self, field.name) for field in fields(ProxySettings)}
        loading = {"device": device, "batch_size": self.reward_model_batch_size, "cache_dir": cache_dir, "lazy": lazy}
        return ReversedEngineeredRewardForInference(template, max_sequence_length, **proxy, **loading)


def proxy_of_run(trained: Mapping, batch_size: int = 8, typed: Mapping | None = None) -> RewardSettings:
    """The proxy of a run: what the user typed, else what its record says, else the paper's full design.

    Args:
        trained: the run's recorded settings; empty where there is no record.
        batch_size: rows per batch of the reward's models.
        typed: settings that the user gave; None is as good as not given.

    Raises:
        InputError: a record that describes no reward, or settings that the user gave and this reward does not read.
    """
    names = {field.name for field in fields(RewardSettings)}
    found = {name: value for name, value in trained.items() if name in names}
    given = {name: value for name, value in (typed or {}).items() if name in names and value is not None}
    another = bool(given.get("reward_function") or given.get("reward_model_name"))
    if found.get("reward_model_name"):
        if not another:
            print("trained against a reward model: judged by the full proxy design")
        found = {name: value for name, value in found.items() if name == "relevance_model_name"}
    try:
        RewardSettings(**{**FULL_DESIGN, **without_idle_settings(found, found)})
    except InputError as error:
        raise InputError(f"the run's record: {error}") from None
    if another:  # the recorded functions' weights are not these ones'
        found = {name: value for name, value in found.items() if name not in ("reward_function", "reward_weights")}
    found |= {"reward_model_batch_size": batch_size}
    return RewardSettings(**{**FULL_DESIGN, **without_idle_settings(found, found | given), **given})


def without_idle_settings(recorded: Mapping, settings: Mapping) -> dict:
    """A length target counts only where LI is on, and some settings only of reward models: other runs may have recorded them.

    Returns:
        Those of `recorded` that count beside all the `settings`.
    """
    idle = set() if settings.get("length_incentive", True) else {"length_target"}
    idle |= set() if settings.get("reward_model_name") else {"reward_offload"}
    idle |= set() if settings.get("reward_ensemble") == "uwo" else {"uwo_coefficient"}
    return {name: value for name, value in recorded.items() if name not in idle}


def main() -> None:
    from parts.score_files import ScoreFileSettings, score_files

    settings, typed = parse_settings(
        ScoreFileSettings, description=__doc__, typed_only=RewardSettings, otherwise="as in the paper's full design"
    )
    rewards = RewardSettings(**{**FULL_DESIGN, **typed})
    if not rewards.is_proxy and (idle := [field.name for field in fields(ProxySettings) if typed.get(field.name)]):
        raise InputError(f"--{idle[0]}: {rewards.named} does not read it, expected it with the proxy alone")
    score_files(settings, rewards)


if __name__ == "__main__":
    run_main(main)
