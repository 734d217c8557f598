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

`main` is the algorithm, top to bottom. Its step is TRL 0.9.6's `PPOTrainer`, made faster in `parts/ppo_trainer.py`. Checkpoints
(`parts/ppo_state.py` says what is in one) go to <output_dir>_step_<k>, the start included as step 0; metrics to
<logging_dir>/metrics.jsonl and to the tracker.
"""

from __future__ import annotations

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

import functools
import itertools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from parts.adapters import VLLM_RANKS, check_pattern
from parts.chat_templates import load_template
from parts.cli import parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import check_writable, clear_leftovers, write_json
from parts.locks import hold
from parts.models import check_bits, check_tokenizer_name, check_vllm, check_whole_model, load_tokenizer, read_facts, use_cache
from parts.ppo_data import Prompt, batches, cut_at_stop_string, read_prompts, with_random_qtypes
from parts.ppo_metrics import (
    MetricsLog,
    Moments,
    describe,
    development_metrics,
    engine_metrics,
    length_columns,
    moments,
    require_finite_step,
    reward_metrics,
    scalars,
    shorten,
)
from parts.processes import StopRequest, leave_processes
from parts.rewards import filled, reward_batch
from parts.rows import QTYPES
from parts.runs import interrupted_path, provenance
from reward_model import RewardSettings

if TYPE_CHECKING:
    from parts.chat_templates import ChatTemplate
    from parts.ppo_checkpoints import Start
    from parts.ppo_trainer import FastPPOTrainer
    from parts.sampling import Decoding
    from parts.vllm_engines import PolicyEngine

TRACKERS = ("tensorboard", "wandb", "none")


@dataclass
class PPOSettings(RewardSettings):
    exp_name: str = setting("ppo", "name of the run, used by the trackers", group=("the model", ""))
    model_name: str = setting("", "causal LM to train: hub name or folder", path=True, required=True, expected="a hub name or a folder")
    tokenizer_name: str = setting("", "its tokenizer, where it is not the model's own", path=True)
    chat_template_name: str = setting("alpaca", "a template of configs/chat_templates, or 'tokenizer' for the tokenizer's own")
    cache_dir: str = setting("", "where hub downloads are kept; empty means the default cache", written=True)

    dataset_path: str = setting("data/train.json", "training rows {input, output, qtype}", path=True, group=("files", ""))
    dev_prompt_path: str = setting("data/dev.json", "development rows of the same form", path=True)
    dev_prompts: int = setting(0, "evaluate on the first so many development prompts; 0 means all", least=0)
    random_qtypes: bool = setting(False, "shuffle the query types of the training rows, by seed: the paper's control of branching")
    output_dir: str = setting("outputs/ppo", "checkpoints go to <output_dir>_step_<k>", written=True)
    logging_dir: str = setting("", "logs; empty means <output_dir>/logs", written=True)
    log_with: str = setting(
        "tensorboard",
        "tracker: tensorboard, wandb or none (metrics.jsonl is always written)",
        choices=TRACKERS,
        expected=", ".join(TRACKERS),
    )
    overwrite: bool = setting(False, "remove the checkpoints that an earlier run left at output_dir")
    resume_from_checkpoint: str = setting("", "resume from a checkpoint folder, or from the latest of this output_dir: 'auto'", path=True)
    allow_changed_settings: bool = setting(False, "resume although settings are not those that the checkpoint was made with")
    save_total_limit: int = setting(
        0, "keep this many of the newest checkpoints, and the start; 0 keeps all", least=0, expected="0 or more"
    )

    overall_steps: int = setting(10000, "PPO steps, each on batch_size prompts a process", least=1, group=("the course of the run", ""))
    save_freq: int = setting(500, "steps between checkpoints, each with an evaluation on the development prompts", least=1)
    sample_freq: int = setting(10, "steps between sample rollouts on the console", least=1)
    seed: int = setting(42, "seed of initialisation, data order and sampling", least=0, most=2**32 - 1, expected="0 to 2**32 - 1")

    max_prompt_length: int = setting(512, "prompts must have fewer tokens than this", least=1, group=("prompts and responses", ""))
    long_prompts: str = setting(
        "error", "what to do with longer ones: 'error' or 'drop'", choices=("error", "drop"), expected="'error' or 'drop'"
    )
    output_max_length: int = setting(512, "longest response in tokens; the reward's max_len", least=1)
    rollout_engine: str = setting(
        "hf", "what draws the rollouts of a step: hf, the policy itself, or vllm, beside it, on each GPU", choices=("hf", "vllm")
    )
    vllm_gpu_memory_utilization: float = setting(0.3, "share of a GPU's memory for the vLLM engine", above=0, most=1)
    rollout_postprocessing: bool = setting(True, "cut a rollout's tokens at the template's first stop string before the PPO step")

    batch_size: int = setting(16, "prompts per step and process", least=1, group=("PPO", ""))
    mini_batch_size: int = setting(2, "sequences per forward and backward pass", least=1)
    gradient_accumulation_steps: int = setting(4, "mini batches per optimiser step; wins over the launch file's", least=1)
    ppo_epochs: int = setting(4, "passes over each batch of rollouts", least=1)
    learning_rate: float = setting(1e-5, "learning rate", above=0)
    value_learning_rate: float = setting(0.0, "learning rate of the value head; 0 means learning_rate", least=0)
    value_warmup_steps: int = setting(0, "train the value head alone for the first so many of overall_steps", least=0)
    use_optimizer_setup: bool = setting(False, "AdamW with linear warm-up and decay, in place of Adam with a constant rate")
    warmup_ratio: float = setting(0.05, "share of the steps that warm up, with use_optimizer_setup", least=0)
    bf16: bool = setting(
        False,
        "base weights and their arithmetic in bf16, LoRA and value head in fp32; not for DeepSpeed, whose launch file sets its own precision",
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass, to save memory")

    use_peft: bool = setting(
        True, "train LoRA; false trains all weights, against a copy of them: a checkpoint is a whole model", group=("LoRA", "")
    )
    load_in_8bit: bool = setting(False, "base weights in 8 bits under LoRA (bitsandbytes)")
    load_in_4bit: bool = setting(False, "base weights in 4 bits under LoRA (bitsandbytes, nf4)")
    lora_r: int = setting(8, "LoRA rank", least=1)
    lora_alpha: int = setting(16, "LoRA scale is lora_alpha / lora_r", least=1)
    lora_dropout: float = setting(0.05, "LoRA dropout, below 1; PPO's losses run in eval mode, where it does not act", least=0)
    lora_target_modules: list[str] = setting(["q_proj", "v_proj"], "modules that carry LoRA")

    init_kl_coef: float = setting(0.2, "KL coefficient at the start", least=0, group=("KL", "How far the policy may leave its start."))
    adap_kl_ctrl: bool = setting(True, "adapt the KL coefficient to reach adap_kl_target")
    adap_kl_target: float = setting(6.0, "KL in nats per response that the adaptive coefficient aims at", above=0)
    adap_kl_horizon: float = setting(10000.0, "samples over which it adapts", above=0)
    early_stopping: bool = setting(False, "leave a step's remaining epochs once the policy moved beyond 1.5 * target_kl")
    target_kl: float = setting(1.0, "KL per token between old and new policy, for early_stopping", above=0)

    reward_baseline: float = setting(0.0, "subtracted from every reward; it moves logs alone, since training takes the running mean away")
    score_norm_by_qtype: bool = setting(
        False, "normalise rewards by the running mean and deviation of their query type, not of all rewards"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.logging_dir = self.logging_dir or os.path.join(self.output_dir, "logs")
        optimizer_batch = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % optimizer_batch:
            raise InputError(
                f"--batch_size is {self.batch_size}, expected a multiple of mini_batch_size * gradient_accumulation_steps = {optimizer_batch}"
            )
        if self.batch_size < 2:
            raise InputError("--batch_size is 1, expected at least 2: each process whitens the advantages of its own batch")
        for name in ("warmup_ratio", "lora_dropout"):
            if getattr(self, name) >= 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected less than 1")
        default = {field.name: field.default for field in fields(self)}
        for is_read, reader, names in (
            (self.use_optimizer_setup, "--use_optimizer_setup=true", ["warmup_ratio"]),
            (self.early_stopping, "--early_stopping=true", ["target_kl"]),
            (self.adap_kl_ctrl, "--adap_kl_ctrl=true", ["adap_kl_target", "adap_kl_horizon"]),
            (self.rollout_engine == "vllm", "--rollout_engine vllm", ["vllm_gpu_memory_utilization"]),
        ):
            for name in [] if is_read else names:
                if getattr(self, name) != default[name]:
                    raise InputError(f"--{name} is {getattr(self, name)}, which nothing reads without {reader}")
        if self.value_warmup_steps >= self.overall_steps:
            raise InputError(f"--value_warmup_steps is {self.value_warmup_steps}, expected fewer than overall_steps = {self.overall_steps}")
        check_bits(self.load_in_8bit, self.load_in_4bit)
        quantized = self.load_in_8bit or self.load_in_4bit
        if quantized and not self.use_peft:
            raise InputError("--use_peft=false trains all weights, expected them whole, not --load_in_8bit or --load_in_4bit")
        if self.bf16 and not self.use_peft:
            raise InputError("--use_peft=false with --bf16: small updates would be rounded away, expected float32, or DeepSpeed's bf16")
        if self.rollout_engine == "vllm" and (quantized or not self.use_peft):
            raise InputError(
                "--rollout_engine vllm draws with LoRA on whole weights, expected --use_peft=true without --load_in_8bit or 4bit"
            )
        if self.rollout_engine == "vllm" and self.lora_r > VLLM_RANKS[-1]:
            raise InputError(f"--lora_r is {self.lora_r}, expected {VLLM_RANKS[-1]} at most with --rollout_engine vllm")
        check_pattern(self.lora_target_modules)
        if self.random_qtypes and "qtype" not in super().dataset_fields and not (self.score_norm_by_qtype or self.reward_function):
            raise InputError("--random_qtypes=true, expected a reward that query types matter to, as with --reward_branching=true")
        if quantized and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise InputError("--load_in_8bit and --load_in_4bit under DeepSpeed, expected a launch file without it")

    @property
    def dataset_fields(self) -> dict[str, tuple[str, ...] | None]:
        return super().dataset_fields | ({"qtype": QTYPES} if self.score_norm_by_qtype or self.random_qtypes else {})


# ------------------------------------------------------------------------------------------- reward, evaluation, start


def score_rollouts(reward, prompts: list[Prompt], responses: list[str]) -> dict[str, list]:
    """The reward's columns for responses to prompts."""
    return reward.score(reward_batch([prompt.instruction for prompt in prompts], responses, [prompt.row for prompt in prompts]))


def evaluate(
    trainer: FastPPOTrainer, reward, prompts: list[Prompt], settings: PPOSettings, template: ChatTemplate, decoding: Decoding
) -> tuple[list[dict], Moments]:
    """Rollouts on the development prompts, each process its share: rows in the order of the prompts, and the scores' `moments`.

    They are cut as those of training are, so that both are scored alike.
    """
    from accelerate.utils import gather_object

    from parts.generation import generate_responses

    accelerator, tokenizer = trainer.accelerator, trainer.tokenizer
    policy = accelerator.unwrap_model(trainer.model).eval().pretrained_model
    numbers = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    own = [prompts[number] for number in numbers]
    rows = []
    if own:
        bar = "development rollouts" if accelerator.is_main_process else None
        tokens = [prompt.tokens for prompt in own]
        responses = generate_responses(
            policy, tokenizer, tokens, decoding, settings.batch_size, settings.seed, bar, numbers, ends=trainer.ends
        )
        if settings.rollout_postprocessing:
            responses = [cut_at_stop_string(response, tokenizer, template) for response in responses]
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        columns = score_rollouts(reward, own, texts)
        for number, prompt, text, kl, *scores in zip(numbers, own, texts, trainer.kl(tokens, responses), *columns.values()):
            row = {"row": number + 1, "input": prompt.instruction, "qtype": prompt.qtype, "response": text, "kl": kl}
            rows.append({**row, "scores": dict(zip(columns, scores))})
    rows = sorted(gather_object(rows), key=lambda row: row["row"])
    names = {name: None for row in rows for name in row["scores"]}  # a user's function may return other ones in another process
    columns = {name: [row["scores"].get(name) for row in rows] for name in names}
    columns["objective/kl"] = [row["kl"] for row in rows]  # TRL's name, which no column of a reward has
    return rows, moments(columns, [row["qtype"] for row in rows])


def load_engine(settings: PPOSettings, trainer: FastPPOTrainer) -> PolicyEngine | None:
    """The engine that draws a step's rollouts, where it is not the policy itself."""
    if settings.rollout_engine == "hf":
        return None
    from parts.vllm_engines import PolicyEngine

    dtype = str(next(trainer.accelerator.unwrap_model(trainer.model).pretrained_model.parameters()).dtype).removeprefix("torch.")
    length = settings.max_prompt_length + settings.output_max_length
    place = str(trainer.accelerator.device)
    return PolicyEngine(settings.model_name, dtype, length, settings.lora_r, settings.vllm_gpu_memory_utilization, place, settings.seed)


def draw(
    trainer: FastPPOTrainer, engine: PolicyEngine | None, prompts: list[Prompt], decoding: Decoding
) -> tuple[list[list[int]], list[list[float]] | None]:
    """Responses to prompts, token ids each, and the log-probabilities that an engine beside the policy drew them with."""
    import torch

    if engine is None:
        queries = [torch.tensor(prompt.tokens) for prompt in prompts]
        drawn = trainer.generate(queries, batch_size=len(queries), return_prompt=False, do_sample=True, **asdict(decoding))
        return [response.tolist() for response in drawn], None
    policy = trainer.accelerator.unwrap_model(trainer.model).pretrained_model
    seeds = torch.randint(2**62, (len(prompts),)).tolist()
    return engine.generate(policy, [prompt.tokens for prompt in prompts], decoding, seeds, trainer.ends)


def start_or_resume(
    begin: Start,
    trainer: FastPPOTrainer,
    reward,
    dev_prompts: list[Prompt],
    settings: PPOSettings,
    template: ChatTemplate,
    decoding: Decoding,
    facts: Mapping,
    log: MetricsLog,
) -> Moments:
    """Make room for the run, then evaluate the untrained policy and save it as step 0, or load the checkpoint that `begin` names.

    Returns:
        The scores' `moments` at step 0.
    """
    from parts import ppo_checkpoints, ppo_state

    ppo_state.require_masters(trainer)
    say = trainer.accelerator.on_main_process(print)
    if trainer.accelerator.is_main_process:
        ppo_checkpoints.make_room(begin)
        run_file = ppo_checkpoints.run_file(settings)
        for path in (log.path, run_file):
            clear_leftovers(path)
        log.keep_until(begin.step if begin.folder else -1)
        write_json(run_file, provenance(seed=settings.seed, decoding=asdict(decoding), settings=asdict(settings)))
    if begin.folder is None:
        dev_rows, start = evaluate(trainer, reward, dev_prompts, settings, template, decoding)
        dev_means = development_metrics(start)
        record = ppo_state.run_record(trainer, 0, settings, facts, decoding, start, dev_means)
        ppo_state.save(trainer, f"{settings.output_dir}_step_0", record, dev_rows)
        say(f"step 0: development {describe(dev_means)}")
    else:
        start = ppo_state.load(trainer, begin.folder)["start"]
        say(f"resumed from {begin.folder}, at step {begin.step}")
    return start


# ------------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(PPOSettings, description=__doc__)
    use_cache(settings.cache_dir)
    from parts import ppo_checkpoints, ppo_state

    # 1. Where to begin: at step 0, or at a checkpoint. Everything a user can get wrong comes before any model loads.
    logs_apart = [] if Path(settings.output_dir) in Path(settings.logging_dir).parents else [settings.logging_dir]
    hold(settings.output_dir, *logs_apart)
    check_writable(Path(settings.logging_dir) / "metrics.jsonl")
    begin = ppo_checkpoints.find_start(settings)
    check_whole_model(settings.model_name, "--model_name")
    check_tokenizer_name(settings.tokenizer_name or settings.model_name)
    settings.check_reward()
    if settings.rollout_engine == "vllm":
        check_vllm("--rollout_engine vllm")

    # 2. Data.
    tokenizer = load_tokenizer(settings.tokenizer_name or settings.model_name, settings.cache_dir or None)
    model = read_facts(settings.model_name, tokenizer, settings.cache_dir or None)
    template = load_template(settings.chat_template_name, tokenizer)
    if begin.folder:
        ppo_checkpoints.check_template(begin.folder, settings, template)
    limits = {"max_length": settings.max_prompt_length, "drop_long": settings.long_prompts == "drop"}
    read = functools.partial(read_prompts, fields=settings.dataset_fields, tokenizer=tokenizer, template=template, **limits)
    prompts = read(settings.dataset_path, against=[settings.dev_prompt_path])
    prompts = with_random_qtypes(prompts, settings.seed) if settings.random_qtypes else prompts
    dev_prompts = read(settings.dev_prompt_path)[: settings.dev_prompts or None]
    facts = ppo_state.run_facts(settings, template)
    model.require_room([prompt.tokens for prompt in [*prompts, *dev_prompts]], settings.output_max_length, "--output_max_length")

    # 3. Policy, reference (the policy with its adapter disabled, or a copy), value head, optimizer: TRL's trainer. Then the reward.
    import torch
    from accelerate.utils import set_seed
    from tqdm import tqdm

    from parts.ppo_setup import check_same_start, make_trainer
    from parts.sampling import Decoding, end_tokens

    trainer = make_trainer(settings, tokenizer)
    check_same_start(begin.folder, begin.step)
    trainer.ends = end_tokens(tokenizer, model.generation, template)
    accelerator = trainer.accelerator
    engine = load_engine(settings, trainer)
    reward = settings.load_reward(template, settings.output_max_length, str(accelerator.device), settings.cache_dir or None)
    set_seed(settings.seed, device_specific=True)  # from here on every rank draws other numbers
    if settings.is_proxy:
        known = [*prompts, *dev_prompts]
        reward.remember(reward_batch([prompt.instruction for prompt in known], [""] * len(known), [prompt.row for prompt in known]))

    # 4. The start is a checkpoint too; a resumed run loads a later one. Rewards are normalised by the scores at step 0.
    decoding = Decoding(max_new_tokens=settings.output_max_length)
    log = MetricsLog(Path(settings.logging_dir) / "metrics.jsonl")
    say = accelerator.on_main_process(tqdm.write)
    say(f"process {os.getpid()}: Ctrl-C or SIGTERM to it stops the run after the step that is under way")
    stop = StopRequest()
    start = start_or_resume(begin, trainer, reward, dev_prompts, settings, template, decoding, facts, log)
    bar = tqdm(total=settings.overall_steps, initial=begin.step, desc="PPO", unit="step", disable=not accelerator.is_main_process)

    data = batches(prompts, settings.batch_size, settings.seed, accelerator.process_index, accelerator.num_processes)
    for step, batch in zip(range(begin.step + 1, settings.overall_steps + 1), itertools.islice(data, begin.step, None)):
        # 5. Rollouts.
        responses, drawn_with = draw(trainer, engine, batch, decoding)
        ended = [response[-1] in trainer.ends for response in responses]
        if settings.rollout_postprocessing:
            responses = [cut_at_stop_string(response, tokenizer, template) for response in responses]
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)

        # 6. Rewards.
        columns = score_rollouts(reward, batch, texts)
        rewards = [total - settings.reward_baseline for total in filled(columns["total"])]

        # 7. The PPO step, TRL's own.
        qtypes = [prompt.qtype for prompt in batch]
        stats = trainer.step(
            [torch.tensor(prompt.tokens) for prompt in batch],
            [torch.tensor(response) for response in responses],
            [torch.tensor(reward) for reward in rewards],
            qtypes=qtypes if settings.score_norm_by_qtype else None,
        )
        require_finite_step(scalars(stats), step)
        if step == settings.value_warmup_steps:
            ppo_state.begin_policy(trainer, settings.init_kl_coef)

        # 8. Metrics. They are logged before the checkpoint is saved: whoever resumes from it has its step's numbers.
        columns |= length_columns(responses, ended, settings.output_max_length)
        means = reward_metrics(moments(columns, qtypes, of_all_processes=True), start)
        last = step == settings.overall_steps
        scheduled = last or step % settings.save_freq == 0
        dev_rows, dev_moments = evaluate(trainer, reward, dev_prompts, settings, template, decoding) if scheduled else (None, {})
        dev_means = development_metrics(dev_moments)
        stats |= {**means, **dev_means}
        if drawn_with:
            stats |= engine_metrics(stats["objective/logprobs"], drawn_with, [len(response) for response in responses])
        trainer.log_stats({**stats, "step": step}, {"query": [prompt.instruction for prompt in batch], "response": texts}, rewards)
        accelerator.on_main_process(log.append)(step, stats)
        bar.update()
        bar.set_postfix(reward=f"{means['reward/total']:.3f}", kl=f"{float(stats['objective/kl']):.2f}")
        if last or step % settings.sample_freq == 0:
            say(
                f"step {step}, one sample: reward {rewards[0]:.3f}\n  prompt   {shorten(batch[0].instruction)}\n  response {shorten(texts[0])}"
            )

        # 9. Checkpoint, where one is due.
        if scheduled:
            folder = f"{settings.output_dir}_step_{step}"
            record = ppo_state.run_record(trainer, step, settings, facts, decoding, start, dev_means)
            ppo_state.save(trainer, folder, record, dev_rows)
            accelerator.on_main_process(ppo_checkpoints.prune)(settings.output_dir, settings.save_total_limit)
            say(f"step {step}: development {describe(dev_means)}; saved {folder}")

        # 10. Stop, where any process was asked to.
        if not last and stop.agreed():
            if not scheduled:
                folder = str(interrupted_path(settings.output_dir))
                ppo_state.save(trainer, folder, ppo_state.run_record(trainer, step, settings, facts, decoding, start, {}), None)
            say(f"stopped after step {step}; the same command with --resume_from_checkpoint=auto resumes from {folder}")
            break
    bar.close()
    leave_processes(accelerator)


if __name__ == "__main__":
    run_main(main)
