"""Models by name: which can be loaded, where they run, in how many bits, and their tokenizers."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from parts.errors import InputError
from parts.files import REPOSITORY, digest, file_digest, read_json

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

LOCAL_PREFIXES = ("models/", "outputs/", "assets/", "/", ".", "~")  # names that can only be folders, never on a hub
MOST_DIGESTED = 256 * 1024**2  # bytes; a larger weight file is known by its size and time of change
_CONTENT = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja", "*/config.json", "*/*.safetensors")


def use_cache(cache_dir: str) -> None:
    """Let all downloads of this process go to `cache_dir`, where there is one: those of vLLM and of reward models too.

    The hub's client reads it when it is imported, so this comes first.
    """
    if cache_dir:
        os.environ["HF_HUB_CACHE"] = str(Path(cache_dir).absolute())


def check_model_name(name_or_path: str) -> None:
    """Raise InputError for a model that cannot be loaded, as far as can be told without loading anything."""
    path = Path(name_or_path)
    if (path / "adapter_config.json").is_file():
        adapter_base(name_or_path)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name_or_path}: no config.json in this folder, expected a model or an adapter")
    elif not path.is_dir() and (name_or_path.startswith(LOCAL_PREFIXES) or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name_or_path)):
        hints = {"models/": "python -m parts.bundled_models", "outputs/demo_backbone": "make outputs/demo_backbone"}
        hint = next((f"; `{command}` makes it" for start, command in hints.items() if name_or_path.startswith(start)), "")
        raise InputError(f"{name_or_path}: no such folder, expected a model's folder or its hub name{hint}")


def check_whole_model(name_or_path: str, flag: str) -> None:
    """As `check_model_name`, for a model that is trained or adapted further: an adapter's own weights would be lost without a word."""
    if (Path(name_or_path) / "adapter_config.json").is_file():
        raise InputError(f"{flag}: {name_or_path} is an adapter, expected a whole model (merge_adapter.py makes one of it)")
    check_model_name(name_or_path)


def check_tokenizer_name(name_or_path: str) -> None:
    """As `check_model_name`, for a tokenizer: a folder that holds one alone will do."""
    if not (Path(name_or_path) / "tokenizer_config.json").is_file():
        check_model_name(name_or_path)


def model_identity(name_or_path: str, base: str = "") -> str:
    """What a model is known by in caches: a hub's name, or a digest of a folder's weights, configuration and tokenizer, however it is spelled.

    An adapter's base counts too: `base`, or the one that it names.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return name_or_path
    known = []
    for path in sorted({path for pattern in _CONTENT for path in folder.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        content = file_digest(path) if size <= MOST_DIGESTED else (size, path.stat().st_mtime_ns)
        known.append(f"{path.relative_to(folder)} {content}")
    if (folder / "adapter_config.json").is_file():
        known.append(model_identity(base or adapter_base(folder)))
    return digest(known)


def check_vllm(flag: str) -> None:
    """Raises InputError where vLLM is not installed. `flag` is what asks for it."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"{flag}: vLLM is not installed, expected an environment made with requirements/vllm.txt")


def check_device(name: str) -> None:
    """Raise InputError for a device that PyTorch does not know or that is not here; the empty name is the best there is."""
    import torch

    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        raise InputError(f"--device is {name!r}, expected cpu, cuda or another device of PyTorch") from None
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    here["xpu"] = torch.xpu.device_count() if hasattr(torch, "xpu") else 0
    if (device.index or 0) >= here.get(device.type, 0):
        raise InputError(f"--device is {name!r}, and PyTorch finds no such device here")


def check_bits(load_in_8bit: bool, load_in_4bit: bool) -> None:
    """Raise InputError for weights in 8 and in 4 bits at once, or in either where bitsandbytes is missing."""
    if load_in_8bit and load_in_4bit:
        raise InputError("--load_in_8bit and --load_in_4bit are both set, expected one of them")
    if (load_in_8bit or load_in_4bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "--load_in_8bit and --load_in_4bit need bitsandbytes, which is not installed: pip install -r requirements/quantized.txt"
        )


def in_bits(
    load_in_8bit: bool, load_in_4bit: bool, computed_in: torch.dtype, whole: list[str] | None = None, outliers: float = 6.0
) -> BitsAndBytesConfig | None:
    """How transformers loads weights in 8 bits (LLM.int8) or 4 (nf4); None for neither.

    Args:
        computed_in: the dtype that 4-bit weights are multiplied in.
        whole: modules that stay as they are; by default transformers' choice, a language model's output head.
        outliers: columns of a batch's inputs beyond this are multiplied whole by 8-bit weights; with 0 a row depends on no other row.
    """
    if not (load_in_8bit or load_in_4bit):
        return None
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every product in 8 bits
    return BitsAndBytesConfig(
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        llm_int8_threshold=outliers,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=computed_in,
        llm_int8_skip_modules=whole,
    )


def adapter_base(adapter: str | Path) -> str:
    """The base model of a PEFT adapter folder; a relative folder is looked for here and beside this file.

    Raises:
        InputError: the folder does not exist in either place and the name is not one of a hub.
    """
    config = Path(adapter) / "adapter_config.json"
    base = read_json(config).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{config}: 'base_model_name_or_path' is {base!r}, expected the model that the adapter is for")
    for candidate in (Path(base), REPOSITORY / base):
        if candidate.is_dir():
            return str(candidate)
    try:
        check_model_name(base)
    except InputError as error:
        raise InputError(f"{config}: its base model: {error}") from None
    return base


@contextmanager
def loading(name_or_path: str, what: str) -> Iterator[None]:
    """Turn "not found", "hub not reachable" and "not such a model" into one line. `what`: a policy, a tokenizer ...

    Raises:
        InputError: the block raised OSError, ValueError or ImportError (quantised weights want packages), with their first line.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name_or_path}: cannot be loaded as {what} ({str(error).splitlines()[0]})") from None
    except RuntimeError as error:  # torch's word for weights of other shapes
        if "size mismatch" not in str(error):
            raise
        raise InputError(f"{name_or_path}: cannot be loaded as {what} (its weights have other shapes)") from None


@dataclass(frozen=True)
class ModelFacts:
    """What a causal LM's configuration says, read before its weights are.

    Args:
        name: hub name or folder.
        positions: most tokens of prompt and response together; None where there is no limit.
        vocabulary: rows of its embeddings.
        generation: its generation settings.
    """

    name: str
    positions: int | None
    vocabulary: int
    generation: GenerationConfig | None  # for training alone it may be unknown

    def require_ids(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise InputError for token ids beyond the embeddings."""
        largest = max(map(max, rows))
        if largest >= self.vocabulary:
            raise InputError(
                f"{self.name}: the tokenizer gives id {largest}, expected less than the model's vocabulary of {self.vocabulary}"
            )

    def require_fit(self, rows: Sequence[Sequence[int]], max_length: int) -> None:
        """Raise InputError for rows to learn from that are longer than the model has positions for, or have ids beyond its embeddings."""
        longest = max(map(len, rows))
        if self.positions is not None and longest > self.positions:
            told = f"it has {self.positions} positions, and the longest row has {longest} tokens"
            raise InputError(f"{self.name}: {told}: --max_length is {max_length}, expected at most {self.positions}")
        self.require_ids(rows)

    def require_room(self, prompts: Sequence[Sequence[int]], new_tokens: int, flag: str, are_rows: bool = False) -> None:
        """Raise InputError for prompts with ids beyond the embeddings, or too long for as many new tokens as `flag` says.

        `are_rows`: they are a file's rows, all of them, so that the message can name one.
        """
        self.require_ids(prompts)
        lengths = list(map(len, prompts))
        longest = max(lengths)
        where = f", row {lengths.index(longest) + 1}," if are_rows else ""
        if self.positions is not None and longest + new_tokens > self.positions:
            told = f"{self.name}: it has {self.positions} positions, and the longest prompt{where} has {longest} tokens"
            if longest >= self.positions:
                raise InputError(f"{told}, expected fewer: no token of a response has room")
            raise InputError(f"{told}: {flag} is {new_tokens}, expected at most {self.positions - longest}")


def read_facts(name_or_path: str, tokenizer: PreTrainedTokenizerBase, cache_dir: str | None = None) -> ModelFacts:
    """The facts of a causal LM.

    Raises:
        InputError: its configuration cannot be read, is no causal LM's, or neither it nor the tokenizer names an end token.
    """
    from transformers import AutoConfig, GenerationConfig

    if (Path(name_or_path) / "adapter_config.json").is_file():
        name_or_path = adapter_base(name_or_path)
    with loading(name_or_path, "a causal language model"):
        config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_dir, trust_remote_code=False)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise InputError(f"{name_or_path}: a model with the head of {config.architectures[0]}, expected a causal language model's")
    try:
        generation = GenerationConfig.from_pretrained(name_or_path, cache_dir=cache_dir)
    except OSError:  # no file of its own: what the configuration says
        generation = GenerationConfig.from_model_config(config)
    if tokenizer.eos_token_id is None and generation.eos_token_id is None:
        raise InputError(f"{name_or_path}: neither tokenizer nor generation_config.json names an end token, and no response could end")
    text = config.get_text_config()
    return ModelFacts(name_or_path, getattr(text, "max_position_embeddings", None), text.vocab_size, generation)


def load_causal_lm(name_or_path: str, dtype: torch.dtype, cache_dir: str | None = None, **options: object) -> PreTrainedModel:
    """A causal LM, all of whose weights are in its files.

    Raises:
        InputError: it cannot be loaded, is an adapter, or lacks weights: a reward model's folder has no language model's head.
    """
    from transformers import AutoModelForCausalLM

    with loading(name_or_path, "a causal language model"):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype, cache_dir=cache_dir, trust_remote_code=False, output_loading_info=True, **options
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub's, which only loading tells
        raise InputError(f"{name_or_path}: an adapter, expected a whole model (merge_adapter.py makes one of its folder)")
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise InputError(f"{name_or_path}: no weights for {', '.join(missing[:3])}, expected a trained causal language model")
    return model


def load_tokenizer(name_or_path: str, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer ready for batched generation: padding on the left, with a pad token.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with loading(name_or_path, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, cache_dir=cache_dir, padding_side="left", trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers encode alike, as far as vocabulary, special tokens and chat template tell."""
    return all(
        read(one) == read(other)
        for read in (lambda each: each.chat_template, lambda each: each.special_tokens_map, lambda each: each.get_vocab())
    )
