"""Rollouts of checkpoints: AlpacaEval's instructions, and Super-NaturalInstructions for the alignment tax.

    python evaluation.py --base_model_name=$MODEL_NAME --peft_model_name=outputs/full_step_500 --batch_size=16 --evaluations alpaca
    python evaluation.py --base_model_name=$MODEL_NAME --peft_model_name 'outputs/full_step_*' --evaluations alpaca superni
    accelerate launch --num_processes 4 evaluation.py ...      # rows shared out over four GPUs
    python evaluation.py ... --engine vllm                     # in an environment made with requirements/vllm.txt

One response a row is drawn from the base model with a checkpoint's LoRA, as configs/decoding.yaml says. Output in each checkpoint's folder:

    alpaca-eval-<name>.json      a list of {dataset, instruction, output, generator, qtype}
    superni-<name>.json          a list of {task, id, prediction, references, rouge_l, rouge_l_first, exact_match}
    <the same>.meta.json         how it was made, SuperNI's summary, and the comparison with --baseline_model_file

Files are written atomically: one that exists is complete. Interrupted at any row, the same command resumes: finished files stay, and an
unfinished one continues from the rows in <file>.partial. Finished rollouts are compared with a baseline that is named later.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from parts.cli import Settings, parse_settings, setting
from parts.data_checks import check_rows
from parts.errors import InputError, run_main
from parts.files import JsonLines, clear_leftovers, digest, file_digest, read_json, read_text, write_json
from parts.locks import hold
from parts.models import check_device, check_model_name, model_identity
from parts.rows import match_rows, read_rows
from parts.runs import Checkpoint, find_adapters, meta_path, partial_path, provenance, rollouts_path, superni_path

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

    from parts.chat_templates import ChatTemplate
    from parts.generation import Decoding, HFEngine, VLLMEngine
    from parts.superni import Instance
    from reward_model import RewardSettings

EVALUATIONS = ("alpaca", "superni")


@dataclass
class EvaluationSettings(Settings):
    base_model_name: str = setting(
        "", "the model that the checkpoints were trained from: hub name or folder", path=True, required=True, group=("what to evaluate", "")
    )
    peft_model_name: list[str] = setting(
        [], "checkpoint folders <output_dir>_step_<k>, any PEFT adapter folders, or patterns of them", path=True, required=True
    )
    cache_dir: str = setting("", "where hub downloads are kept; empty means the default cache", written=True)
    device: str = setting("", "cuda, cpu, ...; empty means the GPU where there is one")
    engine: str = setting("hf", "what generates: hf (transformers) or vllm", choices=("hf", "vllm"))
    baseline_model_file: str = setting(
        "", "another model's outputs on the same instructions, to compare with row by row; may be empty", path=True
    )
    batch_size: int = setting(16, "prompts per generation batch", least=1)
    evaluations: list[str] = setting(["alpaca"], "what to run: alpaca, superni")
    data_path: str = setting("data/alpaca_eval.json", "instructions in the AlpacaEval schema", path=True)
    superni_dir: str = setting("data/natural-instructions", "clone of allenai/natural-instructions", path=True)
    superni_tasks: list[str] = setting([], "task names; by default the test tasks of the default track")
    superni_instances: int = setting(100, "instances per task, the first ones", least=1)
    chat_template_name: str = setting("", "prompt template; empty means the one the checkpoint was trained with")
    decoding: str = setting("configs/decoding.yaml", "decoding settings by evaluation", path=True)
    max_new_tokens: int = setting(0, "longest response in tokens; 0 means what the decoding file says", least=0)
    temperature: float = setting(-1.0, "sampling temperature, 0 is greedy; below 0 means what the decoding file says")
    top_p: float = setting(0.0, "nucleus sampling; 0 means what the decoding file says", least=0, most=1)
    seed: int = setting(42, "seed of the draws", least=0, most=2**32 - 1, expected="0 to 2**32 - 1")
    common_draws: bool = setting(
        False, "the same draws for every checkpoint, so that a difference between two is less noisy; otherwise each has its own"
    )
    dtype: str = setting(
        "",
        "float32 or bfloat16; empty means bfloat16 on a GPU and float32 on a CPU (vllm: what the model says)",
        choices=("", "float32", "bfloat16"),
        expected="float32 or bfloat16",
    )
    overwrite: bool = setting(False, "replace the files of an earlier run")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "vllm" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError("--engine vllm runs in one process, expected no launcher with several")
        unknown = [name for name in self.evaluations if name not in EVALUATIONS]
        if unknown:
            raise InputError(f"--evaluations holds {unknown[0]!r}, expected {' or '.join(EVALUATIONS)}")


# ------------------------------------------------------------------------------------------------------------------ input


def training_files(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The files that the checkpoints were trained on, each once, as far as they are here and still what they were."""
    files: list[str] = []
    for checkpoint in checkpoints:
        file = checkpoint.trained.get("dataset_path", "")
        if (
            isinstance(file, str)
            and file not in files
            and Path(file).is_file()
            and file_digest(file) == dict(checkpoint.record.get("data") or {}).get("dataset_path")
        ):
            files.append(file)
    return files


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


def read_instructions(settings: EvaluationSettings, checkpoints: Sequence[Checkpoint]) -> list[dict]:
    """The rows of `--data_path`. Raises InputError where they cannot be used, or where a checkpoint was trained on them."""
    if not Path(settings.data_path).is_file() and settings.data_path == "data/alpaca_eval.json":
        raise InputError(
            f"{settings.data_path}: no such file; data/README.md says how to get it, --data_path data/eval.json takes our rows"
        )
    return check_rows(settings.data_path, {"instruction": None}, against=training_files(checkpoints))


@dataclass(frozen=True)
class Baseline:
    """Another model's outputs, and the proxy that each checkpoint is compared with them under."""

    rows: list[dict]
    proxies: dict[Checkpoint, RewardSettings]


def read_baseline(settings: EvaluationSettings, checkpoints: Sequence[Checkpoint], data: Sequence[dict]) -> Baseline:
    """Raises InputError where the outputs, the reward of a checkpoint, or the columns that it reads cannot be used."""
    from reward_model import proxy_of_run

    rows = match_rows(settings.baseline_model_file, [row["instruction"] for row in data], {"output": None}, settings.data_path)
    proxies = {}
    for checkpoint in checkpoints:
        proxy = proxies[checkpoint] = proxy_of_run(checkpoint.trained)
        proxy.check_reward()
        read_rows(settings.data_path, proxy.dataset_fields)
    return Baseline(rows, proxies)


# ------------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """One evaluation of one checkpoint: a file to write.

    Args:
        target: the file.
        prompts: token ids by row.
        stream: what has draws of its own, as in `generation.draw_key`.
        fingerprint: of all that the responses depend on.
    """

    checkpoint: Checkpoint
    evaluation: str
    target: Path
    template: ChatTemplate
    prompts: list[list[int]]
    decoding: Decoding
    stream: str
    fingerprint: str

    def is_done(self) -> bool:
        """Whether the target is there, made as it would be now, which is then said. Raises InputError where it was made otherwise."""
        if not self.target.exists():
            return False
        meta = meta_path(self.target)
        if not meta.is_file() or read_json(meta).get("fingerprint") != self.fingerprint:
            raise InputError(f"{self.target}: exists already, made otherwise (--overwrite=true replaces it)")
        print(f"{self.target}: is there already, made as it would be now")
        shutil.rmtree(partial_path(self.target), ignore_errors=True)
        return True


def plan(
    settings: EvaluationSettings,
    checkpoints: Sequence[Checkpoint],
    templates: Mapping[Checkpoint, ChatTemplate],
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[dict],
    instances: Sequence[Instance],
    device: str,
) -> list[Job]:
    """The jobs of all checkpoints. Raises InputError for a checkpoint without weights, or decoding settings that cannot be used."""
    import torch

    from parts.chat_templates import encode_prompts
    from parts.superni import superni_prompt

    prompts: dict[tuple[str, str], list[list[int]]] = {}  # by evaluation and template: checkpoints share them
    for template in templates.values():
        if "alpaca" in settings.evaluations and ("alpaca", template.name) not in prompts:
            prompts["alpaca", template.name] = encode_prompts(tokenizer, [template.render_row(row, "instruction") for row in data])
        if "superni" in settings.evaluations and ("superni", template.name) not in prompts:
            prompts["superni", template.name] = [superni_prompt(instance, template, tokenizer) for instance in instances]
    paths = {"alpaca": rollouts_path, "superni": superni_path}
    jobs = []
    for checkpoint in checkpoints:
        files = (checkpoint.folder / name for name in ("adapter_model.safetensors", "adapter_model.bin"))
        weights = next((file for file in files if file.is_file()), None)
        if weights is None:
            raise InputError(f"{checkpoint.folder}: no adapter_model.safetensors, expected a checkpoint folder")
        template = templates[checkpoint]
        for evaluation in settings.evaluations:
            decoding = read_decoding(settings, evaluation)
            facts = {
                "base": model_identity(settings.base_model_name),
                "adapter": [file_digest(weights), file_digest(checkpoint.folder / "adapter_config.json")],
                "engine": [settings.engine, torch.device(device).type, settings.dtype],
                "decoding": asdict(decoding),
                "draws": [settings.seed, "common" if settings.common_draws else checkpoint.name],
                "prompts": digest(prompts[evaluation, template.name]),
            }
            target = paths[evaluation](checkpoint.folder)
            stream = "" if settings.common_draws else checkpoint.name
            jobs.append(Job(checkpoint, evaluation, target, template, prompts[evaluation, template.name], decoding, stream, digest(facts)))
    return jobs


# ------------------------------------------------------------------------------------------------------------- generation


def load_engine(
    settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase, jobs: Sequence[Job], device: str, processes: PartialState
) -> HFEngine | VLLMEngine:
    """What generates: the base model, ready for the adapters of the jobs."""
    from parts.generation import HFEngine, VLLMEngine

    if settings.engine == "vllm":
        longest = 2048 + max(job.decoding.max_new_tokens for job in jobs)
        adapters = dict.fromkeys(str(job.checkpoint.folder) for job in jobs)
        return VLLMEngine(settings.base_model_name, tokenizer, list(adapters), longest, settings.dtype)
    own = f"cuda:{processes.local_process_index}" if device == "cuda" else device
    return HFEngine(settings.base_model_name, tokenizer, own, settings.batch_size, settings.cache_dir or None, settings.dtype)


def generate_all(job: Job, engine: HFEngine | VLLMEngine, seed: int, processes: PartialState) -> list[list[int]] | None:
    """A response to each prompt: from the partial folder where it is known already, and generated where it is not.

    Each process generates its share, and appends it to a file of its own.

    Returns:
        Token ids by prompt, on the main process; None on others.
    """
    folder, target, is_main = partial_path(job.target), job.target.name, processes.is_main_process
    marker = folder / "fingerprint"
    if is_main:
        for path in (job.target, meta_path(job.target)):
            clear_leftovers(path)
    if is_main and not (marker.is_file() and marker.read_text(encoding="utf-8") == job.fingerprint):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marker.write_text(job.fingerprint, encoding="utf-8")
    processes.wait_for_everyone()
    known = read_partial(folder)
    processes.wait_for_everyone()
    missing = [row for row in range(len(job.prompts)) if row not in known][processes.process_index :: processes.num_processes]
    if is_main and known:
        print(f"{target}: {len(known)} of {len(job.prompts)} rows are known from an earlier start")
    if missing:
        log = JsonLines(folder / f"rows_{processes.process_index}_{os.getpid()}.jsonl")

        def finished(place: int, response: list[int]) -> None:
            log.append([missing[place], response])

        wanted = [job.prompts[row] for row in missing]
        engine.generate(str(job.checkpoint.folder), wanted, job.decoding, seed, missing, finished, target if is_main else None, job.stream)
    processes.wait_for_everyone()
    if not is_main:
        return None
    known = read_partial(folder)
    return [known[row] for row in range(len(job.prompts))]


def read_partial(folder: Path) -> dict[int, list[int]]:
    """Responses by row, from the files of a partial folder."""
    return {row: response for path in sorted(folder.glob("rows_*.jsonl")) for row, response in JsonLines(path).read()}


def alpaca_rows(data: list[dict], texts: list[str], generator: str) -> list[dict]:
    """Rows in AlpacaEval's format."""
    rows = []
    for row, text in zip(data, texts):
        kept = {"dataset": row.get("dataset", "unknown"), "instruction": row["instruction"]}
        kind = {"qtype": row["qtype"]} if "qtype" in row else {}
        rows.append({**kept, "output": text.strip(), "generator": generator, **kind})
    return rows


def write_rollouts(
    job: Job,
    settings: EvaluationSettings,
    responses: Sequence[list[int]],
    data: Sequence[dict],
    instances: Sequence[Instance],
    engine: HFEngine | VLLMEngine,
) -> None:
    """Write a job's file and the record of how it was made, print where it is, and remove its partial folder."""
    texts = engine.tokenizer.batch_decode(responses, skip_special_tokens=True)
    record = provenance(
        seed=settings.seed,
        common_draws=settings.common_draws,
        dtype=engine.dtype,
        model=settings.base_model_name,
        adapter=str(job.checkpoint.folder),
        engine=engine.name,
        template=job.template.name,
        decoding=asdict(job.decoding),
        data_path=settings.data_path if job.evaluation == "alpaca" else settings.superni_dir,
        rows=len(job.prompts),
        eos_rate=statistics.fmean(response[-1] == engine.tokenizer.eos_token_id for response in responses),
        response_tokens=statistics.fmean(map(len, responses)),
        fingerprint=job.fingerprint,
        settings=asdict(settings),
    )
    if job.evaluation == "alpaca":
        rows = alpaca_rows(data, texts, job.checkpoint.name)
    else:
        from parts.superni import describe_superni, summarise, superni_rows

        rows = superni_rows(instances, [text.strip() for text in texts])
        record["summary"] = summarise(instances, rows)
        print(describe_superni(record["summary"]))
    job.target.unlink(missing_ok=True)  # never stands beside a record of others
    write_json(meta_path(job.target), record)
    write_json(job.target, rows)
    shutil.rmtree(partial_path(job.target), ignore_errors=True)
    print(job.target)


# --------------------------------------------------------------------------------------------------------------- baseline


def compare_with_baseline(settings: EvaluationSettings, jobs: Sequence[Job], baseline: Baseline, data: Sequence[dict]) -> None:
    """Add the comparison to the record beside each file of rollouts, and print it; a comparison that is there already stays.

    A record's "baseline" holds what `compare_totals` found, the baseline's file, and a fingerprint of all that the comparison depends on.
    Checkpoints whose proxies are the same share one, so that its encoder loads once.
    """
    from parts.baseline import compare_totals, describe_comparison
    from parts.rewards import require_scores, reward_batch
    from parts.scores import proxy_facts

    rewards, instructions = {}, [row["instruction"] for row in data]
    files = [file_digest(settings.baseline_model_file), file_digest(settings.data_path)]
    for job in jobs:
        length = job.checkpoint.trained.get("output_max_length", 512)
        proxy = baseline.proxies[job.checkpoint]
        facts = proxy_facts(proxy, job.template, length)
        meta = job.checkpoint.meta
        fingerprint = digest([facts, *files, file_digest(job.target)])
        if meta.get("baseline", {}).get("fingerprint") == fingerprint:
            continue
        hold(job.target)
        if digest(facts) not in rewards:
            rewards[digest(facts)] = proxy.load_reward(job.template, length, settings.device or None)
        score = rewards[digest(facts)].score
        ours, theirs = (
            score(reward_batch(instructions, [row["output"] for row in rows], data)) for rows in (job.checkpoint.rows, baseline.rows)
        )
        for name, table in ((job.target, ours), (settings.baseline_model_file, theirs)):
            require_scores(table["total"], str(name))
        found = compare_totals(ours, theirs)
        write_json(meta_path(job.target), {**meta, "baseline": {**found, "file": settings.baseline_model_file, "fingerprint": fingerprint}})
        print(f"{job.target} beside {settings.baseline_model_file}")
        print(describe_comparison(found))


# ------------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(EvaluationSettings, description=__doc__)

    # 1. Everything a user can get wrong, before any model loads.
    checkpoints = find_adapters(settings.peft_model_name)
    for evaluation in settings.evaluations:
        read_decoding(settings, evaluation)
    data, baseline, instances = [], None, []
    if "alpaca" in settings.evaluations:
        data = read_instructions(settings, checkpoints)
        baseline = read_baseline(settings, checkpoints, data) if settings.baseline_model_file else None
    if "superni" in settings.evaluations:
        from parts.superni import read_instances

        instances = read_instances(settings.superni_dir, settings.superni_tasks, settings.superni_instances)
    check_model_name(settings.base_model_name)
    check_device(settings.device)

    # 2. What there is to do: a file that is there already is either what this call would make, or in its way.
    import torch
    from accelerate import PartialState

    from parts.chat_templates import load_template
    from parts.models import load_tokenizer

    tokenizer = load_tokenizer(checkpoints[0].trained.get("tokenizer_name") or settings.base_model_name, settings.cache_dir or None)
    names = {point: settings.chat_template_name or point.trained.get("chat_template_name", "alpaca") for point in checkpoints}
    templates = {point: load_template(name, tokenizer) for point, name in names.items()}
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jobs = plan(settings, checkpoints, templates, tokenizer, data, instances, device)
    waiting = [job for job in jobs if settings.overwrite or not job.is_done()]
    hold(*(job.target for job in waiting))
    waiting = [job for job in waiting if settings.overwrite or not job.is_done()]  # another process may just have finished one

    # 3. One engine for all checkpoints; their rollouts and files, one after the other.
    processes = PartialState(cpu=True)  # gloo, on GPUs too: only for barriers, since responses meet in files
    if waiting:
        engine = load_engine(settings, tokenizer, waiting, device, processes)
        for job in waiting:
            responses = generate_all(job, engine, settings.seed, processes)
            if responses is not None:
                write_rollouts(job, settings, responses, data, instances, engine)

    # 4. The comparison with another model's outputs, of finished rollouts too.
    if baseline is not None and processes.is_main_process:
        compare_with_baseline(settings, [job for job in jobs if job.evaluation == "alpaca"], baseline, data)
    processes.wait_for_everyone()


if __name__ == "__main__":
    run_main(main)
