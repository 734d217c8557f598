"""Gold reward models: what the proxy is compared with, and what PPO may train against in its place (`parts/learned_reward.py`).

from parts.gold_models import load_gold_reward_model
gold = load_gold_reward_model("Nexusflow/Starling-RM-34B")
gold.get_reward({"query": [...], "response": [...]})    # -> list of floats
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from parts.adapters import adapter_weights, is_lora, put_on, read_kind
from parts.batching import batches_by_length, batches_by_start, pad, unused_id
from parts.conversations import cut_left, encode_row
from parts.cpu_speed import fewer_kernels, most_tokens, use_onednn
from parts.errors import InputError
from parts.files import REPOSITORY, code_digest
from parts.gold_settings import DEFAULT_GOLD, GoldSettings, is_starling
from parts.models import adapter_base, in_bits, loading, model_identity
from parts.packing import can_pack, longest, without_padding
from parts.rows import require_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


MOST_TOKENS = 2048  # of a row


def gold_facts(name: str, commit: str | None, dtype: str, max_length: int, settings: GoldSettings) -> dict:
    """All that a score depends on besides the row: the weights, their precision, and how a row becomes tokens and these a score.

    `commit` is of a model from a hub, or of an adapter's base from there.
    """
    names = {field.name for field in fields(GoldSettings)} - {"gold_batch_tokens", "gold_dtype"}  # speed; the model's own dtype counts
    source = code_digest(*(REPOSITORY / "parts" / file for file in ("gold_models.py", "conversations.py")))
    known = {"gold": model_identity(name), "source": source, "commit": commit, "dtype": dtype, "max_length": max_length}
    return {**known, **{name: getattr(settings, name) for name in sorted(names)}}


class _GoldRewardModel(ABC):
    """Scores (query, response) rows in batches, length-sorted and padded on the right; subclasses say how to encode and to score."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        batch_size: int,
        max_length: int,
        settings: GoldSettings,
    ):
        self.model = use_onednn(model.eval().requires_grad_(False))
        self.tokenizer = tokenizer
        self.name = name
        self.batch_size = batch_size
        self.max_length = max_length
        self.settings = settings

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def facts(self) -> dict:
        """All that a score depends on besides the row."""
        return gold_facts(self.name, getattr(self.model.config, "_commit_hash", None), self.dtype, self.max_length, self.settings)

    def get_reward(self, batch: Mapping[str, Sequence[str]]) -> list[float]:
        """One float a row for {"query": raw instructions, "response": responses}, in the order given.

        Raises:
            InputError: columns of different lengths, or a score that is not finite (named by row).
        """
        scores = [0.0] * len(batch["query"])
        for rows, found in self.iter_rewards(batch):
            for row, score in zip(rows, found):
                scores[row] = score
        return scores

    def iter_rewards(self, batch: Mapping[str, Sequence[str]]) -> Iterator[tuple[list[int], list[float]]]:
        """`get_reward` batch by batch: the places (from 0) of the rows of each batch and their scores."""
        if len(batch["query"]) != len(batch["response"]):
            raise InputError(f"gold reward: {len(batch['query'])} queries for {len(batch['response'])} responses")
        encoded = [self.encode(query, response) for query, response in zip(batch["query"], batch["response"])]
        tokens = most_tokens(self.settings.gold_batch_tokens, self.model.device)
        for rows in self.batches([ids for ids, _ in encoded], tokens):
            scores = require_finite(self._score_rows([encoded[row] for row in rows]), f"gold reward ({self.name})", rows)
            yield rows, scores

    def encode(self, query: str, response: str) -> tuple[list[int], list[int]]:
        """Token ids of one row, truncated on the left to `max_length`, and their types."""
        return encode_row(self.tokenizer, query, response, self.max_length)

    def batches(self, rows: Sequence[list[int]], tokens: float) -> list[list[int]]:
        """Places of rows of token ids that are scored together, at most `tokens` of them in a batch."""
        return batches_by_length(list(map(len, rows)), self.batch_size, tokens)

    @torch.inference_mode()
    def _score_rows(self, encoded: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        ids, mask = pad([ids for ids, _ in encoded], self.padding([ids for ids, _ in encoded]), device=self.model.device)
        types, _ = pad([types for _, types in encoded], 0, device=self.model.device)
        return self.score_batch(ids, mask, types).float().tolist()

    @abstractmethod
    def padding(self, rows: Sequence[Sequence[int]]) -> int:
        """The id that pads rows of these ids."""

    @abstractmethod
    def score_batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_types: torch.Tensor) -> torch.Tensor:
        """[rows, time] ids, mask and types, padded on the right, to [rows] scores."""


class StarlingRMForInference(_GoldRewardModel):
    """Starling-RM: a Llama trunk under `transformer.`, a bias-free linear `v_head`, read at each row's last real token.

    Args:
        name_or_path: hub name or folder (safetensors).
        tokenizer_name: its tokenizer; the default is what Starling-RM-34B was trained with. Its chat template is ChatML.
        device: "cuda", "cpu", ...; by default every GPU there is (`device_map="auto"`), else the CPU.
        batch_size: most rows per forward pass.
        settings: precision and batches; its `human_assistant_prefix` wraps the instruction as "\\n\\nHuman: ...\\n\\nAssistant: " inside the
            user turn, as the published scoring script did (probably by mistake).
    """

    def __init__(
        self,
        name_or_path: str = DEFAULT_GOLD,
        tokenizer_name: str = "01-ai/Yi-34B-Chat",
        device: str | None = None,
        batch_size: int = 8,
        max_length: int = MOST_TOKENS,
        settings: GoldSettings | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        settings = settings or GoldSettings()
        with loading(tokenizer_name, "a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=False)
        model = _load_model(_starling_class(), name_or_path, device, settings)
        super().__init__(model, tokenizer, name_or_path, batch_size, max_length, settings)

    def encode(self, query: str, response: str) -> tuple[list[int], list[int]]:
        if self.settings.human_assistant_prefix:
            query = f"\n\nHuman: {query}\n\nAssistant: "
        text = f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>"
        ids = cut_left(self.tokenizer, self.tokenizer(text, add_special_tokens=False)["input_ids"], self.max_length)
        return ids, [0] * len(ids)

    def padding(self, rows: Sequence[Sequence[int]]) -> int:
        return 0

    def score_batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_types: torch.Tensor) -> torch.Tensor:
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

    On a CPU a causal model that `packing.can_pack` reads rows without padding, and what the rows of a batch begin with once.

    Args:
        name_or_path: hub name or folder.
        device, batch_size, settings: as for `StarlingRMForInference`.
        max_length: rows longer than this, or than the model's own limit, are truncated on the left.
    """

    def __init__(
        self,
        name_or_path: str,
        device: str | None = None,
        batch_size: int = 8,
        max_length: int = MOST_TOKENS,
        settings: GoldSettings | None = None,
    ) -> None:
        from transformers import AutoModelForSequenceClassification

        settings = settings or GoldSettings()
        base, tokenizer = _base_and_tokenizer(name_or_path)
        is_adapter = base != name_or_path
        if is_adapter and read_kind(name_or_path).get("task_type") not in (None, "SEQ_CLS"):
            task = read_kind(name_or_path)["task_type"]
            raise InputError(f"{name_or_path}/adapter_config.json: task_type is {task!r}, expected SEQ_CLS, a reward model's")
        brought = adapter_weights(name_or_path) if is_adapter else ()
        model = _load_model(AutoModelForSequenceClassification, base, device, settings, is_adapter, brought)
        if is_adapter:
            model = put_on(model, name_or_path, base)
            # Merged into 8 bits, the demo gold's scores were far off; half precision would round.
            if not settings.quantized and model.dtype == torch.float32 and is_lora(name_or_path):
                model = model.merge_and_unload()
        if model.config.num_labels != 1:
            raise InputError(f"{name_or_path}: a head of {model.config.num_labels} labels, expected a reward model with one")
        self.config = model.config.get_text_config()
        super().__init__(model, tokenizer, name_or_path, batch_size, min(max_length, _longest_row(model, tokenizer)), settings)
        self._types = "token_type_ids" in tokenizer.model_input_names
        pad_token_id = self.config.pad_token_id
        self._pad = pad_token_id if pad_token_id is not None and 0 <= pad_token_id < self.config.vocab_size else None
        self._backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
        self._most_packed = 0  # tokens of a row
        if not self._batches_are_alike():
            self.batch_size = 1
        elif can_pack(self._backbone):
            fewer_kernels(self._backbone)
            self._most_packed = longest(self._backbone)
            self._most_packed *= self._batches_are_alike()

    def padding(self, rows: Sequence[Sequence[int]]) -> int:
        """The model's own padding, or an id that no row holds: the score is read where the last other id is."""
        return unused_id(rows, self.config.vocab_size) if self._pad is None else self._pad

    def score_batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_types: torch.Tensor) -> torch.Tensor:
        given = {"token_type_ids": token_types} if self._types else {}
        before = self.config.pad_token_id
        if self._pad is None and len(input_ids) > 1:
            self.config.pad_token_id = self.padding(input_ids.tolist()) if attention_mask.all() else int(input_ids[attention_mask == 0][0])
        try:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **given).logits[:, 0]
        finally:
            self.config.pad_token_id = before

    def batches(self, rows: Sequence[list[int]], tokens: float) -> list[list[int]]:
        """Short rows, which are packed, together with those that begin alike; the others by length."""
        short = [place for place, ids in enumerate(rows) if len(ids) <= self._most_packed]
        long = [place for place, ids in enumerate(rows) if len(ids) > self._most_packed]
        packed = batches_by_start([rows[place] for place in short], self.batch_size, tokens)
        padded = super().batches([rows[place] for place in long], tokens)
        return [[short[at] for at in batch] for batch in packed] + [[long[at] for at in batch] for batch in padded]

    def _score_rows(self, encoded: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        rows = [ids for ids, _ in encoded]
        with without_padding(self._backbone, rows) if max(map(len, rows)) <= self._most_packed else nullcontext():
            return super()._score_rows(encoded)

    def _batches_are_alike(self) -> bool:
        """Whether rows of unequal length that begin alike score together as each alone."""
        first = [token for token in range(self.config.vocab_size) if token != self._pad][:12]
        rows = [(first, [0] * 12), (first[:5] + first[10:], [0] * 7)]
        alone = []
        for row in rows:
            alone += super()._score_rows([row])
        try:
            together = self._score_rows(rows)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        close = 1e-4 if self.model.dtype == torch.float32 else 0.2  # half precision rounds scores by this much at worst
        return bool(np.allclose(together, alone, rtol=close, atol=close))


def _base_and_tokenizer(name_or_path: str) -> tuple[str, PreTrainedTokenizerBase]:
    """The model that an adapter is for, or the name itself; and the tokenizer, an adapter's own where it has one."""
    from transformers import AutoTokenizer

    is_adapter = (Path(name_or_path) / "adapter_config.json").is_file()
    base = adapter_base(name_or_path) if is_adapter else name_or_path
    own = is_adapter and (Path(name_or_path) / "tokenizer_config.json").is_file()
    with loading(name_or_path if own else base, "a reward model's tokenizer"):
        return base, AutoTokenizer.from_pretrained(name_or_path if own else base, trust_remote_code=False)


def _longest_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens that a tokenizer allows and that a model has positions for; `sys.maxsize` where there is no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():  # RoBERTa's kind counts from the padding's id on
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return min(limit if limit > 0 else sys.maxsize, tokenizer.model_max_length)


class LazyGold:
    """A gold reward model that is loaded when the first row has to be scored; until then its files are read, and no weights.

    Args:
        name, device, batch_size, settings: as for `load_gold_reward_model`.

    Attributes:
        dtype: that of its weights.
        facts: as the loaded model's.
    """

    def __init__(self, name: str, device: str | None, batch_size: int, settings: GoldSettings) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        self.name = name
        self._how = {"device": device, "batch_size": batch_size, "settings": settings}
        self.dtype = _dtype(device, settings)
        base, longest_row = name, MOST_TOKENS
        if not is_starling(name):
            base, tokenizer = _base_and_tokenizer(name)
        with loading(base, "a reward model"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            if not is_starling(name):
                with torch.device("meta"):
                    model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
                longest_row = min(MOST_TOKENS, _longest_row(model, tokenizer))
        self.facts = gold_facts(name, getattr(config, "_commit_hash", None), self.dtype, longest_row, settings)

    def iter_rewards(self, batch: Mapping[str, Sequence[str]]) -> Iterator[tuple[list[int], list[float]]]:
        """As the loaded model's."""
        return self._model.iter_rewards(batch)

    @functools.cached_property
    def _model(self) -> _GoldRewardModel:
        return load_gold_reward_model(self.name, **self._how)


def load_gold_reward_model(
    name_or_path: str = DEFAULT_GOLD, device: str | None = None, batch_size: int = 8, settings: GoldSettings | None = None
) -> _GoldRewardModel:
    """Load a gold reward model: Starling where the name or the weights say so, any sequence classification model otherwise.

    Returns:
        An object with `get_reward({"query", "response"}) -> list[float]`.

    Raises:
        InputError: no such model, no safetensors weights, no reward head, or an adapter whose base model is missing.
    """
    cls = SequenceClassificationRMForInference
    tokenizer = {}
    if is_starling(name_or_path):
        cls = StarlingRMForInference
        if (Path(name_or_path) / "tokenizer_config.json").is_file():
            tokenizer = {"tokenizer_name": name_or_path}
    return cls(name_or_path, device=device, batch_size=batch_size, settings=settings, **tokenizer)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' warnings: that a head is missing from the base needs no alarm where an adapter brings it."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _dtype(device: str | None, settings: GoldSettings) -> str:
    cuda = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    return settings.gold_dtype or ("bfloat16" if cuda else "float32")


def _load_model(
    cls: type, name_or_path: str, device: str | None, settings: GoldSettings, new_head: bool = False, brought: Iterable[str] = ()
) -> PreTrainedModel:
    """`cls.from_pretrained` from safetensors, over the GPUs there are or on a CPU; weights that are missing, and not brought, are an error."""
    placement: dict[str, object] = {"device_map": "auto"} if device is None and torch.cuda.is_available() else {}
    labels = {"num_labels": 1} if new_head else {}
    if settings.quantized:
        # The head stays as it is: it is small, and all there is to the score's scale.
        heads = ["v_head", "score", "classifier"]
        placement |= {} if device is None else {"device_map": {"": device}}  # else the current GPU, whatever `device` says
        placement["quantization_config"] = in_bits(settings.load_in_8bit, settings.load_in_4bit, torch.bfloat16, heads)
    with loading(name_or_path, "a reward model"), quiet_loading() if new_head else nullcontext():
        model, loaded = cls.from_pretrained(
            name_or_path,
            dtype=_dtype(device, settings),
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **placement,
            **labels,
        )
    missing = sorted(key for key in loaded["missing_keys"] if not any(name.endswith(f".{key}") for name in brought))
    if missing:
        raise InputError(f"{name_or_path}: no weights for {', '.join(missing[:3])}, expected a trained reward model")
    return model if placement or device is None else model.to(device)
