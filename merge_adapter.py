"""A checkpoint's adapter added to its base model: one plain model folder, for vLLM, lm-evaluation-harness, or another `--model_name`.

    python merge_adapter.py outputs/full_step_500 --output_dir=outputs/full_500_merged
    python merge_adapter.py FOLDER --base_model_name=$MODEL_NAME --output_dir=...      # where the adapter's own base has moved

The weights are those of `PeftModel.merge_and_unload`, in the base model's own precision. The tokenizer, with its chat template, is the
adapter's where it has one, else the base's. `training_record.json` says what was merged.
"""

from __future__ import annotations

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parts.adapters import check_adapter, put_on
from parts.cli import Settings, parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import atomic_path, clear_leftovers, write_json
from parts.locks import hold
from parts.models import adapter_base, check_model_name, load_causal_lm, loading, model_identity, use_cache
from parts.runs import RECORD, Checkpoint, find_adapters, provenance
from parts.weight_samples import require_base

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class MergeSettings(Settings):
    adapter: list[str] = setting([], "the adapter's folder, a checkpoint <output_dir>_step_<k> for example", positional=True, path=True)
    output_dir: str = setting("", "folder that receives the model", written=True, required=True, expected="a folder")
    base_model_name: str = setting("", "hub name or folder of the base model; empty means the one that the adapter names", path=True)
    cache_dir: str = setting("", "where hub downloads are kept; empty means the default cache", written=True)
    overwrite: bool = setting(False, "replace a merged model that is at output_dir")


def check(settings: MergeSettings) -> tuple[Checkpoint, str]:
    """The adapter and its base. Raises InputError for more or less than one adapter, one that cannot be merged, or an output in the way."""
    adapters = find_adapters(settings.adapter)
    if len(adapters) != 1:
        raise InputError(f"{len(adapters)} adapters, expected one")
    if adapters[0].is_whole:
        raise InputError(f"{adapters[0].folder}: all of a model's weights already, expected an adapter to merge")
    check_adapter(adapters[0].folder)
    base = settings.base_model_name or adapter_base(adapters[0].folder)
    check_model_name(base)
    require_base(adapters[0].folder, adapters[0].record, base)
    if (Path(base) / "adapter_config.json").is_file():
        raise InputError(f"{base}: an adapter itself, expected a whole model to merge into")
    output = Path(settings.output_dir)
    hold(output)
    clear_leftovers(output)
    is_merged = "merged" in Checkpoint(output).record
    if output.exists() and not (is_merged and settings.overwrite):
        hint = " (--overwrite=true replaces it)" if is_merged else ", expected a new folder"
        raise InputError(f"{output}: exists already{hint}")
    return adapters[0], base


def require_untied(model: PeftModel, name: str) -> None:
    """Raises InputError for an adapter on a weight that two modules share, as a tied head does: the other would be changed too."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values() if weight is not None)
    for place, layer in model.named_modules():
        changes_weight = isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)  # which sees to both itself
        if changes_weight and holders[id(getattr(layer.get_base_layer(), "weight", None))] > 1:
            raise InputError(f"{name}: it is on {place}, whose weight another module shares, expected one that can be merged alone")


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(MergeSettings, description=__doc__)
    use_cache(settings.cache_dir)

    # 1. Everything a user can get wrong, before the model loads.
    adapter, base = check(settings)
    content = model_identity(str(adapter.folder), base)

    # 2. The weights.
    import torch
    from transformers import AutoConfig, AutoTokenizer

    cache = settings.cache_dir or None
    with loading(base, "a causal language model"):
        dtype = AutoConfig.from_pretrained(base, cache_dir=cache, trust_remote_code=False).dtype or torch.float32
    model = load_causal_lm(base, dtype, cache)
    model = put_on(model, adapter.folder, base)
    require_untied(model, str(adapter.folder))
    with loading(str(adapter.folder), f"an adapter of {base}"):
        model = model.merge_and_unload(safe_merge=True)
    tokenizer_name = (
        str(adapter.folder) if (adapter.folder / "tokenizer_config.json").is_file() else adapter.trained.get("tokenizer_name") or base
    )
    with loading(tokenizer_name, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, cache_dir=cache, trust_remote_code=False)

    # 3. The folder.
    merged = {"adapter": str(adapter.folder), "content": content, "base": base}
    template = adapter.trained.get("chat_template_name")
    trained_on = {"dataset_path": adapter.trained.get("dataset_path"), "data": adapter.record.get("data")}
    facts = {"model": base, "dtype": str(dtype).removeprefix("torch."), "template": template}
    record = provenance(**facts, merged=merged, trained_on=trained_on, settings=asdict(settings))
    with atomic_path(settings.output_dir) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / RECORD, record)
    print(settings.output_dir)
    if template and template != "tokenizer":
        print(f"prompts in training had the template '{template}', which is not the tokenizer's own: --chat_template_name={template}")


if __name__ == "__main__":
    run_main(main)
