"""PEFT adapters on a causal LM that is used again after them: which kinds are taken, and how one is put on.

    check_adapter(folder)                       # before anything loads
    model = put_on(base, folder)
    base = model.unload() if gives_base_back(folder) else None      # None: load the base again

A kind is taken where the tests compare it with PEFT alone, itself and the plain LoRA after it. Kinds that put tokens before the prompt,
choose among adapters by the prompt, or want inputs of their own are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parts.errors import InputError
from parts.files import read_json, write_json
from parts.models import loading

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

KINDS = (
    "LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "LN_TUNING", "VERA", "FOURIERFT", "HRA", "RANDLORA", "ROAD",
    "TRAINABLE_TOKENS", "SHIRA", "C3A", "WAVEFT", "DELORA", "GRALORA",
)  # fmt: skip
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of LoRA, that vLLM can be built for
# What a LoRA may have beyond its two matrices, or what it does to the base's weights when it is put on.
_BEYOND = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias", "use_dora", "alora_invocation_tokens",
           "loftq_config", "eva_config", "corda_config")  # fmt: skip


def is_pattern(name: str) -> bool:
    """Whether PEFT is to take the name of a module as a regular expression of whole paths."""
    return bool(set(name) & set("*+?()[]{}|^$\\"))


def check_pattern(names: Sequence[str]) -> None:
    """Raises InputError where a lone name of `--lora_target_modules` is a regular expression that is broken."""
    if len(names) == 1 and is_pattern(names[0]):
        try:
            re.compile(names[0])
        except re.error as error:
            raise InputError(f"--lora_target_modules is {names[0]!r}, expected a regular expression ({error})") from None


def read_kind(folder: str | Path) -> dict:
    """An adapter's configuration. Raises InputError where it names no kind."""
    config = read_json(Path(folder) / "adapter_config.json")
    if not isinstance(config.get("peft_type"), str):
        raise InputError(f"{Path(folder) / 'adapter_config.json'}: no peft_type, expected the configuration of a PEFT adapter")
    return config


def check_adapter(folder: str | Path, plain: bool = False) -> None:
    """Raise InputError for an adapter that no response can be drawn with.

    Args:
        plain: whether only LoRA's two matrices will do.
    """
    config = read_kind(folder)
    place = Path(folder) / "adapter_config.json"
    if config["peft_type"] not in KINDS:
        raise InputError(f"{place}: peft_type is {config['peft_type']}, expected one of {', '.join(KINDS)}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(f"{place}: task_type is {config['task_type']!r}, expected CAUSAL_LM, a language model's")
    if config.get("alora_invocation_tokens"):
        raise InputError(f"{place}: it acts from its alora_invocation_tokens on, expected an adapter that always acts")
    if plain and (not gives_base_back(folder) or config.get("rank_pattern") or config.get("alpha_pattern")):
        raise InputError(f"{place}: it is more than LoRA's two matrices of one rank and scale, which is all that --engine vllm takes")
    if plain and config["r"] > VLLM_RANKS[-1]:
        raise InputError(f"{place}: its rank is {config['r']}, expected {VLLM_RANKS[-1]} at most with --engine vllm")


def gives_base_back(folder: str | Path) -> bool:
    """Whether an adapter is LoRA's two matrices and nothing else, so that unloading it leaves the base as it was."""
    return is_plain(read_kind(folder))


def is_plain(config: Mapping) -> bool:
    """Whether a configuration is of LoRA's two matrices and nothing else."""
    return (
        config["peft_type"] == "LORA"
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal")
        and not any(config.get(name) for name in _BEYOND)
    )


def is_lora(folder: str | Path) -> bool:
    """Whether an adapter's matrices can be added to the weights: LoRA of any start, without a bias of its own."""
    config = read_kind(folder)
    return config["peft_type"] == "LORA" and not any(config.get(name) for name in _BEYOND if name != "modules_to_save")


def sort_modules(folder: Path) -> None:
    """Write the modules of an adapter's configuration in order, so that equal adapters have equal files: PEFT keeps them as a set."""
    config = read_kind(folder)
    if isinstance(config.get("target_modules"), list):
        write_json(folder / "adapter_config.json", {**config, "target_modules": sorted(config["target_modules"])})


def adapter_weights(folder: str | Path) -> list[str]:
    """The names of an adapter's weights."""
    from safetensors import safe_open

    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{folder}: no adapter_model.safetensors, expected an adapter's weights in safetensors")
    with loading(str(file), "an adapter's weights"), safe_open(file, framework="pt") as weights:
        return list(weights.keys())


def put_on(base: PreTrainedModel, folder: str | Path, name: str) -> PeftModel:
    """`base`, called `name`, with an adapter, in eval mode.

    Raises:
        InputError: it cannot be loaded, or its weights are not all of this model's modules, or not for all of them.
    """
    from peft import PeftModel

    with loading(str(folder), f"an adapter of {name}"):
        model = PeftModel.from_pretrained(base, folder)
        found = model.load_adapter(folder, "default")  # once more, for what it says of the keys
    strange = [*found.unexpected_keys, *found.missing_keys]
    if strange:
        what = "weights for modules that this model lacks" if found.unexpected_keys else "no weights for modules that it names"
        raise InputError(f"{folder}: cannot be loaded as an adapter of {name} ({what}: {strange[0]} and {len(strange) - 1} more)")
    return model.eval()
