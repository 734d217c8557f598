"""Rollouts of a checkpoint on the evaluation instructions, in AlpacaEval's format.

    python evaluation.py --base_model_name=$MODEL_NAME --peft_model_name=outputs/full_step_500 --batch_size=16 --evaluations alpaca

One response is sampled per instruction (temperature 0.7, 512 new tokens) from the base model with the checkpoint's LoRA merged.
Output: <checkpoint>/alpaca-eval-<checkpoint name>.json, a list of {dataset, instruction, output, generator, qtype}, and beside it
<same name>.meta.json, which records how it was made.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from records import InputError, check_model_name, loading, match_rows, provenance, read_json, read_rows, rollouts_path, run_main, write_json
from settings import parse_settings, setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chat_templates import ChatTemplate


@dataclass
class EvaluationSettings:
    base_model_name: str = setting("", "the model that the checkpoint was trained from: hub name or folder")
    peft_model_name: str = setting("", "checkpoint folder <output_dir>_step_<k>, or any PEFT adapter folder")
    cache_dir: str = setting("", "where hub downloads are kept; empty means the default cache")
    device: str = setting("", "cuda, cpu, ...; empty means the GPU where there is one")
    baseline_model_file: str = setting("", "another model's outputs on the same instructions, to compare with; may be empty")
    batch_size: int = setting(16, "prompts per generation batch")
    evaluations: list[str] = setting(["alpaca"], "what to run: alpaca")
    data_path: str = setting("data/alpaca_eval.json", "instructions in the AlpacaEval schema")
    chat_template_name: str = setting("", "prompt template; empty means the one the checkpoint was trained with")
    max_new_tokens: int = setting(512, "longest response in tokens")
    temperature: float = setting(0.7, "sampling temperature; 0 is greedy")
    top_p: float = setting(1.0, "nucleus sampling")
    seed: int = setting(42, "seed of the draws")
    overwrite: bool = setting(False, "replace the rollouts of an earlier run")

    def __post_init__(self) -> None:
        for name in ("base_model_name", "peft_model_name"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing")
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if self.temperature < 0:
            raise InputError(f"--temperature is {self.temperature}, expected 0 or more")
        unknown = [name for name in self.evaluations if name not in RUNNERS]
        if unknown:
            raise InputError(f"--evaluations holds {unknown[0]!r}, expected {' or '.join(RUNNERS)}")


def load_merged(base: str, adapter: str, device: str, cache_dir: str | None) -> PreTrainedModel:
    """The base model with the adapter merged into it, in bf16 on a GPU and fp32 on a CPU."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from cpu_linear import use_onednn

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with loading(base, "a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, cache_dir=cache_dir)
    return use_onednn(PeftModel.from_pretrained(model, adapter).merge_and_unload().to(device).eval().requires_grad_(False))


def compare_with_baseline(rows: list[dict], baseline: list[dict], template: ChatTemplate) -> dict[str, float]:
    """Mean length incentive and repetition penalty of both, and the share of rows on which LI * RP is higher than the baseline's."""
    from reward_model import ReversedEngineeredRewardForInference

    reward = ReversedEngineeredRewardForInference(template, repetition_penalty=True)
    ours, theirs = (reward.score({"response": [row["output"] for row in each]}) for each in (rows, baseline))
    count = len(rows)
    return {
        "length": sum(ours["length"]) / count,
        "baseline length": sum(theirs["length"]) / count,
        "repetition": sum(ours["repetition"]) / count,
        "baseline repetition": sum(theirs["repetition"]) / count,
        "LI*RP above baseline": sum(mine > other for mine, other in zip(ours["total"], theirs["total"])) / count,
    }


def run_alpaca(settings: EvaluationSettings) -> None:
    """One sampled response per instruction, written in AlpacaEval's format."""
    # 1. Everything a user can get wrong, before any model loads.
    checkpoint, target = Path(settings.peft_model_name), rollouts_path(settings.peft_model_name)
    if not (checkpoint / "adapter_config.json").is_file():
        raise InputError(f"{checkpoint}: no adapter_config.json, expected a checkpoint folder")
    if target.exists() and not settings.overwrite:
        raise InputError(f"{target}: exists already (--overwrite=true replaces it)")
    data = read_rows(settings.data_path, {"instruction": None})
    instructions = [row["instruction"] for row in data]
    baseline = None
    if settings.baseline_model_file:
        baseline = match_rows(settings.baseline_model_file, instructions, {"output": None}, settings.data_path)

    from chat_templates import encode_prompts, load_template
    from generation import Decoding, generate_responses, load_tokenizer

    check_model_name(settings.base_model_name)
    record_path = checkpoint / "training_record.json"
    trained = read_json(record_path)["settings"] if record_path.is_file() else {}
    tokenizer = load_tokenizer(trained.get("tokenizer_name") or settings.base_model_name, settings.cache_dir or None)
    template = load_template(settings.chat_template_name or trained.get("chat_template_name", "alpaca"), tokenizer)
    prompts = encode_prompts(tokenizer, [template.render(instruction) for instruction in instructions])

    # 2. Rollouts.
    import torch

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_merged(settings.base_model_name, settings.peft_model_name, device, settings.cache_dir or None)
    decoding = Decoding(settings.max_new_tokens, settings.temperature, settings.top_p)
    responses = generate_responses(model, tokenizer, prompts, decoding, settings.batch_size, settings.seed, f"rollouts {checkpoint.name}")
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)

    # 3. Files.
    rows = []
    for row, text in zip(data, texts):
        kept = {"dataset": row.get("dataset", "unknown"), "instruction": row["instruction"]}
        kind = {"qtype": row["qtype"]} if "qtype" in row else {}
        rows.append({**kept, "output": text.strip(), "generator": checkpoint.name, **kind})
    record = provenance(
        seed=settings.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        model=settings.base_model_name,
        adapter=settings.peft_model_name,
        template=template.name,
        decoding=asdict(decoding),
        data_path=settings.data_path,
        rows=len(rows),
        eos_rate=sum(response[-1] == tokenizer.eos_token_id for response in responses) / len(responses),
        response_tokens=sum(map(len, responses)) / len(responses),
        settings=asdict(settings),
    )
    if baseline:
        record["baseline"] = compare_with_baseline(rows, baseline, template)
        print(", ".join(f"{name} {value:.3f}" for name, value in record["baseline"].items()))
    write_json(target.with_suffix(".meta.json"), record)
    write_json(target, rows)
    print(target)


RUNNERS = {"alpaca": run_alpaca}


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(EvaluationSettings, description=__doc__)
    for name in settings.evaluations:
        RUNNERS[name](settings)


if __name__ == "__main__":
    run_main(main)
