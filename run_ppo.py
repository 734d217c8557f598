"""PPO against a white-box proxy reward, or against a learned reward model.

On a CPU, with the embedded models (`make setup` unpacks them) and our own prompts:

    accelerate launch --config_file configs/cpu.yaml run_ppo.py --config configs/demo.yaml

On GPUs, the paper's run (`--config configs/paper.yaml` sets what the published recipe really did where its flags do not say):

    accelerate launch --num_machines 1 --num_processes 1 --config_file configs/zero2-bf16.yaml run_ppo.py \\
        --exp_name=full --model_name=$MODEL_NAME --overall_steps=10000 --seed=42 --save_freq=500 \\
        --output_dir=outputs/full --dataset_path=data/alpacafarm_train.json --dev_prompt_path=data/alpacafarm_val.json \\
        --output_max_length=512 --batch_size=16 --mini_batch_size=2 --gradient_accumulation_steps=4 \\
        --learning_rate=1e-5 --lora_r=8 --lora_alpha=16 --lora_dropout=0.05 --reward_model_batch_size 8 \\
        --length_incentive=true --repetition_penalty=true --relevance_scaling=true --reward_branching=true

The algorithm is TRL 0.9.6's `PPOTrainer`, made faster in `parts/ppo_trainer.py`. Checkpoints (`parts/ppo_state.py` says what is in one) go to
<output_dir>_step_<k>, the start included as step 0; metrics to <logging_dir>/metrics.jsonl and to the tracker.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parts.cli import parse_settings, setting
from parts.data_checks import check_rows, too_long
from parts.errors import InputError, run_main
from parts.files import atomic_path, file_digest, read_json, write_json
from parts.models import check_model_name, loading
from parts.rewards import reward_batch
from parts.rows import QTYPES
from parts.runs import provenance
from reward_model import RewardSettings

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig

    from parts.chat_templates import ChatTemplate
    from parts.generation import Decoding
    from parts.ppo_trainer import FastPPOTrainer

TRACKERS = ("tensorboard", "wandb", "none")


@dataclass
class PPOSettings(RewardSettings):
    exp_name: str = setting("ppo", "name of the run, used by the trackers")
    model_name: str = setting("", "causal LM to train: hub name or folder")
    tokenizer_name: str = setting("", "its tokenizer, where it is not the model's own")
    chat_template_name: str = setting("alpaca", "a template of configs/chat_templates, or 'tokenizer' for the tokenizer's own")
    cache_dir: str = setting("", "where hub downloads are kept; empty means the default cache")

    dataset_path: str = setting("data/train.json", "training rows {input, output, qtype}")
    dev_prompt_path: str = setting("data/dev.json", "development rows of the same form")
    output_dir: str = setting("outputs/ppo", "checkpoints go to <output_dir>_step_<k>")
    logging_dir: str = setting("", "logs; empty means <output_dir>/logs")
    log_with: str = setting("tensorboard", "tracker: tensorboard, wandb or none (metrics.jsonl is always written)")
    overwrite: bool = setting(False, "remove the checkpoints that an earlier run left at output_dir")
    resume_from_checkpoint: str = setting("", "go on from a checkpoint folder, or from the latest of this output_dir: 'auto'")
    allow_changed_settings: bool = setting(False, "resume although settings are not those that the checkpoint was made with")
    save_total_limit: int = setting(0, "keep this many of the newest checkpoints, and the start; 0 keeps all")

    overall_steps: int = setting(10000, "PPO steps, each on batch_size prompts a process")
    save_freq: int = setting(500, "steps between checkpoints, each with an evaluation on the development prompts")
    sample_freq: int = setting(10, "steps between sample rollouts on the console")
    seed: int = setting(42, "seed of initialisation, data order and sampling")

    max_prompt_length: int = setting(512, "prompts must have fewer tokens than this")
    long_prompts: str = setting("error", "what to do with longer ones: 'error' or 'drop'")
    output_max_length: int = setting(512, "longest response in tokens; the reward's max_len")
    rollout_postprocessing: bool = setting(True, "cut a rollout's tokens at the template's first stop string before the PPO step")

    batch_size: int = setting(16, "prompts per step and process")
    mini_batch_size: int = setting(2, "sequences per forward and backward pass")
    gradient_accumulation_steps: int = setting(4, "mini batches per optimiser step; wins over the launch file's")
    ppo_epochs: int = setting(4, "passes over each batch of rollouts")
    learning_rate: float = setting(1e-5, "learning rate")
    use_optimizer_setup: bool = setting(False, "AdamW with linear warm-up and decay, in place of Adam with a constant rate")
    warmup_ratio: float = setting(0.05, "share of the steps that warm up, with use_optimizer_setup")
    bf16: bool = setting(
        False,
        "base weights and their arithmetic in bf16, LoRA and value head in fp32; not for DeepSpeed, whose launch file sets its own precision",
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass, to save memory")

    lora_r: int = setting(8, "LoRA rank")
    lora_alpha: int = setting(16, "LoRA scale is lora_alpha / lora_r")
    lora_dropout: float = setting(0.05, "LoRA dropout; PPO's losses run in eval mode, where it does not act")
    lora_target_modules: list[str] = setting(["q_proj", "v_proj"], "modules that carry LoRA")

    init_kl_coef: float = setting(0.2, "KL coefficient at the start")
    adap_kl_ctrl: bool = setting(True, "adapt the KL coefficient to reach adap_kl_target")
    adap_kl_target: float = setting(6.0, "KL in nats per response that the adaptive coefficient aims at")
    adap_kl_horizon: float = setting(10000.0, "samples over which it adapts")
    early_stopping: bool = setting(False, "leave a step's remaining epochs once the policy moved beyond 1.5 * target_kl")
    target_kl: float = setting(1.0, "KL per token between old and new policy, for early_stopping")

    reward_baseline: float = setting(0.0, "subtracted from every reward")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.logging_dir = self.logging_dir or os.path.join(self.output_dir, "logs")
        if not self.model_name:
            raise InputError("--model_name is missing, expected a hub name or a folder")
        for name in ("overall_steps", "save_freq", "sample_freq", "output_max_length", "batch_size", "mini_batch_size",
                     "gradient_accumulation_steps", "ppo_epochs", "lora_r"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least 1")
        optimizer_batch = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % optimizer_batch:
            raise InputError(
                f"--batch_size is {self.batch_size}, expected a multiple of mini_batch_size * gradient_accumulation_steps = {optimizer_batch}"
            )
        if self.batch_size * int(os.environ.get("WORLD_SIZE", "1")) < 2:
            raise InputError("--batch_size is 1 on one process, expected at least 2: rewards are normalised by their deviation")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}, expected 0 to 2**32 - 1")
        if self.adap_kl_target <= 0 or self.adap_kl_horizon <= 0:
            raise InputError("--adap_kl_target and --adap_kl_horizon must be more than 0")
        if self.learning_rate <= 0:
            raise InputError(f"--learning_rate is {self.learning_rate}, expected more than 0")
        if self.save_total_limit < 0:
            raise InputError(f"--save_total_limit is {self.save_total_limit}, expected 0 or more")
        if self.log_with not in TRACKERS:
            raise InputError(f"--log_with is {self.log_with!r}, expected {', '.join(TRACKERS)}")
        if self.long_prompts not in ("error", "drop"):
            raise InputError(f"--long_prompts is {self.long_prompts!r}, expected 'error' or 'drop'")


# ------------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Prompt:
    """A row ready for rollouts; the raw instruction stays beside the tokens, so that nothing has to be parsed back."""

    instruction: str
    tokens: list[int]
    row: dict

    @property
    def qtype(self) -> str | None:
        return self.row.get("qtype")


def read_prompts(
    path: str, settings: PPOSettings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, against: Sequence[str] = ()
) -> list[Prompt]:
    """Read rows, render and tokenize their prompts. A line warns of repeated prompts and of those that are also in a file of `against`.

    Raises:
        InputError: an unusable row, or a prompt that is too long.
    """
    from parts.chat_templates import encode_prompts

    rows = check_rows(path, {"input": None, **settings.dataset_fields}, against)
    prompts = []
    encoded = encode_prompts(tokenizer, [template.render(row["input"]) for row in rows])
    for number, (row, tokens) in enumerate(zip(rows, encoded), start=1):
        problem = too_long(len(tokens), settings.max_prompt_length)
        if problem is None:
            prompts.append(Prompt(row["input"], tokens, row))
        elif settings.long_prompts == "error":
            raise InputError(f"{path}: row {number}: {problem} (--long_prompts=drop leaves such rows out)")
    if not prompts:
        raise InputError(f"{path}: every prompt has {settings.max_prompt_length} tokens or more, expected shorter ones")
    if len(prompts) < len(rows):
        print(
            f"{path}: {len(rows) - len(prompts)} of {len(rows)} rows dropped, their prompts have {settings.max_prompt_length} tokens or more"
        )
    return prompts


def batches(prompts: list[Prompt], batch_size: int, seed: int, rank: int, world_size: int) -> Iterator[list[Prompt]]:
    """Endless batches: every epoch is a fresh permutation, every prompt comes once an epoch, ranks get disjoint slices.

    The prompt at a position depends on seed and position alone. (A loader inside `accelerator.prepare` would make the last
    batch of each epoch take an optimiser step per mini batch, whatever gradient_accumulation_steps says.)
    """
    import numpy as np

    order, epoch, start = None, -1, rank * batch_size
    while True:
        batch = []
        for position in range(start, start + batch_size):
            if position // len(prompts) != epoch:
                epoch = position // len(prompts)
                order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
            batch.append(prompts[order[position % len(prompts)]])
        yield batch
        start += batch_size * world_size


def cut_at_stop_string(response: list[int], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[int]:
    """The response's tokens up to its first stop string, at least one; unchanged where the text holds none.

    Tokens are dropped, never re-encoded: PPO needs the log-probabilities of tokens that the policy drew.
    """
    text = tokenizer.decode(response, skip_special_tokens=True)
    starts = [text.find(stop) for stop in template.stop_strings if stop in text]
    if not starts:
        return response
    low, high = 1, len(response)
    while low < high:  # the fewest tokens whose text reaches the stop string
        middle = (low + high) // 2
        if len(tokenizer.decode(response[:middle], skip_special_tokens=True)) >= min(starts):
            high = middle
        else:
            low = middle + 1
    return response[:low]


# ----------------------------------------------------------------------------------------------------------------- reward


def score_rollouts(reward, prompts: list[Prompt], responses: list[str]) -> dict[str, list]:
    """The reward's columns for responses to prompts."""
    return reward.score(reward_batch([prompt.instruction for prompt in prompts], responses, [prompt.row for prompt in prompts]))


def moments(columns: dict[str, list], qtypes: list[str | None], accelerator: Accelerator | None = None) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each numeric column, over all rows as "<column>" and over a type's as "<column>/<qtype>".

    The rows of all processes count where an accelerator is given. Rows without a value are left out; a column without any has no entry.
    """
    import torch

    groups = {name: values for name, values in columns.items() if not any(isinstance(value, str) for value in values)}
    for qtype in QTYPES:
        groups |= {f"{name}/{qtype}": [v for v, own in zip(columns[name], qtypes) if own == qtype] for name in columns if name in groups}
    sums = []
    for values in groups.values():
        numbers = [float(value) for value in values if value is not None]
        sums.append([len(numbers), sum(numbers), sum(value * value for value in numbers)])
    local = torch.tensor([sums], dtype=torch.float64)
    if accelerator is not None:
        local = accelerator.gather(local.to(accelerator.device))
    found = {}
    for name, (count, total, squares) in zip(groups, local.sum(dim=0).tolist()):
        if count:
            mean = total / count
            found[name] = (mean, math.sqrt(max(squares / count - mean * mean, 0.0)))
    return found


def reward_metrics(found: dict[str, tuple[float, float]], start: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Means as "reward/<column>", and as "reward_normalised/<column>" in standard deviations of the same column at the start.

    Both are also there by query type, which is normalised by the moments of all rows, so that the types can be compared.
    """
    metrics = {f"reward/{name}": mean for name, (mean, _) in found.items()}
    for name, (mean, _) in found.items():
        center, spread = start.get(name.partition("/")[0], (0.0, 0.0))
        if spread > 0:
            metrics[f"reward_normalised/{name}"] = (mean - center) / spread
    return metrics


# ------------------------------------------------------------------------------------------------------------------ model


def start_processes(settings: PPOSettings) -> Accelerator:
    """Join the processes of `accelerate launch`, with the script's accumulation and DeepSpeed's batch size in place.

    Raises:
        RuntimeError: the launch environment promises more processes than came together.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The launcher's value, where it has one, would silently win over the flag.
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(settings.gradient_accumulation_steps)
    # On a CPU, ranks find each other only with a named backend, and need `cpu` as well, but for DeepSpeed, which it would drop.
    no_gpu = not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    accelerator = Accelerator(
        cpu=no_gpu and not deepspeed,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if no_gpu and "WORLD_SIZE" in os.environ else [],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(f"{accelerator.num_processes} processes came together, expected {launched} as launched")
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.mini_batch_size
    return accelerator


def ppo_config(settings: PPOSettings) -> PPOConfig:
    """TRL's configuration; what has no flag here is a constant of the paper's run."""
    from trl import PPOConfig

    return PPOConfig(
        exp_name=settings.exp_name,
        seed=settings.seed,
        log_with=None if settings.log_with == "none" else settings.log_with,
        tracker_project_name="proxy-rewards",
        tracker_kwargs={"wandb": {"name": settings.exp_name, "dir": settings.logging_dir}} if settings.log_with == "wandb" else {},
        project_kwargs={"logging_dir": settings.logging_dir},
        model_name=settings.model_name,
        steps=settings.overall_steps * settings.batch_size,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        mini_batch_size=settings.mini_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        ppo_epochs=settings.ppo_epochs,
        init_kl_coef=settings.init_kl_coef,
        adap_kl_ctrl=settings.adap_kl_ctrl,
        target=settings.adap_kl_target,
        horizon=settings.adap_kl_horizon,
        early_stopping=settings.early_stopping,
        target_kl=settings.target_kl,
        gradient_checkpointing=settings.gradient_checkpointing,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=1.0,
        use_score_scaling=True,
        use_score_norm=True,
        score_clip=10.0,
    )


def load_policy(settings: PPOSettings, accelerator: Accelerator) -> AutoModelForCausalLMWithValueHead:
    """The policy with LoRA and a value head. The reference model is the same weights with the adapter disabled."""
    import torch
    from accelerate.utils import set_seed
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import AutoModelForCausalLMWithValueHead

    from parts.cpu_speed import use_onednn

    set_seed(settings.seed)  # the same new weights on every rank
    # LoRA and the value head stay in fp32 on bf16 weights; DeepSpeed keeps fp32 masters of its own.
    deepspeed_bf16 = accelerator.state.deepspeed_plugin is not None and accelerator.mixed_precision == "bf16"
    dtype = torch.bfloat16 if settings.bf16 or deepspeed_bf16 else torch.float32
    with loading(settings.model_name, "a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(settings.model_name, cache_dir=settings.cache_dir or None, dtype=dtype)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias="none",
        target_modules=settings.lora_target_modules,
    )
    with loading(settings.model_name, f"a policy with LoRA on {', '.join(settings.lora_target_modules)}"):
        return AutoModelForCausalLMWithValueHead.from_pretrained(use_onednn(model.requires_grad_(False)), peft_config=lora)


def optimizer_setup(settings: PPOSettings, policy: AutoModelForCausalLMWithValueHead, world_size: int) -> dict:
    """AdamW and its schedule as arguments of `PPOTrainer`; nothing, that is TRL's constant Adam, without the flag."""
    if not settings.use_optimizer_setup:
        return {}
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW((weight for weight in policy.parameters() if weight.requires_grad), lr=settings.learning_rate)
    steps = settings.overall_steps * world_size  # a prepared scheduler moves once per process
    return {"optimizer": optimizer, "lr_scheduler": get_linear_schedule_with_warmup(optimizer, round(settings.warmup_ratio * steps), steps)}


# ---------------------------------------------------------------------------------------------- evaluation and checkpoints


def evaluate(trainer: FastPPOTrainer, reward, prompts: list[Prompt], settings: PPOSettings, decoding: Decoding) -> tuple[list[dict], dict]:
    """Rollouts on the development prompts, each process its share: rows in the order of the prompts, and the scores' `moments`."""
    from accelerate.utils import gather_object

    from parts.generation import generate_responses

    accelerator, tokenizer = trainer.accelerator, trainer.tokenizer
    mine = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    own = [prompts[number] for number in mine]
    bar = "development rollouts" if accelerator.is_main_process else None
    policy = accelerator.unwrap_model(trainer.model).eval()
    rows = []
    if own:
        tokens = [prompt.tokens for prompt in own]
        responses = generate_responses(
            policy.pretrained_model, tokenizer, tokens, decoding, settings.batch_size, settings.seed, bar, rows=mine
        )
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = score_rollouts(reward, own, texts)
        for place, (number, prompt, text) in enumerate(zip(mine, own, texts)):
            row_scores = {name: values[place] for name, values in scores.items()}
            rows.append({"row": number + 1, "input": prompt.instruction, "qtype": prompt.qtype, "response": text, "scores": row_scores})
    rows = sorted(gather_object(rows), key=lambda row: row["row"])
    columns = {name: [row["scores"][name] for row in rows] for name in rows[0]["scores"]}
    return rows, moments(columns, [row["qtype"] for row in rows])


def run_record(
    trainer: FastPPOTrainer, step: int, settings: PPOSettings, decoding: Decoding, start: dict[str, tuple[float, float]], dev_means: dict
) -> dict:
    """What a checkpoint says of the run that made it; `start` are the scores' moments at step 0."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return provenance(
        step=step,
        seed=settings.seed,
        dtype=str(next(policy.pretrained_model.parameters()).dtype).removeprefix("torch."),
        model=settings.model_name,
        template=settings.chat_template_name,
        decoding=asdict(decoding),
        processes=trainer.accelerator.num_processes,
        kl_coef=float(trainer.kl_ctl.value),
        development=dev_means,
        start=start,
        reward_source=settings.reward_source(),
        design=settings.design,
        data={name: file_digest(getattr(settings, name)) for name in ("dataset_path", "dev_prompt_path")},
        settings=asdict(settings),
    )


class StopRequest:
    """Ctrl-C or SIGTERM: the first asks for a stop after the step that is under way, the second stops at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; once more stops at once", file=sys.stderr)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked."""
        import torch

        return accelerator.gather(torch.tensor([float(self.asked)], device=accelerator.device)).sum().item() > 0


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: a run that goes on from there writes them anew."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def scalars(stats: dict[str, float | np.ndarray]) -> dict[str, float]:
    """The single numbers among TRL's statistics, as floats."""
    import numpy as np

    return {name: float(value) for name, value in stats.items() if np.ndim(value) == 0 and not isinstance(value, str)}


def require_finite_step(stats: dict[str, float], step: int) -> None:
    """Raises FloatingPointError: the weights are spoilt, and going on would only hide it."""
    for name in ("objective/kl", "ppo/loss/total", "ppo/loss/policy", "ppo/loss/value"):
        if not math.isfinite(stats[name]):
            raise FloatingPointError(f"{name} is {stats[name]} at step {step}; the last checkpoint is good")


# ------------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(PPOSettings, description=__doc__)
    from parts import ppo_state as checkpoints

    resumed = checkpoints.find_resumable(settings.output_dir, settings.resume_from_checkpoint) if settings.resume_from_checkpoint else None
    done = 0
    if resumed is not None:
        checkpoints.check_settings(resumed, settings, int(os.environ.get("WORLD_SIZE", "1")))
        done = read_json(resumed / checkpoints.RECORD)["step"]
    in_the_way = [path for path in checkpoints.checkpoints_of(settings.output_dir) if read_json(path / checkpoints.RECORD)["step"] > done]
    if resumed is None:
        in_the_way = checkpoints.checkpoints_of(settings.output_dir)
    if in_the_way and not settings.overwrite:
        later = "it and those after it" if resumed else "the checkpoints of an earlier run; --resume_from_checkpoint=auto goes on"
        raise InputError(f"{in_the_way[0]}: exists already (--overwrite=true removes {later})")

    # 1. Everything a user can get wrong, before any model loads.
    from parts.chat_templates import load_template
    from parts.generation import Decoding
    from parts.models import load_tokenizer

    for name in (settings.model_name, settings.tokenizer_name or settings.model_name):
        check_model_name(name)
    settings.check_reward()
    tokenizer = load_tokenizer(settings.tokenizer_name or settings.model_name, settings.cache_dir or None)
    template = load_template(settings.chat_template_name, tokenizer)
    prompts = read_prompts(settings.dataset_path, settings, tokenizer, template, against=[settings.dev_prompt_path])
    dev_prompts = read_prompts(settings.dev_prompt_path, settings, tokenizer, template)

    # 2. Policy, reference (the policy with its adapter disabled), value head, optimiser: TRL's trainer.
    import torch
    from accelerate.utils import set_seed
    from tqdm import tqdm

    from parts.ppo_trainer import FastPPOTrainer

    accelerator = start_processes(settings)
    policy = load_policy(settings, accelerator)
    optimization = optimizer_setup(settings, policy, accelerator.num_processes)
    trainer = FastPPOTrainer(ppo_config(settings), policy, ref_model=None, tokenizer=tokenizer, **optimization)
    accelerator = trainer.accelerator
    reward = settings.load_reward(template, settings.output_max_length, str(accelerator.device), settings.cache_dir or None)
    set_seed(settings.seed, device_specific=True)  # other draws on every rank from here on

    if settings.is_proxy:
        known = [*prompts, *dev_prompts]
        reward.remember(reward_batch([prompt.instruction for prompt in known], [""] * len(known), [prompt.row for prompt in known]))

    # 3. The start is a checkpoint too; or go on from a later one.
    decoding = Decoding(max_new_tokens=settings.output_max_length)
    metrics_path = Path(settings.logging_dir) / "metrics.jsonl"
    main_process = accelerator.is_main_process
    if main_process:
        for path in in_the_way:
            shutil.rmtree(path)
        left_over = checkpoints.interrupted(settings.output_dir)
        if resumed != left_over:
            shutil.rmtree(left_over, ignore_errors=True)
        checkpoints.sweep(settings.output_dir)
        metrics_path.parent.mkdir(parents=True, exist_ok=True)
        keep_metrics_until(metrics_path, done if resumed else -1)
        write_json(metrics_path.with_name("run.json"), provenance(seed=settings.seed, decoding=asdict(decoding), settings=asdict(settings)))
        print(f"process {os.getpid()}: Ctrl-C or SIGTERM to it stops the run after the step that is under way")
    stop = StopRequest()
    if resumed is None:
        dev_rows, start = evaluate(trainer, reward, dev_prompts, settings, decoding)
        dev_means = development_metrics(start)
        checkpoints.save(trainer, f"{settings.output_dir}_step_0", run_record(trainer, 0, settings, decoding, start, dev_means), dev_rows)
        if main_process:
            print(f"step 0: development {describe(dev_means)}")
    else:
        start = {name: tuple(pair) for name, pair in checkpoints.load(trainer, resumed)["start"].items()}
        if main_process:
            print(f"resumed from {resumed}, at step {done}")
    bar = tqdm(total=settings.overall_steps, initial=done, desc="PPO", unit="step", disable=not main_process)

    data = batches(prompts, settings.batch_size, settings.seed, accelerator.process_index, accelerator.num_processes)
    for step, batch in zip(range(done + 1, settings.overall_steps + 1), itertools.islice(data, done, None)):
        # 4. Rollouts.
        queries = [torch.tensor(prompt.tokens) for prompt in batch]
        generated = trainer.generate(queries, batch_size=settings.batch_size, return_prompt=False, do_sample=True, **asdict(decoding))
        responses = [response.tolist() for response in generated]
        ended = [float(response[-1] == tokenizer.eos_token_id) for response in responses]
        if settings.rollout_postprocessing:
            responses = [cut_at_stop_string(response, tokenizer, template) for response in responses]

        # 5. Rewards.
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        columns = score_rollouts(reward, batch, texts)
        rewards = [total - settings.reward_baseline for total in columns["total"]]

        # 6. The PPO step, TRL's own.
        stats = trainer.step(queries, [torch.tensor(response) for response in responses], [torch.tensor(reward) for reward in rewards])
        require_finite_step(scalars(stats), step)

        # 7. Metrics, samples, checkpoints.
        lengths = [float(len(response)) for response in responses]
        truncated = [float(not end and length >= settings.output_max_length) for end, length in zip(ended, lengths)]
        lengths_and_ends = {"response_tokens": lengths, "eos_rate": ended, "truncation_rate": truncated}
        means = reward_metrics(moments({**columns, **lengths_and_ends}, [prompt.qtype for prompt in batch], accelerator), start)
        stats.update(means)
        last = step == settings.overall_steps
        scheduled = last or step % settings.save_freq == 0
        if scheduled:
            dev_rows, dev_moments = evaluate(trainer, reward, dev_prompts, settings, decoding)
            dev_means = development_metrics(dev_moments)
            stats.update(dev_means)
        trainer.log_stats(stats, {"query": [prompt.instruction for prompt in batch], "response": texts}, rewards)
        if main_process:  # the line before the checkpoint: whoever resumes from this step has its numbers
            with metrics_path.open("a", encoding="utf-8") as log:
                line = {name: value if math.isfinite(value) else None for name, value in scalars(stats).items()}
                log.write(json.dumps({"step": step, **line}) + "\n")
            bar.update()
            bar.set_postfix(reward=f"{means['reward/total']:.3f}", kl=f"{float(stats['objective/kl']):.2f}")
            if step % settings.sample_freq == 0 or last:
                tqdm.write(
                    f"step {step}: reward {rewards[0]:.3f}\n  prompt   {shorten(batch[0].instruction)}\n  response {shorten(texts[0])}"
                )
        if scheduled:
            folder = f"{settings.output_dir}_step_{step}"
            checkpoints.save(trainer, folder, run_record(trainer, step, settings, decoding, start, dev_means), dev_rows)
            if main_process:
                checkpoints.prune(settings.output_dir, settings.save_total_limit)
                shutil.rmtree(checkpoints.interrupted(settings.output_dir), ignore_errors=True)
                tqdm.write(f"step {step}: development {describe(dev_means)}; saved {folder}")
        if not last and stop.agreed(accelerator):
            if not scheduled:
                folder = str(checkpoints.interrupted(settings.output_dir))
                checkpoints.save(trainer, folder, run_record(trainer, step, settings, decoding, start, {}), None)
            if main_process:
                tqdm.write(f"stopped after step {step}; the same command with --resume_from_checkpoint=auto goes on from {folder}")
            break
    bar.close()
    # Tearing gloo down while a worker still holds the tensors of the last gather can deadlock; a barrier holds none.
    accelerator.wait_for_everyone()
    accelerator.end_training()


def development_metrics(found: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The means of `moments` as "dev/<column>"."""
    return {f"dev/{name}": mean for name, (mean, _) in found.items()}


def describe(means: dict[str, float]) -> str:
    """The means over all query types in one line."""
    names = {name: name.removeprefix("dev/") for name in means}
    return ", ".join(f"{short} {means[name]:.3f}" for name, short in names.items() if "/" not in short)


def shorten(text: str, width: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


if __name__ == "__main__":
    run_main(main)
