"""Whether two names mean the same model: a few of its weights, alike in every copy of it.

    trained_on = weight_sample("huggyllama/llama-7b")           # kept in a checkpoint's record
    require_base(folder, record, "models/llama-7b-fp16")        # before the adapter in the folder is put on

An adapter fits every model of its base's shapes, so that a wrong one is no error by itself, and all numbers after it are wrong.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from parts.errors import InputError
from parts.files import read_json
from parts.models import loading

MATRICES, VALUES = 64, 4  # how many are looked at, and how many numbers of each
_MOST_APART = 0.125  # share of the numbers: of those of a copy in float16 some 6% round to another bfloat16


@functools.cache
def weight_sample(name_or_path: str) -> dict[str, list[float]]:
    """The first numbers of some of a model's layers' matrices, which ones depending on their names alone.

    Returns:
        `VALUES` numbers each of `MATRICES` matrices or fewer, by name from the layer's number on (copies may call the root otherwise), in
        bfloat16, which copies in other precisions have in common. Empty where the model has no safetensors with such matrices.

    Raises:
        InputError: a broken file.
    """
    from safetensors import safe_open

    found: dict[str, list[tuple[str, Path]]] = {}
    sample = {}
    with loading(name_or_path, "safetensors"):
        for file in _files(name_or_path):
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    part = weights.get_slice(name)
                    if re.search(r"\.\d+\.", name) and len(part.get_shape()) == 2 and part.get_dtype() in ("F32", "F16", "BF16"):
                        found.setdefault(re.sub(r"^\D*", "", name), []).append((name, file))
        alone = [short for short, places in found.items() if len(places) == 1]  # a model of two towers may have a layer 0 in each
        for short in sorted(alone, key=lambda short: (zlib.crc32(short.encode()), short))[:MATRICES]:
            ((name, file),) = found[short]
            with safe_open(file, framework="pt") as weights:
                sample[short] = weights.get_slice(name)[:1, :VALUES].flatten().bfloat16().float().tolist()
    return sample


def _files(name_or_path: str) -> list[Path]:
    """The safetensors of a folder (an adapter's own) or of a hub's model, which is downloaded; none where there are none."""
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        folder = Path(name_or_path)
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        try:
            found = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
        except OSError:  # no such model, or no way to a hub: whoever loads it says so
            return None
        return Path(found) if found else None

    if whole := find("adapter_model.safetensors") or find("model.safetensors"):
        return [whole]
    index = find("model.safetensors.index.json")
    shards = sorted(set(read_json(index)["weight_map"].values())) if index else []
    return [file for file in map(find, shards) if file]


def is_same_sample(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> bool:
    """Whether two samples are of copies of one model; where they have no matrix in common nothing speaks against it.

    A fine-tuning that moves weights by much less than bfloat16's last bit (0.4 to 0.8%) goes unseen.
    """
    pairs = [pair for name in one.keys() & other.keys() for pair in zip(one[name], other[name])]
    return sum(first != second for first, second in pairs) <= _MOST_APART * len(pairs)


def require_base(folder: Path, record: Mapping, base: str) -> None:
    """Raises InputError where the record of an adapter in `folder` tells that it was trained on another model than `base`."""
    recorded = record.get("base_sample") or {}
    if recorded and not is_same_sample(recorded, weight_sample(base)):
        raise InputError(f"{folder}: trained on {record.get('model')}, whose weights were others than those of {base}")
