"""Rollouts of checkpoints: AlpacaEval's instructions, and Super-NaturalInstructions for the alignment tax.

    python evaluation.py --base_model_name=$MODEL_NAME --peft_model_name=outputs/full_step_500 --batch_size=16 --evaluations alpaca
    python evaluation.py --base_model_name=$MODEL_NAME --peft_model_name 'outputs/full_step_*' --evaluations alpaca superni
    accelerate launch --num_processes 4 evaluation.py ...      # rows shared out over four GPUs
    python evaluation.py ... --engine vllm                     # in an environment made with requirements/vllm.txt

One response a row is drawn from the base model with a checkpoint's LoRA, as configs/decoding.yaml says. Output in each checkpoint's folder:

    alpaca-eval-<name>.json      a list of {dataset, instruction, output, generator, qtype}
    superni-<name>.json          a list of {task, id, prediction, references, rouge_l, rouge_l_first, exact_match}
    <the same>.meta.json         how it was made, and SuperNI's summary

A file is there when it is whole. Interrupted at any row, the same command goes on: finished files stay, and a begun one goes on from
what lies in <file>.partial.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from parts.cli import parse_settings, setting
from parts.data_checks import check_rows
from parts.errors import InputError, run_main
from parts.files import REPOSITORY, digest, file_digest, read_json, read_text, write_json
from parts.models import check_device, check_model_name
from parts.rows import match_rows, read_rows
from parts.runs import provenance, rollouts_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from parts.chat_templates import ChatTemplate
    from parts.generation import Decoding, HFEngine, VLLMEngine
    from parts.superni import Instance

EVALUATIONS = ("alpaca", "superni")
SUPERNI_PROMPT_TOKENS = 512


@dataclass
class EvaluationSettings:
    base_model_name: str = setting("", "the model that the checkpoints were trained from: hub name or folder")
    peft_model_name: list[str] = setting([], "checkpoint folders <output_dir>_step_<k>, any PEFT adapter folders, or patterns of them")
    cache_dir: str = setting("", "where hub downloads are kept; empty means the default cache")
    device: str = setting("", "cuda, cpu, ...; empty means the GPU where there is one")
    engine: str = setting("hf", "what generates: hf (transformers) or vllm")
    baseline_model_file: str = setting("", "another model's outputs on the same instructions, to compare with row by row; may be empty")
    batch_size: int = setting(16, "prompts per generation batch")
    evaluations: list[str] = setting(["alpaca"], "what to run: alpaca, superni")
    data_path: str = setting("data/alpaca_eval.json", "instructions in the AlpacaEval schema")
    superni_dir: str = setting("data/natural-instructions", "clone of allenai/natural-instructions")
    superni_tasks: list[str] = setting([], "task names; by default the test tasks of the default track")
    superni_instances: int = setting(100, "instances per task, the first ones")
    chat_template_name: str = setting("", "prompt template; empty means the one the checkpoint was trained with")
    decoding: str = setting(str(REPOSITORY / "configs" / "decoding.yaml"), "decoding settings by evaluation")
    max_new_tokens: int = setting(0, "longest response in tokens; 0 means what the decoding file says")
    temperature: float = setting(-1.0, "sampling temperature, 0 is greedy; below 0 means what the decoding file says")
    top_p: float = setting(0.0, "nucleus sampling; 0 means what the decoding file says")
    seed: int = setting(42, "seed of the draws")
    common_draws: bool = setting(
        False, "the same draws for every checkpoint, so that a difference between two is less noisy; otherwise each has its own"
    )
    dtype: str = setting("", "float32 or bfloat16; empty means bfloat16 on a GPU and float32 on a CPU (vllm: what the model says)")
    overwrite: bool = setting(False, "replace the files of an earlier run")

    def __post_init__(self) -> None:
        for name in ("base_model_name", "peft_model_name"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing")
        for name in ("batch_size", "superni_instances"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least 1")
        if self.max_new_tokens < 0 or not 0 <= self.top_p <= 1:
            raise InputError("--max_new_tokens and --top_p cannot be negative, and --top_p is at most 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}, expected 0 to 2**32 - 1")
        if self.dtype not in ("", "float32", "bfloat16"):
            raise InputError(f"--dtype is {self.dtype!r}, expected float32 or bfloat16")
        if self.engine not in ("hf", "vllm"):
            raise InputError(f"--engine is {self.engine!r}, expected hf or vllm")
        if self.engine == "vllm" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError("--engine vllm runs in one process, expected no launcher with several")
        unknown = [name for name in self.evaluations if name not in EVALUATIONS]
        if unknown:
            raise InputError(f"--evaluations holds {unknown[0]!r}, expected {' or '.join(EVALUATIONS)}")


def find_adapters(patterns: Sequence[str]) -> list[Path]:
    """The adapter folders that names and patterns stand for, each once, in order (of steps, within a pattern).

    Raises:
        InputError: a name that is no adapter folder, or a pattern that matches none.
    """
    found: list[Path] = []
    for pattern in patterns:
        paths = [Path(pattern)]
        if glob.has_magic(pattern):
            paths = [Path(path) for path in glob.glob(pattern)]  # noqa: PTH207 - absolute patterns too
            paths = [path for path in paths if (path / "adapter_config.json").is_file()]
            paths.sort(key=lambda path: [int(part) if part.isdigit() else part for part in path.name.split("_")])
            if not paths:
                raise InputError(f"{pattern}: matches no checkpoint folder")
        for path in paths:
            if not (path / "adapter_config.json").is_file():
                raise InputError(f"{path}: no adapter_config.json, expected a checkpoint folder")
            if path not in found:
                found.append(path)
    return found


def training_files(adapters: Sequence[Path]) -> list[str]:
    """The files that the checkpoints were trained on, each once, as far as they are here and still what they were."""
    found: list[str] = []
    for adapter in adapters:
        path = adapter / "training_record.json"
        record = read_json(path) if path.is_file() else {}
        file = record.get("settings", {}).get("dataset_path", "")
        if file not in found and Path(file).is_file() and file_digest(file) == record.get("data", {}).get("dataset_path"):
            found.append(file)
    return found


def read_decoding(settings: EvaluationSettings, evaluation: str) -> Decoding:
    """The decoding settings of an evaluation: the file's, and what the command line overrides."""
    from parts.generation import Decoding

    try:
        table = yaml.safe_load(read_text(settings.decoding))
        values = dict(table[evaluation])
        values |= {"max_new_tokens": settings.max_new_tokens} if settings.max_new_tokens else {}
        values |= {"temperature": settings.temperature} if settings.temperature >= 0 else {}
        values |= {"top_p": settings.top_p} if settings.top_p else {}
        return Decoding(**values)
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise InputError(f"{settings.decoding}: expected decoding settings under '{evaluation}' ({message})") from None


# ------------------------------------------------------------------------------------------------------------- generation


@dataclass(frozen=True)
class Processes:
    """The processes of `accelerate launch`; one by itself without it."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()


def start_processes() -> Processes:
    """Join the launched processes, if there are several."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo")  # only for barriers: responses meet in files
    return Processes(int(os.environ.get("RANK", "0")), count)


def generate_all(
    target: Path,
    adapter: Path,
    prompts: list[list[int]],
    decoding: Decoding,
    engine: HFEngine | VLLMEngine,
    seed: int,
    stream: str,
    fingerprint: str,
    processes: Processes,
) -> list[list[int]] | None:
    """A response to each prompt, from <target>.partial where it is known already, and generated where it is not.

    Args:
        target: the file that the responses are for.
        stream: what has draws of its own, as in `generation.draw_key`.
        fingerprint: of all that the responses depend on; partial results with another are thrown away.
        processes: each generates its share and appends to a file of its own.

    Returns:
        Token ids by prompt, on the main process; None on others.
    """
    folder = target.with_name(f"{target.name}.partial")
    marker = folder / "fingerprint"
    if processes.is_main and not (marker.is_file() and marker.read_text(encoding="utf-8") == fingerprint):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marker.write_text(fingerprint, encoding="utf-8")
    processes.wait()
    known = read_partial(folder)
    processes.wait()
    missing = [row for row in range(len(prompts)) if row not in known][processes.rank :: processes.count]
    if processes.is_main and known:
        print(f"{target.name}: {len(known)} of {len(prompts)} rows are known from an earlier start")
    if missing:
        with (folder / f"rows_{processes.rank}_{os.getpid()}.jsonl").open("a", encoding="utf-8") as log:

            def finished(place: int, response: list[int]) -> None:
                log.write(json.dumps([missing[place], response]) + "\n")
                log.flush()

            wanted = [prompts[row] for row in missing]
            engine.generate(str(adapter), wanted, decoding, seed, missing, finished, target.name if processes.is_main else None, stream)
    processes.wait()
    if not processes.is_main:
        return None
    known = read_partial(folder)
    return [known[row] for row in range(len(prompts))]


def read_partial(folder: Path) -> dict[int, list[int]]:
    """Responses by row from the files of a partial run; a line that was cut short is as good as none."""
    known = {}
    for path in sorted(folder.glob("rows_*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                row, response = json.loads(line)
            except ValueError:
                continue
            known[row] = response
    return known


# ----------------------------------------------------------------------------------------------------------------- alpaca


def alpaca_rows(data: list[dict], texts: list[str], generator: str) -> list[dict]:
    """Rows in AlpacaEval's format."""
    rows = []
    for row, text in zip(data, texts):
        kept = {"dataset": row.get("dataset", "unknown"), "instruction": row["instruction"]}
        kind = {"qtype": row["qtype"]} if "qtype" in row else {}
        rows.append({**kept, "output": text.strip(), "generator": generator, **kind})
    return rows


def compare_with_baseline(
    rows: list[dict], baseline: list[dict], data: list[dict], trained: dict, template: ChatTemplate, device: str
) -> dict:
    """Both sides' mean components under the run's own proxy, and the share of rows that each wins, with a 95% Wilson interval."""
    from scipy.stats import binomtest

    from reward_model import column_mean, proxy_of_run, reward_batch

    proxy = proxy_of_run(trained)
    reward = proxy.load_reward(template, trained.get("output_max_length", 512), device or None)
    instructions = [row["instruction"] for row in rows]
    tables = [reward.score(reward_batch(instructions, [row["output"] for row in each], data)) for each in (rows, baseline)]
    won = sum(ours > theirs for ours, theirs in zip(*(table["total"] for table in tables)))
    lost = sum(ours < theirs for ours, theirs in zip(*(table["total"] for table in tables)))
    interval = binomtest(won, len(rows)).proportion_ci(method="wilson")
    means = [{name: mean for name, column in table.items() if (mean := column_mean(column)) is not None} for table in tables]
    return {
        "ours": means[0],
        "baseline": means[1],
        "rows": len(rows),
        "won": won / len(rows),
        "won_interval": [float(interval.low), float(interval.high)],
        "lost": lost / len(rows),
    }


def describe_comparison(found: dict) -> str:
    """The comparison as a small table."""
    names = [name for name in found["ours"] if name in found["baseline"]]
    lines = [f"{'':<10}" + " ".join(f"{name:>{max(len(name), 8)}}" for name in names)]
    for side in ("ours", "baseline"):
        lines.append(f"{side:<10}" + " ".join(f"{found[side][name]:>{max(len(name), 8)}.3f}" for name in names))
    low, high = found["won_interval"]
    lines.append(f"proxy above the baseline's in {found['won']:.1%} of {found['rows']} rows (95% interval {low:.1%} to {high:.1%}), "
                 f"below in {found['lost']:.1%}")  # fmt: skip
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- superni


def superni_prompt(instance: Instance, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt's tokens, `SUPERNI_PROMPT_TOKENS` at most: what is too much is cut off the end of the instance's input."""
    from parts.chat_templates import encode_prompts

    (tokens,) = encode_prompts(tokenizer, [template.render(instance.instruction)])
    text_tokens = tokenizer(instance.text, add_special_tokens=False)["input_ids"]
    excess = len(tokens) - SUPERNI_PROMPT_TOKENS
    while excess > 0 and text_tokens:
        text_tokens = text_tokens[: max(0, len(text_tokens) - excess)]
        shorter = f"{instance.definition}\n\n{tokenizer.decode(text_tokens)}"
        (tokens,) = encode_prompts(tokenizer, [template.render(shorter)])
        excess = len(tokens) - SUPERNI_PROMPT_TOKENS
    return tokens


def describe_superni(summary: dict) -> str:
    """Overall scores in one line each."""
    overall = summary["overall"]
    names = {
        "rouge_l": "ROUGE-L, best reference",
        "rouge_l_first": "ROUGE-L, first reference",
        "exact_match": "exact match, classification",
    }
    lines = [f"SuperNI: {overall['tasks']} tasks, {overall['instances']} instances"]
    for metric, label in names.items():
        if metric in overall:
            error = overall[metric]["standard_error"]
            lines.append(f"  {label}: {overall[metric]['mean']:.2f}" + (f" +- {error:.2f}" if error is not None else ""))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------- main


def target_of(adapter: Path, evaluation: str) -> Path:
    """The file of an evaluation's rows in a checkpoint's folder."""
    alpaca = rollouts_path(adapter)
    return alpaca if evaluation == "alpaca" else alpaca.with_name(f"superni-{alpaca.parent.name}.json")


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(EvaluationSettings, description=__doc__)

    # 1. Everything a user can get wrong, before any model loads.
    adapters = find_adapters(settings.peft_model_name)
    decodings = {evaluation: read_decoding(settings, evaluation) for evaluation in settings.evaluations}
    trained = {
        path: read_json(path / "training_record.json")["settings"] if (path / "training_record.json").is_file() else {} for path in adapters
    }
    data, baseline, instances = [], None, []
    if "alpaca" in settings.evaluations:
        if not Path(settings.data_path).is_file() and settings.data_path == "data/alpaca_eval.json":
            raise InputError(
                f"{settings.data_path}: no such file; data/README.md says how to get it, --data_path data/eval.json takes our rows"
            )
        data = check_rows(settings.data_path, {"instruction": None}, against=training_files(adapters))
    if settings.baseline_model_file and "alpaca" in settings.evaluations:
        baseline = match_rows(settings.baseline_model_file, [row["instruction"] for row in data], {"output": None}, settings.data_path)
        from reward_model import proxy_of_run

        for path in adapters:
            proxy = proxy_of_run(trained[path])
            proxy.check_reward()
            read_rows(settings.data_path, proxy.dataset_fields)
    if "superni" in settings.evaluations:
        from parts.superni import read_instances

        instances = read_instances(settings.superni_dir, settings.superni_tasks, settings.superni_instances)
    check_model_name(settings.base_model_name)
    check_device(settings.device)

    from parts.chat_templates import encode_prompts, load_template
    from parts.generation import HFEngine, VLLMEngine
    from parts.models import load_tokenizer

    tokenizer = load_tokenizer(trained[adapters[0]].get("tokenizer_name") or settings.base_model_name, settings.cache_dir or None)
    names = {path: settings.chat_template_name or trained[path].get("chat_template_name", "alpaca") for path in adapters}
    by_name = {name: load_template(name, tokenizer) for name in set(names.values())}

    # 2. What there is to do: a file that is there already is either what this call would make, or in its way.
    import torch

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @functools.cache
    def prompts_of(evaluation: str, template_name: str) -> list[list[int]]:
        template = by_name[template_name]
        if evaluation == "alpaca":
            return encode_prompts(tokenizer, [template.render(row["instruction"]) for row in data])
        return [superni_prompt(instance, template, tokenizer) for instance in instances]

    jobs = []
    for adapter in adapters:
        weights = next((adapter / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (adapter / name).is_file()), None)
        if weights is None:
            raise InputError(f"{adapter}: no adapter_model.safetensors, expected a checkpoint folder")
        for evaluation in settings.evaluations:
            decoding, target = decodings[evaluation], target_of(adapter, evaluation)
            prompts = prompts_of(evaluation, names[adapter])
            facts = {
                "base": settings.base_model_name,
                "adapter": [file_digest(weights), file_digest(adapter / "adapter_config.json")],
                "engine": [settings.engine, torch.device(device).type, settings.dtype],
                "decoding": asdict(decoding),
                "draws": [settings.seed, "common" if settings.common_draws else adapter.name],
                "prompts": digest(prompts),
            }
            fingerprint = digest(facts)
            meta = target.with_suffix(".meta.json")
            if target.exists() and not settings.overwrite:
                if not meta.is_file() or read_json(meta).get("fingerprint") != fingerprint:
                    raise InputError(f"{target}: exists already, made otherwise (--overwrite=true replaces it)")
                print(f"{target}: is there already, made as it would be now")
                continue
            jobs.append((adapter, evaluation, target, prompts, fingerprint))
    if not jobs:
        return

    # 3. One engine for all checkpoints.
    processes = start_processes()
    if settings.engine == "vllm":
        longest = 2048 + max(decoding.max_new_tokens for decoding in decodings.values())
        engine = VLLMEngine(settings.base_model_name, tokenizer, [str(path) for path in adapters], longest, settings.dtype)
    else:
        own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        own = own_gpu if device == "cuda" else device
        engine = HFEngine(settings.base_model_name, tokenizer, own, settings.batch_size, settings.cache_dir or None, settings.dtype)

    # 4. Rollouts and files, checkpoint by checkpoint.
    for adapter, evaluation, target, prompts, fingerprint in jobs:
        template, decoding = by_name[names[adapter]], decodings[evaluation]
        stream = "" if settings.common_draws else adapter.name
        responses = generate_all(target, adapter, prompts, decoding, engine, settings.seed, stream, fingerprint, processes)
        if responses is None:
            continue
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        record = provenance(
            seed=settings.seed,
            common_draws=settings.common_draws,
            dtype=engine.dtype,
            model=settings.base_model_name,
            adapter=str(adapter),
            engine=engine.name,
            template=template.name,
            decoding=asdict(decoding),
            data_path=settings.data_path if evaluation == "alpaca" else settings.superni_dir,
            rows=len(prompts),
            eos_rate=statistics.fmean(response[-1] == tokenizer.eos_token_id for response in responses),
            response_tokens=statistics.fmean(map(len, responses)),
            fingerprint=fingerprint,
            settings=asdict(settings),
        )
        if evaluation == "alpaca":
            rows = alpaca_rows(data, texts, adapter.name)
            if baseline:
                record["baseline"] = compare_with_baseline(rows, baseline, data, trained[adapter], template, settings.device)
                print(describe_comparison(record["baseline"]))
        else:
            from parts.superni import score, summarise

            scores = [score(instance, text.strip()) for instance, text in zip(instances, texts)]
            rows = [
                {"task": instance.task, "id": instance.number, "prediction": text.strip(), "references": list(instance.references), **found}
                for instance, text, found in zip(instances, texts, scores)
            ]
            record["summary"] = summarise(instances, scores)
            print(describe_superni(record["summary"]))
        write_json(target.with_suffix(".meta.json"), record)
        write_json(target, rows)
        shutil.rmtree(target.with_name(f"{target.name}.partial"))
        print(target)
    processes.wait()


if __name__ == "__main__":
    run_main(main)
