"""How gold reward models are loaded and run, without loading one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from parts.cli import Settings, setting
from parts.errors import InputError
from parts.files import read_json
from parts.models import check_bits, check_model_name, loading

DEFAULT_GOLD = "Nexusflow/Starling-RM-34B"


@dataclass
class GoldSettings(Settings):
    """How gold models are loaded and run. Shared by every script that scores with one."""

    gold_batch_tokens: int = setting(
        16384,
        "most tokens, padding included, in a gold batch (on a CPU 1,024 at most); a longer row is scored alone",
        group=("gold models", ""),
    )
    gold_dtype: str = setting("", "bfloat16 or float32 for the gold weights; empty means bfloat16 on GPUs, float32 on a CPU")
    load_in_8bit: bool = setting(False, "gold weights in 8 bits (bitsandbytes)")
    load_in_4bit: bool = setting(False, "gold weights in 4 bits (bitsandbytes, nf4)")
    human_assistant_prefix: bool = setting(False, "Starling: the instruction in a second frame of Human and Assistant, as published")

    @property
    def quantized(self) -> bool:
        return self.load_in_8bit or self.load_in_4bit

    def check_gold(self, names: Sequence[str]) -> None:
        """Raises InputError for what can be known to be unusable before a model loads."""
        if self.gold_batch_tokens < 1:
            raise InputError(f"--gold_batch_tokens is {self.gold_batch_tokens}, expected at least 1")
        if self.gold_dtype not in ("", "bfloat16", "float32"):
            raise InputError(f"--gold_dtype is {self.gold_dtype!r}, expected bfloat16 or float32")
        check_bits(self.load_in_8bit, self.load_in_4bit)
        for name in names:
            check_model_name(name)
        if self.human_assistant_prefix and not any(map(is_starling, names)):
            raise InputError("--human_assistant_prefix is for Starling, and no gold model is one")
        if not names and (idle := [field.name for field in fields(self) if getattr(self, field.name) != field.default]):
            raise InputError(f"--{idle[0]} is for gold models, and none is to score")


def is_starling(name_or_path: str) -> bool:
    """Whether a name or a folder is a reward model of Starling's kind."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return "v_head.weight" in weight_names(folder)
    return "starling-rm" in name_or_path.lower()


def weight_names(folder: Path) -> Iterable[str]:
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return read_json(index)["weight_map"].keys()
    single = folder / "model.safetensors"
    if not single.is_file():
        return ()
    with loading(str(single), "a model's weights"), safe_open(single, framework="pt") as weights:
        return list(weights.keys())


def short_names(paths: Sequence[str]) -> list[str]:
    """A column's name for each gold model: "gold" for a lone one, else the last part of its path, or all of it where two share that."""
    if len(set(paths)) < len(paths):
        raise InputError("--gold_model names a model twice")
    if len(paths) == 1:
        return ["gold"]
    last = [Path(path).name for path in paths]
    return last if len(set(last)) == len(last) else list(paths)
