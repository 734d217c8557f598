"""The reward module: white-box features, the reverse-engineered reward, and gold reward models.

    from reward_model import ReversedEngineeredRewardForInference
    reward = ReversedEngineeredRewardForInference("alpaca", repetition_penalty=True, relevance_scaling=True, reward_branching=True)
    reward.get_reward({"query": [...], "response": [...], "qtype": [...], "reference": [...]})   # -> list of floats

To design your own reward, write a feature as a pure function beside the ones below and use it in
`ReversedEngineeredRewardForInference.score`: what that returns as "total" is what PPO maximises.

Formulas: Kim and Seo, "Rethinking the Role of Proxy Rewards in Language Model Alignment", EMNLP 2024.
"""

from __future__ import annotations

import functools
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from nltk.tokenize import wordpunct_tokenize
from torch import nn

from chat_templates import TOKENIZER_OWN, ChatTemplate, load_template
from records import QTYPES, REPOSITORY, InputError, read_json, require_finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPENENDED, CONSTRAINED = QTYPES
DEFAULT_GOLD = "Nexusflow/Starling-RM-34B"
DEFAULT_RELEVANCE = "facebook/contriever"
LOCAL_PREFIXES = ("models/", "outputs/", "assets/", "/", ".", "~")  # names that can only be folders, never on a hub


# --------------------------------------------------------------------------------------------------------------- features


def length_incentive(tokens: Sequence[str]) -> float:
    """LI = number of tokens / 100. Range [0, inf): unbounded by design; 0 for an empty response."""
    return len(tokens) / 100


def repetition_penalty(tokens: Sequence[str]) -> float:
    """RP = unique trigrams / trigrams. Range (0, 1]; 1.0 for fewer than three tokens."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:]))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def relevance(anchors: torch.Tensor, responses: torch.Tensor) -> list[float]:
    """Row-wise raw dot product M(anchor) . M(response) of two [rows, dimension] embeddings. Not a cosine, not clamped.

    With the instruction as anchor this is query relevance (QR), with the reference answer reference-answer relevance (RAR).
    """
    return (anchors * responses).sum(dim=-1).tolist()


def rescale(value: float, max_sequence_length: int) -> float:
    """F(r) = r / 3.5 * max_sequence_length / 100: maps [0, 3.5] onto [0, 5.12] for 512 tokens; linear, not clipped."""
    return value / 3.5 * (max_sequence_length / 100)


def query_text(query: str, template: ChatTemplate) -> str:
    """The instruction as the relevance model sees it, from a raw instruction or a rendered prompt.

    The template's frame and role headings are removed, and `</s>`; `### Input:`, " : " and runs of white space become one space; outer colons go.
    """
    text = template.raw_instruction(query)
    for heading in (*template.role_headings, "</s>"):
        text = text.replace(heading, "")
    text = re.sub(r"### Input:\n?", " ", text)
    return re.sub(r"\s+", " ", text.replace(" : ", " ")).strip(" :")


def load_relevance_model(name_or_path: str, device: str | None = None, cache_dir: str | None = None) -> SentenceTransformer:
    """A sentence encoder with mean pooling over the mask, no normalisation, texts truncated on the left.

    The two modules are built here because the settings that some models ship (normalise, cut at 256 tokens) change the dot
    product that the method is defined with.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    hub = {"cache_dir": cache_dir} if cache_dir else {}
    transformer = Transformer(name_or_path, model_kwargs=hub, processor_kwargs={**hub, "truncation_side": "left"}, config_kwargs=hub)
    positions = transformer.auto_model.config.max_position_embeddings
    transformer.max_seq_length = min(transformer.tokenizer.model_max_length, positions)
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")], device=device)


# ------------------------------------------------------------------------------------------------------- the proxy reward


class RewardModel(Protocol):
    """Anything that scores a batch {"query": [...], "response": [...]} row by row."""

    def get_reward(self, batch: Mapping[str, Sequence[str]]) -> list[float]: ...


class ReversedEngineeredRewardForInference:
    """The white-box proxy reward.

    With LI, RP, QR, RAR and F as above, and LI = RP = 1 where their flag is off:

        no relevance                     R = LI * RP
        relevance                        R = LI * QR * RP
        relevance and branching          R = LI * QR * RP   where qtype is OPENENDED
                                         R = F(RAR) * RP    where qtype is CONSTRAINED

    Args:
        template: a template name ("alpaca") or a `ChatTemplate`: its stop strings end a response, its frame is taken off queries.
        max_sequence_length: the longest response in tokens, as F uses it.
        length_incentive, repetition_penalty, relevance_scaling, reward_branching: the parts, as above.
        do_strip: cut responses at the first stop string before counting. The relevance model always sees the uncut response.
        relevance_model_name: hub name or folder of the encoder M; loaded only with `relevance_scaling`.
        device: of the encoder; the best there is by default.
        batch_size: texts per encoder batch.
        cache_dir: where hub downloads are kept.

    Raises:
        InputError: unknown template, or a length that is not positive.
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
        relevance_model_name: str = DEFAULT_RELEVANCE,
        device: str | None = None,
        batch_size: int = 32,
        cache_dir: str | None = None,
    ) -> None:
        if max_sequence_length < 1:
            raise InputError(f"max_sequence_length is {max_sequence_length}, expected at least 1")
        if reward_branching and not relevance_scaling:
            warnings.warn("reward_branching without relevance_scaling changes nothing: the reward has no branches", stacklevel=2)
        self.template = load_template(template) if isinstance(template, str) else template
        self.max_sequence_length = max_sequence_length
        self.length_incentive = length_incentive
        self.repetition_penalty = repetition_penalty
        self.relevance_scaling = relevance_scaling
        self.reward_branching = reward_branching and relevance_scaling
        self.do_strip = do_strip
        self.batch_size = batch_size
        self.relevance_model = load_relevance_model(relevance_model_name, device, cache_dir) if relevance_scaling else None

    @property
    def required_columns(self) -> list[str]:
        """The columns of a batch that these settings read."""
        columns = ["response"]
        if self.relevance_scaling:
            columns.append("query")
        if self.reward_branching:
            columns += ["qtype", "reference"]
        return columns

    def get_reward(self, batch: Mapping[str, Sequence[str]]) -> list[float]:
        """The rewards of a batch, one float a row: the "total" column of `score`."""
        return self.score(batch)["total"]

    def score(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list]:
        """The named components of every row's reward.

        Args:
            batch: equally long columns "query" (raw instruction or rendered prompt), "response", "qtype" and "reference";
                the last two, and the query, only where the settings use them.

        Returns:
            Columns "length" (LI), "repetition" (RP), "query_relevance" (QR), "reference_relevance" (RAR), "branch" and
            "total". A relevance that a row's branch does not use is None.

        Raises:
            InputError: a missing or short column, an unknown qtype, or a reward that is not finite.
        """
        self._check(batch)
        responses = batch["response"]
        tokens = [wordpunct_tokenize(self.template.strip_response(text) if self.do_strip else text) for text in responses]
        length = [length_incentive(row) for row in tokens]
        repetition = [repetition_penalty(row) for row in tokens]
        branch = list(batch["qtype"]) if self.reward_branching else [OPENENDED] * len(responses)
        relevances = self._relevances(batch, branch) if self.relevance_scaling else [None] * len(responses)

        total = []
        for li, rp, rel, row_branch in zip(length, repetition, relevances, branch):
            li = li if self.length_incentive else 1.0
            rp = rp if self.repetition_penalty else 1.0
            if rel is None:
                total.append(li * rp)
            elif row_branch == OPENENDED:
                total.append(li * rel * rp)
            else:
                total.append(rescale(rel, self.max_sequence_length) * rp)
        return {
            "length": length,
            "repetition": repetition,
            "query_relevance": [rel if name == OPENENDED else None for rel, name in zip(relevances, branch)],
            "reference_relevance": [rel if name == CONSTRAINED else None for rel, name in zip(relevances, branch)],
            "branch": branch,
            "total": require_finite(total, "proxy reward"),
        }

    def _relevances(self, batch: Mapping[str, Sequence[str]], branch: Sequence[str]) -> list[float]:
        anchors = [
            batch["reference"][row] if name == CONSTRAINED else query_text(batch["query"][row], self.template)
            for row, name in enumerate(branch)
        ]
        return relevance(self._embed(anchors), self._embed(batch["response"]))

    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        return self.relevance_model.encode(list(texts), batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False)

    def _check(self, batch: Mapping[str, Sequence[str]]) -> None:
        for column in self.required_columns:
            if batch.get(column) is None:
                raise InputError(f"proxy reward: column '{column}' is missing, expected it with these settings")
            if len(batch[column]) != len(batch["response"]):
                raise InputError(f"proxy reward: column '{column}' has {len(batch[column])} rows, expected {len(batch['response'])}")
        if self.reward_branching:
            for number, qtype in enumerate(batch["qtype"], start=1):
                if qtype not in QTYPES:
                    raise InputError(f"proxy reward: row {number}: qtype is {qtype!r}, expected {' or '.join(QTYPES)}")


# ------------------------------------------------------------------------------------------------------ gold reward models


def encode_conversation(tokenizer: PreTrainedTokenizerBase, query: str, response: str, max_length: int) -> list[int]:
    """Token ids of one user turn and one assistant turn in the tokenizer's own chat template, the last `max_length` of them.

    A tokenizer without a chat template (cross-encoder reward models) encodes the two texts as a pair.
    """
    if not tokenizer.chat_template:
        ids = tokenizer(query, response)["input_ids"]
    else:
        template = load_template(TOKENIZER_OWN, tokenizer)
        text = template.render_chat(
            [{"role": "user", "content": query}, {"role": "assistant", "content": response}], add_generation_prompt=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[-max_length:]


class _GoldRewardModel(ABC):
    """Scores (query, response) rows in length-sorted, right-padded batches; subclasses say how to encode and to score."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, batch_size: int, max_length: int):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.batch_size = batch_size
        self.max_length = max_length

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def get_reward(self, batch: Mapping[str, Sequence[str]]) -> list[float]:
        """One float a row for {"query": raw instructions, "response": responses}, in the order given.

        Raises:
            InputError: columns of different lengths, or a score that is not finite (named by row).
        """
        if len(batch["query"]) != len(batch["response"]):
            raise InputError(f"gold reward: {len(batch['query'])} queries for {len(batch['response'])} responses")
        encoded = [self.encode(query, response) for query, response in zip(batch["query"], batch["response"])]
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        scores = [0.0] * len(encoded)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, score in zip(rows, self._score_ids([encoded[row] for row in rows])):
                scores[row] = score
        return require_finite(scores, f"gold reward ({self.name})")

    def encode(self, query: str, response: str) -> list[int]:
        """Token ids of one row, truncated on the left to `max_length`."""
        return encode_conversation(self.tokenizer, query, response, self.max_length)

    @torch.inference_mode()
    def _score_ids(self, encoded: list[list[int]]) -> list[float]:
        longest = max(map(len, encoded))
        ids = torch.tensor([row + [self.pad_token_id] * (longest - len(row)) for row in encoded])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
        device = self.model.device
        return self.score_batch(ids.to(device), mask.to(device)).float().tolist()

    pad_token_id: int

    @abstractmethod
    def score_batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[rows, time] ids and mask, padded on the right, to [rows] scores."""


class StarlingRMForInference(_GoldRewardModel):
    """Starling-RM: a Llama trunk under `transformer.`, a bias-free linear `v_head`, read at each row's last real token.

    Args:
        name_or_path: hub name or folder (safetensors).
        tokenizer_name: its tokenizer; the default is what Starling-RM-34B was trained with. Its chat template is ChatML.
        device: "cuda", "cpu", ...; by default every GPU there is (`device_map="auto"`), else the CPU.
        batch_size: rows per forward pass.
        human_assistant_prefix: wrap the instruction as "\\n\\nHuman: ...\\n\\nAssistant: " inside the user turn, as the published
            scoring script did (probably by mistake).
    """

    pad_token_id = 0

    def __init__(
        self,
        name_or_path: str = DEFAULT_GOLD,
        tokenizer_name: str = "01-ai/Yi-34B-Chat",
        device: str | None = None,
        batch_size: int = 8,
        max_length: int = 2048,
        human_assistant_prefix: bool = False,
    ) -> None:
        from transformers import AutoTokenizer

        model = _load_model(_starling_class(), name_or_path, device)
        super().__init__(model, AutoTokenizer.from_pretrained(tokenizer_name), name_or_path, batch_size, max_length)
        self.human_assistant_prefix = human_assistant_prefix

    def encode(self, query: str, response: str) -> list[int]:
        if self.human_assistant_prefix:
            query = f"\n\nHuman: {query}\n\nAssistant: "
        text = f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
        return self.tokenizer(text)["input_ids"][-self.max_length :]

    def score_batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask)


@functools.cache
def _starling_class() -> type[PreTrainedModel]:
    """The module class of the checkpoint; built on first use, so that importing this file does not import all of transformers."""
    from transformers import LlamaModel, LlamaPreTrainedModel

    class StarlingRewardModel(LlamaPreTrainedModel):
        base_model_prefix = "transformer"

        def __init__(self, config):
            super().__init__(config)
            self.transformer = LlamaModel(config)
            self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
            self.post_init()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            last = attention_mask.sum(dim=1) - 1
            rewards = self.v_head(hidden).squeeze(-1)
            return rewards[torch.arange(len(rewards), device=rewards.device), last.to(rewards.device)]

    return StarlingRewardModel


class SequenceClassificationRMForInference(_GoldRewardModel):
    """Any one-label `AutoModelForSequenceClassification` reward model (hub name, folder, or a PEFT adapter folder on one).

    Args:
        name_or_path: hub name or folder.
        device, batch_size: as for `StarlingRMForInference`.
        max_length: rows longer than this, or than the model's own limit, are truncated on the left.
    """

    def __init__(self, name_or_path: str, device: str | None = None, batch_size: int = 8, max_length: int = 2048) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        adapter = Path(name_or_path) / "adapter_config.json"
        is_adapter = adapter.is_file()
        base = adapter_base(name_or_path) if is_adapter else name_or_path
        # A reward adapter carries the head itself; a plain model must bring it, or its scores would be random numbers.
        if is_adapter and read_json(adapter)["task_type"] != "SEQ_CLS":
            raise InputError(f"{adapter}: task_type is {read_json(adapter)['task_type']!r}, expected SEQ_CLS, a reward model's")
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = _load_model(AutoModelForSequenceClassification, base, device, new_head=is_adapter)
        if is_adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name_or_path).merge_and_unload()
        if model.config.num_labels != 1:
            raise InputError(f"{name_or_path}: a head of {model.config.num_labels} labels, expected a reward model with one")
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_token_id = model.config.pad_token_id
        super().__init__(model, tokenizer, name_or_path, batch_size, min(max_length, tokenizer.model_max_length))

    def score_batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1)


def load_gold_reward_model(name_or_path: str = DEFAULT_GOLD, device: str | None = None, batch_size: int = 8) -> RewardModel:
    """Load a gold reward model: Starling where the name or the weights say so, any sequence classification model otherwise.

    Returns:
        An object with `get_reward({"query", "response"}) -> list[float]`.

    Raises:
        InputError: no such model, no safetensors weights, no reward head, or an adapter whose base model is missing.
    """
    if _is_starling(name_or_path):
        own_tokenizer = (Path(name_or_path) / "tokenizer_config.json").is_file()
        tokenizer = {"tokenizer_name": name_or_path} if own_tokenizer else {}
        return StarlingRMForInference(name_or_path, device=device, batch_size=batch_size, **tokenizer)
    return SequenceClassificationRMForInference(name_or_path, device=device, batch_size=batch_size)


def check_model_name(name_or_path: str) -> None:
    """Raise InputError for a model that cannot be loaded, as far as can be told without loading anything."""
    path = Path(name_or_path)
    if (path / "adapter_config.json").is_file():
        adapter_base(name_or_path)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name_or_path}: no config.json in this folder, expected a model or an adapter")
    elif not path.is_dir() and (name_or_path.startswith(LOCAL_PREFIXES) or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name_or_path)):
        hint = "; `python embedded_models.py` unpacks the embedded models" if name_or_path.startswith("models/") else ""
        raise InputError(f"{name_or_path}: no such folder, expected a model's folder or its hub name{hint}")


def adapter_base(adapter: str | Path) -> str:
    """The base model of a PEFT adapter folder; a relative folder is looked for here and beside this file.

    Raises:
        InputError: the folder does not exist in either place and the name is not one of a hub.
    """
    base = read_json(Path(adapter) / "adapter_config.json")["base_model_name_or_path"]
    for candidate in (Path(base), REPOSITORY / base):
        if candidate.is_dir():
            return str(candidate)
    check_model_name(base)
    return base


def _is_starling(name_or_path: str) -> bool:
    folder = Path(name_or_path)
    if folder.is_dir():
        return "v_head.weight" in _weight_names(folder)
    return "starling-rm" in name_or_path.lower()


def _weight_names(folder: Path) -> Iterable[str]:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return read_json(index)["weight_map"].keys()
    single = folder / "model.safetensors"
    if not single.is_file():
        return ()
    with safe_open(single, framework="pt") as weights:
        return list(weights.keys())


def _load_model(cls: type, name_or_path: str, device: str | None, new_head: bool = False) -> PreTrainedModel:
    """`cls.from_pretrained` from safetensors: bf16 over the GPUs there are, fp32 on a CPU; missing weights are an error."""
    cuda = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    placement = {"device_map": "auto"} if cuda and device is None else {}
    labels = {"num_labels": 1} if new_head else {}
    try:
        model, loaded = cls.from_pretrained(
            name_or_path,
            dtype=torch.bfloat16 if cuda else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **placement,
            **labels,
        )
    except OSError as error:
        raise InputError(f"{name_or_path}: cannot be loaded as a reward model ({str(error).splitlines()[0]})") from None
    missing = sorted(loaded["missing_keys"])
    if missing and not new_head:
        raise InputError(f"{name_or_path}: no weights for {', '.join(missing[:3])}, expected a trained reward model")
    return model if placement or device is None else model.to(device)
