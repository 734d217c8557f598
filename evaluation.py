"""Rollouts of checkpoints: AlpacaEval's instructions, and Super-NaturalInstructions for the alignment tax.

    python evaluation.py --base_model_name=$MODEL_NAME --peft_model_name=outputs/full_step_500 --batch_size=16 --evaluations alpaca
    python evaluation.py --base_model_name=$MODEL_NAME --peft_model_name 'outputs/full_step_*' --evaluations alpaca superni
    accelerate launch --num_processes 4 evaluation.py ...      # rows shared out over four GPUs
    python evaluation.py ... --engine vllm                     # in an environment made with requirements/vllm.txt
    python evaluation.py --base_model_name=$MODEL_NAME --num_samples=16 --temperature=1    # the base model itself, sixteen responses a row

Responses are drawn from the base model with a checkpoint's LoRA, as configs/decoding.yaml says. Output in each checkpoint's folder, that
of the base model itself in <output_dir>/<its name>:

    alpaca-eval-<name>.json      a list of {dataset, instruction, output, generator, qtype}
    samples-<name>.jsonl         with --num_samples: a line a row, with all of its responses; the file above holds the first ones
    superni-<name>.json          a list of {task, id, prediction, references, rouge_l, rouge_l_first, exact_match}
    <the same>.meta.json         how it was made, SuperNI's summary, and the comparison with --baseline_model_file

Files are written atomically: one that exists is complete. Interrupted at any row, the same command resumes: finished files stay, and an
unfinished one continues from the rows in <file>.partial. Finished rollouts are compared with a baseline that is named later.
"""

from __future__ import annotations

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

import os
import shutil
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from parts.adapters import check_adapter
from parts.chat_templates import TOKENIZER_OWN, own_source
from parts.cli import Settings, parse_settings, setting
from parts.data_checks import check_rows
from parts.errors import InputError, run_main
from parts.files import digest, file_digest, read_text, write_json, write_json_lines
from parts.locks import hold
from parts.models import check_device, check_vllm, check_whole_model, model_identity, use_cache
from parts.processes import is_first_process
from parts.rollouts import Job, alpaca_rows, generate_all, sample_rows
from parts.rows import match_rows, read_rows
from parts.runs import BaseModel, Checkpoint, find_adapters, meta_path, partial_path, provenance, rollouts_path, samples_path, superni_path
from parts.weight_samples import require_base

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedTokenizerBase

    from parts.chat_templates import ChatTemplate
    from parts.generation import HFEngine
    from parts.models import ModelFacts
    from parts.sampling import Decoding
    from parts.superni import Instance
    from parts.vllm_engines import VLLMEngine
    from reward_model import RewardSettings

EVALUATIONS = ("alpaca", "superni")


@dataclass
class EvaluationSettings(Settings):
    base_model_name: str = setting(
        "", "the model that the checkpoints were trained from: hub name or folder", path=True, required=True, group=("what to evaluate", "")
    )
    peft_model_name: list[str] = setting(
        [],
        "checkpoint folders <output_dir>_step_<k>, any PEFT adapter folders, or patterns of them; left out: the base model itself",
        path=True,
    )
    output_dir: str = setting(
        "outputs", "where the base model itself has a folder of its name for its rollouts; checkpoints have them in their own", written=True
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
    num_samples: int = setting(1, "responses a row of the alpaca evaluation; more than one are in a file of their own too", least=1)
    superni_dir: str = setting("data/natural-instructions", "clone of allenai/natural-instructions", path=True)
    superni_tasks: list[str] = setting([], "task names; by default the test tasks of the default track")
    superni_instances: int = setting(100, "instances per task, the first ones", least=1)
    chat_template_name: str = setting(
        "", "prompt template; empty means the one that the record names; for a base model without one its tokenizer's own, or alpaca"
    )
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
        if self.peft_model_name and not any(self.peft_model_name):
            raise InputError("--peft_model_name is empty, expected checkpoints (without the flag: the base model itself)")
        super().__post_init__()
        if self.engine == "vllm" and self.device:
            raise InputError("--device is for --engine hf: CUDA_VISIBLE_DEVICES says which GPU vLLM takes")
        if self.engine == "vllm" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError("--engine vllm runs in one process, expected no launcher with several")
        unknown = [name for name in self.evaluations if name not in EVALUATIONS]
        if unknown:
            raise InputError(f"--evaluations holds {unknown[0]!r}, expected {' or '.join(EVALUATIONS)}")
        if self.num_samples > 1 and "alpaca" not in self.evaluations:
            raise InputError(f"--num_samples is {self.num_samples}, expected --evaluations alpaca with it")


# ------------------------------------------------------------------------------------------------------------------ input


def training_files(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The files that the checkpoints were trained on, each once, as far as they are here and still what they were."""
    files: list[str] = []
    for checkpoint in checkpoints:
        merged = checkpoint.record.get("trained_on") or {}  # of an adapter that `merge_adapter.py` made a model of
        file = merged.get("dataset_path") or checkpoint.trained.get("dataset_path", "")
        data = dict(merged.get("data") or checkpoint.record.get("data") or {})
        if isinstance(file, str) and file not in files and Path(file).is_file() and file_digest(file) == data.get("dataset_path"):
            files.append(file)
    return files


def read_decoding(settings: EvaluationSettings, evaluation: str) -> Decoding:
    """The decoding settings of an evaluation: the file's, and what the command line overrides."""
    from parts.sampling import Decoding

    try:
        table = yaml.safe_load(read_text(settings.decoding))
        values = dict(table[evaluation])
        if evaluation == "alpaca" or "alpaca" not in settings.evaluations:  # beside it SuperNI is as published
            values |= {"max_new_tokens": settings.max_new_tokens} if settings.max_new_tokens else {}
            values |= {"temperature": settings.temperature} if settings.temperature >= 0 else {}
            values |= {"top_p": settings.top_p} if settings.top_p else {}
        decoding = Decoding(**values)
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise InputError(f"{settings.decoding}: expected decoding settings under '{evaluation}' ({message})") from None
    if evaluation == "alpaca" and settings.num_samples > 1 and decoding.temperature == 0:
        raise InputError(f"--num_samples is {settings.num_samples} at temperature 0, expected a higher one: these would all be the same")
    return decoding


def read_checkpoints(settings: EvaluationSettings) -> list[Checkpoint]:
    """What is rolled out: the adapters that are named, or the base model itself.

    Raises:
        InputError: an adapter that no response can be drawn with, or of which nothing says what its prompts look like.
    """
    if settings.peft_model_name:
        checkpoints = find_adapters(settings.peft_model_name)
        for point in checkpoints:
            if not point.is_whole:
                check_adapter(point.folder, plain=settings.engine == "vllm")
            elif settings.engine == "vllm":
                raise InputError(f"{point.folder}: a whole model, expected it as --base_model_name with --engine vllm")
            if not point.trained and not settings.chat_template_name:
                raise InputError(f"{point.folder}: no record of a training run, expected --chat_template_name")
        return checkpoints
    name = Path(os.path.abspath(settings.base_model_name)).name
    return [BaseModel(Path(settings.output_dir) / name, settings.base_model_name)]


def read_instructions(settings: EvaluationSettings, checkpoints: Sequence[Checkpoint]) -> list[dict]:
    """The rows of `--data_path`. Raises InputError where they cannot be used, or where a checkpoint was trained on them."""
    if not Path(settings.data_path).is_file() and settings.data_path == "data/alpaca_eval.json":
        raise InputError(
            f"{settings.data_path}: no such file; data/README.md says how to get it, --data_path data/eval.json takes our rows"
        )
    seen = training_files([*checkpoints, Checkpoint(Path(settings.base_model_name))])
    return check_rows(settings.data_path, {"instruction": None}, against=seen)


def template_name(settings: EvaluationSettings, point: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the template of a checkpoint's prompts: the flag's, its record's, or for a base model without one what its tokenizer has."""
    named = settings.chat_template_name or point.trained.get("chat_template_name") or point.record.get("template")
    if named or not isinstance(point, BaseModel):
        return named or "alpaca"
    name = TOKENIZER_OWN if own_source(tokenizer) else "alpaca"
    why = "its tokenizer's own" if name == TOKENIZER_OWN else "'alpaca', since its tokenizer has none"
    if is_first_process():
        print(f"{settings.base_model_name}: no record names a chat template, prompts have {why} (--chat_template_name names another)")
    return name


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


def plan(
    settings: EvaluationSettings,
    checkpoints: Sequence[Checkpoint],
    templates: Mapping[Checkpoint, ChatTemplate],
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[dict],
    instances: Sequence[Instance],
    model: ModelFacts,
    device: str,
) -> list[Job]:
    """The jobs of all checkpoints. Raises InputError for a checkpoint without weights, or decoding settings that cannot be used."""
    import torch

    from parts.chat_templates import encode_rows
    from parts.sampling import end_tokens
    from parts.superni import superni_prompts

    prompts: dict[tuple[str, str], list[list[int]]] = {}  # by evaluation and template: checkpoints share them
    for template in templates.values():
        if "alpaca" in settings.evaluations and ("alpaca", template.name) not in prompts:
            prompts["alpaca", template.name] = encode_rows(tokenizer, template, data, "instruction", settings.data_path)
        if "superni" in settings.evaluations and ("superni", template.name) not in prompts:
            prompts["superni", template.name] = superni_prompts(instances, template, tokenizer)
    paths = {"alpaca": rollouts_path, "superni": superni_path}
    empty = [""] * len(data)
    every_column = {
        rollouts_path: digest(alpaca_rows(data, empty, "")),
        samples_path: digest(sample_rows(data, empty, empty, "")),
        superni_path: digest(list(map(asdict, instances))),
    }
    jobs = []
    for checkpoint in checkpoints:
        weights = digest_weights(checkpoint)
        template = templates[checkpoint]
        ends = end_tokens(tokenizer, model.generation, template)
        for evaluation in settings.evaluations:
            decoding = read_decoding(settings, evaluation)
            facts = {
                "base": model_identity(settings.base_model_name),
                "adapter": weights,
                "engine": [settings.engine, torch.device(device).type, settings.dtype],
                "decoding": asdict(decoding),
                "draws": [settings.seed, "common" if settings.common_draws else checkpoint.name],
                **({} if ends == {tokenizer.eos_token_id} else {"ends": sorted(ends)}),
                "prompts": digest(prompts[evaluation, template.name]),
            }
            files, count = {paths[evaluation](checkpoint.folder): digest(facts)}, 1
            if evaluation == "alpaca" and settings.num_samples > 1:
                count = settings.num_samples
                files = {samples_path(checkpoint.folder): digest({**facts, "samples": count}), **files}
            stream, own = "" if settings.common_draws else checkpoint.name, prompts[evaluation, template.name]
            columns = {path(checkpoint.folder): written for path, written in every_column.items()}
            jobs.append(Job(checkpoint, evaluation, files, columns, template, own, decoding, stream, ends, count))
    return jobs


def digest_weights(checkpoint: Checkpoint) -> list[str]:
    """What tells an adapter's weights from others; nothing for the base model alone. Raises InputError for an adapter without any."""
    if isinstance(checkpoint, BaseModel):
        return []
    if checkpoint.is_whole:
        return [model_identity(str(checkpoint.folder))]
    files = (checkpoint.folder / name for name in ("adapter_model.safetensors", "adapter_model.bin"))
    weights = next((file for file in files if file.is_file()), None)
    if weights is None:
        raise InputError(f"{checkpoint.folder}: no adapter_model.safetensors, expected a checkpoint folder")
    return [file_digest(weights), file_digest(checkpoint.folder / "adapter_config.json")]


# ------------------------------------------------------------------------------------------------------------- generation


def load_engine(
    settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase, jobs: Sequence[Job], device: str, processes: PartialState
) -> HFEngine | VLLMEngine:
    """What generates: the base model, ready for the adapters of the jobs."""
    from parts.generation import HFEngine
    from parts.vllm_engines import VLLMEngine

    if settings.engine == "vllm":
        longest = max(max(map(len, job.prompts)) + job.decoding.max_new_tokens for job in jobs)
        adapters = dict.fromkeys(job.checkpoint.adapter for job in jobs if job.checkpoint.adapter)
        return VLLMEngine(settings.base_model_name, tokenizer, list(adapters), longest, settings.dtype)
    own = f"cuda:{processes.local_process_index}" if device == "cuda" else device
    return HFEngine(settings.base_model_name, tokenizer, own, settings.batch_size, settings.cache_dir or None, settings.dtype)


@dataclass(frozen=True)
class Writer:
    """Writes the files of finished jobs, each with the record of how it was made.

    Args:
        data, instances: the rows of the two evaluations.
    """

    settings: EvaluationSettings
    engine: HFEngine | VLLMEngine
    data: Sequence[dict]
    instances: Sequence[Instance]

    def write(self, job: Job, responses: Sequence[list[int]]) -> None:
        """Write a job's files, print where they are, and remove the partial folder."""
        for file in job.files:
            # The AlpacaEval file beside one of several samples holds the first of each row.
            self.write_file(file, job, responses if file == job.target else responses[: len(job.prompts)])
        shutil.rmtree(partial_path(job.target), ignore_errors=True)

    def write_file(self, file: Path, job: Job, responses: Sequence[list[int]]) -> None:
        settings, name = self.settings, job.checkpoint.name
        texts = self.engine.tokenizer.batch_decode(responses, skip_special_tokens=True)
        finished = [response[-1] in job.ends for response in responses]
        record = provenance(
            seed=settings.seed,
            common_draws=settings.common_draws,
            dtype=self.engine.dtype,
            model=settings.base_model_name,
            adapter=job.checkpoint.adapter,
            engine=self.engine.name,
            template=job.template.name,
            decoding=asdict(job.decoding),
            data_path=settings.data_path if job.evaluation == "alpaca" else settings.superni_dir,
            rows=len(job.prompts),
            samples=len(responses) // len(job.prompts),
            eos_rate=statistics.fmean(finished),
            response_tokens=statistics.fmean(map(len, responses)),
            fingerprint=job.files[file],
            columns=job.columns[file],
            settings=asdict(settings),
        )
        if job.evaluation == "alpaca":
            several = len(responses) > len(self.data)
            rows = sample_rows(self.data, texts, finished, name) if several else alpaca_rows(self.data, texts, name)
        else:
            from parts.superni import describe_superni, summarise, superni_rows

            rows = superni_rows(self.instances, [text.strip() for text in texts])
            record["summary"] = summarise(self.instances, rows)
            print(describe_superni(record["summary"]))
        file.unlink(missing_ok=True)  # never stands beside a record of others
        write_json(meta_path(file), record)
        write = write_json_lines if file.suffix == ".jsonl" else write_json
        write(file, rows)
        print(file)


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
        fingerprint = digest([facts, *files, file_digest(job.checkpoint.rollouts)])
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
        write_json(
            meta_path(job.checkpoint.rollouts),
            {**meta, "baseline": {**found, "file": settings.baseline_model_file, "fingerprint": fingerprint}},
        )
        print(f"{job.checkpoint.rollouts} beside {settings.baseline_model_file}")
        print(describe_comparison(found))


# ------------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(EvaluationSettings, description=__doc__)
    use_cache(settings.cache_dir)

    # 1. Everything a user can get wrong, before any model loads.
    checkpoints = read_checkpoints(settings)
    for evaluation in settings.evaluations:
        read_decoding(settings, evaluation)
    for point in checkpoints:
        if bits := next((bits for bits in (8, 4) if point.trained.get(f"load_in_{bits}bit")), None):
            print(f"{point.folder}: trained on the base model in {bits} bits; responses are drawn with its whole weights")
    data, baseline, instances = [], None, []
    if "alpaca" in settings.evaluations:
        data = read_instructions(settings, checkpoints)
        baseline = read_baseline(settings, checkpoints, data) if settings.baseline_model_file else None
    if "superni" in settings.evaluations:
        from parts.superni import read_instances

        instances = read_instances(settings.superni_dir, settings.superni_tasks, settings.superni_instances)
    check_whole_model(settings.base_model_name, "--base_model_name")
    if settings.engine == "vllm":
        check_vllm("--engine vllm")
    check_device(settings.device)
    if settings.device.startswith("mps"):
        raise InputError(f"--device is {settings.device!r}, where numbers have no double precision for the draws, expected cpu or cuda")

    # 2. What there is to do: a file that is there already is either what this call would make, or in its way.
    import torch
    from accelerate import PartialState

    from parts.chat_templates import load_template
    from parts.models import is_same_tokenizer, load_tokenizer, read_facts

    named = {point.trained.get("tokenizer_name") or settings.base_model_name: point.folder for point in checkpoints}
    (name, tokenizer), *others = ((name, load_tokenizer(name, settings.cache_dir or None)) for name in named)
    for other, another in others:
        if not is_same_tokenizer(tokenizer, another):
            told = f"{named[name]} was trained with the tokenizer {name}, {named[other]} with {other}"
            raise InputError(f"{told}, which is another one, expected a call for each")
    model = read_facts(settings.base_model_name, tokenizer, settings.cache_dir or None)
    names = {point: template_name(settings, point, tokenizer) for point in checkpoints}
    templates = {point: load_template(name, tokenizer) for point, name in names.items()}
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jobs = plan(settings, checkpoints, templates, tokenizer, data, instances, model, device)
    for job in jobs:
        model.require_room(job.prompts, job.decoding.max_new_tokens, "--max_new_tokens", are_rows=True)
    waiting = [job for job in jobs if settings.overwrite or not job.is_done()]
    hold(*(job.target for job in waiting))
    waiting = [job for job in waiting if settings.overwrite or not job.is_done()]  # another process may just have finished one
    for point in dict.fromkeys(job.checkpoint for job in waiting if job.checkpoint.adapter and not job.checkpoint.is_whole):
        require_base(point.folder, point.record, settings.base_model_name)

    # 3. One engine for all checkpoints; their rollouts and files, one after the other.
    processes = PartialState(cpu=True)  # gloo, on GPUs too: only for barriers, since responses meet in files
    if waiting:
        engine = load_engine(settings, tokenizer, waiting, device, processes)
        writer = Writer(settings, engine, data, instances)
        count, drawn = Counter(job.files[job.target] for job in waiting), {}
        for job in waiting:
            fingerprint = job.files[job.target]
            responses = drawn[fingerprint] if fingerprint in drawn else generate_all(job, engine, settings.seed, processes)
            if responses is not None:
                writer.write(job, responses)
            if count[fingerprint] > 1:  # runs from one start have one step 0: with common draws it is drawn once
                drawn[fingerprint] = responses

    # 4. The comparison with another model's outputs, of finished rollouts too.
    if baseline is not None and processes.is_main_process:
        compare_with_baseline(settings, [job for job in jobs if job.evaluation == "alpaca"], baseline, data)
    processes.wait_for_everyone()


if __name__ == "__main__":
    run_main(main)
