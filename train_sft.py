"""Supervised fine-tuning: a backbone for PPO from any causal language model and rows {input, output}.

    python train_sft.py --model_name=$MODEL_NAME --dataset_path=data/sft_rows.json --output_dir=outputs/sft
    accelerate launch --num_processes 8 --config_file configs/zero2-bf16.yaml train_sft.py ...     # GPUs, DeepSpeed ZeRO-2
    accelerate launch --config_file configs/zero2-bf16-cpu.yaml train_sft.py ...                   # two processes on a CPU

The adapter of the demo's backbone, whose answers are short (some minutes on a CPU with bf16 instructions; assets/demo_backbone is one):

    python train_sft.py --config configs/demo_sft.yaml

Each row is a prompt in the template and its answer, which ends with the tokenizer's end of sequence. The loss is the mean cross-entropy
over the answers' tokens; the prompts' tokens are read and not learnt. LoRA on all linear layers is trained and then added to the weights
(--merge=false keeps it alone); with --lora_r=0 all weights are trained.

--answer_words=N: of each answer only the first whole sentences are learnt, as many as fit into N words. Rows whose first sentence is
longer are left out. A model that learns them ends its answers after a sentence or two: PPO on it is quick, and answers have room to grow.

The result is a model folder that every stage takes as --model_name: weights, tokenizer, card, and training_record.json. Interrupted, the same
command resumes from the last of its checkpoints, kept in <output_dir>.unfinished until the end.
"""

from __future__ import annotations

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

import math
import os
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parts.cli import Settings, parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import atomic_path, clear_leftovers, digest, file_digest, read_json, write_json
from parts.locks import hold
from parts.models import check_whole_model, load_causal_lm, loading, model_identity, read_facts, use_cache
from parts.processes import is_first_process, launch_facts
from parts.runs import ADAPTER, ADAPTER_WEIGHTS, RECORD, begin_training, provenance, resumable_training
from parts.sft_data import NOT_LEARNT, ByLength, collate, read_examples, split
from parts.weight_samples import weight_sample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments


# Settings that do not reach the weights: a begun training resumes with other ones.
HARMLESS = {"cache_dir", "data_note", "output_dir", "overwrite", "save_steps"}


@dataclass
class SFTSettings(Settings):
    model_name: str = setting(
        "", "causal LM to train: hub name or folder, no adapter", path=True, required=True, expected="a hub name or a folder"
    )
    chat_template_name: str = setting("alpaca", "a template of configs/chat_templates, or 'tokenizer' for the tokenizer's own")
    cache_dir: str = setting("", "where hub downloads are kept; empty means the default cache", written=True)

    dataset_path: str = setting("data/train.json", "training rows {input, output}: .json, .jsonl, or either gzipped", path=True)
    heldout_path: str = setting("", "rows of the same form to measure the loss on; empty means a share of the training rows", path=True)
    heldout_share: float = setting(
        0.05, "share of the training prompts that is held out, where heldout_path is empty", above=0, expected="more than 0 and less than 1"
    )
    data_note: str = setting("not stated", "origin and licence of the rows, for the card")
    output_dir: str = setting("outputs/sft", "folder that receives the model", written=True)
    overwrite: bool = setting(False, "replace what is at output_dir, and a begun training with other settings")

    answer_words: int = setting(
        0,
        "learn only the first whole sentences of an answer, this many words at most; 0 means whole answers",
        least=0,
        expected="0 or more",
    )
    empty_outputs: str = setting(
        "error", "what to do with rows whose output is empty: 'error' or 'drop'", choices=("error", "drop"), expected="'error' or 'drop'"
    )
    max_length: int = setting(512, "longest prompt and answer together in tokens; longer rows are left out", least=1)

    epochs: float = setting(3.0, "passes over the rows", above=0)
    batch_size: int = setting(16, "rows per forward and backward pass and process", least=1)
    gradient_accumulation_steps: int = setting(1, "batches per optimiser step; wins over the launch file's", least=1)
    learning_rate: float = setting(
        0.0, "peak learning rate, warmed up and decayed by a cosine; 0 means 2e-4 with LoRA, 2e-5 without", least=0, expected="0 or more"
    )
    warmup_ratio: float = setting(0.03, "share of the steps that warm up")
    weight_decay: float = setting(0.0, "AdamW's weight decay", least=0, expected="0 or more")
    bf16: bool = setting(
        True, "bf16 arithmetic; weights that are trained stay in fp32. Not for DeepSpeed, whose launch file sets its own precision"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass, to save memory")
    save_steps: int = setting(
        200, "optimiser steps between checkpoints to resume from; a multiple of 10 keeps the logged losses the same", least=1
    )
    seed: int = setting(42, "seed of initialisation and data order", least=0, most=2**32 - 1, expected="0 to 2**32 - 1")

    lora_r: int = setting(8, "LoRA rank, on all linear layers; 0 means that all weights are trained", least=0, expected="0 or more")
    lora_alpha: int = setting(16, "LoRA scale is lora_alpha / lora_r", least=1)
    lora_dropout: float = setting(0.0, "LoRA dropout")
    merge: bool = setting(
        True,
        "add LoRA to the base model's weights; false keeps the adapter alone, rounded to bf16 after bf16 training, for merge_adapter.py",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup_ratio", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected 0 or more and less than 1")
        if self.heldout_share >= 1:
            raise InputError(f"--heldout_share is {self.heldout_share}, expected more than 0 and less than 1")
        if not self.merge and not self.lora_r:
            raise InputError("--merge is false and --lora_r is 0, expected LoRA to keep alone")
        self.learning_rate = self.learning_rate or (2e-4 if self.lora_r else 2e-5)


# ------------------------------------------------------------------------------------------------------------------- data


def check_base_model(settings: SFTSettings) -> None:
    """Raise InputError where no whole model can be loaded, or where it would be overwritten."""
    check_whole_model(settings.model_name, "--model_name")
    if Path(settings.model_name).resolve() == Path(settings.output_dir).resolve():
        raise InputError(f"--output_dir: {settings.output_dir} is the model to train, expected another folder")


# --------------------------------------------------------------------------------------------------------------- training


def training_arguments(settings: SFTSettings, unfinished: Path) -> TrainingArguments:
    """The Trainer's arguments. Making them joins the processes of `accelerate launch`.

    Raises:
        RuntimeError: the launch environment promises more processes than came together.
    """
    import torch
    from transformers import TrainingArguments

    # DeepSpeed's values, where the launch file has them, would win over the flags, and over the clipping that all other launches do.
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(settings.gradient_accumulation_steps)
    os.environ["ACCELERATE_GRADIENT_CLIPPING"] = "1.0"
    # On a CPU, processes find each other only with a named backend, and DeepSpeed is dropped where the Trainer is told of the CPU.
    no_gpu = not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    arguments = TrainingArguments(
        output_dir=str(unfinished),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        bf16=settings.bf16 and not deepspeed,
        use_cpu=no_gpu and not deepspeed,
        ddp_backend="gloo" if no_gpu and "WORLD_SIZE" in os.environ else None,
        activation_checkpointing=settings.gradient_checkpointing,
        remove_unused_columns=False,
        dataloader_pin_memory=not no_gpu,
        logging_steps=10,
        eval_strategy="epoch",
        eval_on_start=True,
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
    )
    if deepspeed:  # said only now: the Trainer takes bf16 for a matter of GPUs, and compares its own word with DeepSpeed's
        arguments.bf16 = arguments.mixed_precision == "bf16"
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process trains on one GPU: the Trainer would spread its batches over all it sees
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != launched:
        raise RuntimeError(f"{arguments.world_size} processes came together, expected {launched} as launched")
    return arguments


def load_model(settings: SFTSettings, mixed_precision: str) -> PreTrainedModel:
    """The model to train. What is trained is in fp32, except under DeepSpeed, which keeps fp32 copies of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    half = mixed_precision == "bf16" and (deepspeed or settings.lora_r > 0)
    dtype = torch.bfloat16 if half else torch.float32
    # On a CPU, the backward pass of PyTorch's fused attention takes a quarter of a step in bf16.
    attention = "eager" if mixed_precision == "bf16" and not torch.cuda.is_available() else None
    model = load_causal_lm(settings.model_name, dtype, settings.cache_dir or None, attn_implementation=attention)
    model.config.use_cache = False
    if not settings.lora_r:
        return model
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    set_seed(settings.seed)  # the same new weights in every process
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, target_modules="all-linear"
    )  # fmt: skip
    return get_peft_model(model, lora)


def make_trainer(
    settings: SFTSettings, model: PreTrainedModel, arguments: TrainingArguments, pad: int, training: list[dict], heldout: list[dict]
) -> Trainer:
    """transformers' Trainer with the loss on answers alone; no row without a loss goes through the output head."""
    import torch
    from peft.helpers import disable_input_dtype_casting
    from tqdm import tqdm
    from transformers import PrinterCallback, Trainer, TrainerCallback

    head = model.get_output_embeddings()

    def answer_losses(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The cross-entropy of each learnt token, [tokens], and its row in the batch."""
        following = inputs["labels"][:, 1:]
        learnt = following != NOT_LEARNT
        hook = head.register_forward_pre_hook(lambda module, states: (states[0][:, :-1][learnt],))
        try:
            with disable_input_dtype_casting(model, active=arguments.bf16):  # to LoRA's fp32, from where autocast takes it back
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        finally:
            hook.remove()
        return torch.nn.functional.cross_entropy(logits.float(), following[learnt], reduction="none"), learnt.nonzero()[:, 0]

    class AnswerTrainer(Trainer):
        loss_is_scaled_for_ga = True

        def _get_train_sampler(self, train_dataset: list[dict] | None = None) -> ByLength:
            return ByLength([len(row["input_ids"]) for row in training], settings.batch_size * arguments.world_size, settings.seed)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            losses, _ = answer_losses(model, inputs)
            # Divided by the tokens of all processes and accumulated batches; processes are averaged afterwards.
            loss = losses.sum() / num_items_in_batch * arguments.world_size
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {self.state.global_step}")
            return (loss, None) if return_outputs else loss

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            with torch.no_grad():
                inputs = self._prepare_inputs(inputs)
                losses, rows = answer_losses(model, inputs)
                sums = torch.zeros(len(inputs["labels"]), 2, device=losses.device)
                sums.index_add_(0, rows, torch.stack([losses, torch.ones_like(losses)], dim=1))
            return None, sums, sums

    def heldout_loss(prediction) -> dict[str, float]:
        total, tokens = prediction.predictions.sum(axis=0, dtype="float64")
        if not math.isfinite(total):
            raise FloatingPointError(f"the held-out loss is {total}")
        return {"loss": total / tokens}

    class Progress(TrainerCallback):
        """One bar with rate, time left and the last loss; a line for each held-out loss."""

        def on_train_begin(self, args, state, control, **kwargs):
            hidden = not state.is_world_process_zero
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="SFT", unit="step", disable=hidden)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
            elif "eval_loss" in logs and state.is_world_process_zero:
                tqdm.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f}")

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset=heldout,
        data_collator=lambda rows: collate(rows, pad),
        compute_metrics=heldout_loss,
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = True  # it counts the learnt tokens of a step for us
    return trainer


# ----------------------------------------------------------------------------------------------------------------- output

CARD = """# {settings.model_name}, fine-tuned on answers

Trained by `train_sft.py` of this project: {use} as
`--model_name`, with `--chat_template_name={settings.chat_template_name}`. Settings, seed, commit and package versions: `training_record.json`.

**Data and licence.** {settings.dataset_path}: {note}. The base model's licence applies too.

**Command.** `{command}`

**Training.** {rows} rows, {settings.epochs:g} epochs, {steps} steps, loss on answers only{words}; {method}.

**Held-out loss** (nats per answer token, {heldout_rows} rows): {before:.3f} before, {after:.3f} after.
"""


def card(settings: SFTSettings, facts: dict) -> str:
    """The model card."""
    words = f", of which the first whole sentences are learnt, {settings.answer_words} words at most" if settings.answer_words else ""
    lora = f"LoRA of rank {settings.lora_r} on all linear layers"
    method = (f"{lora}, added to the weights" if settings.merge else lora) if settings.lora_r else "all weights"
    whole, alone = (
        "`AutoModelForCausalLM.from_pretrained` reads this folder",
        "an adapter, of which `merge_adapter.py` makes a model folder",
    )
    use = f"{whole}, and every stage takes it" if settings.merge else f"{alone} that every stage takes"
    command = shlex.join(["python", *sys.argv])
    return CARD.format(settings=settings, use=use, note=settings.data_note, command=command, words=words, method=method, **facts)


def write_model(trained: Path, settings: SFTSettings, tokenizer: PreTrainedTokenizerBase, record: dict, text: str) -> None:
    """Write the model folder, LoRA added to the base model's own weights, in the base model's own precision."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    base = AutoConfig.from_pretrained(settings.model_name, cache_dir=settings.cache_dir or None, trust_remote_code=False)
    dtype = base.dtype or torch.float32
    if settings.lora_r:
        model = load_causal_lm(settings.model_name, dtype, settings.cache_dir or None)
        model = PeftModel.from_pretrained(model, trained).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=dtype, trust_remote_code=False)
        model.config.use_cache = base.use_cache
    with atomic_path(settings.output_dir) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _describe(temporary, record, text)


def write_adapter(trained: Path, settings: SFTSettings, record: dict, text: str) -> None:
    """Write the adapter's folder, LoRA alone, in bf16 after bf16 training."""
    from safetensors.torch import load_file, save_file

    matrices = load_file(trained / ADAPTER_WEIGHTS)
    if record["dtype"] == "bf16":
        matrices = {name: matrix.bfloat16() for name, matrix in matrices.items()}
    with atomic_path(settings.output_dir) as temporary:
        temporary.mkdir()
        shutil.copy(trained / ADAPTER, temporary)
        save_file(matrices, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _describe(temporary, record, text)


def _describe(folder: Path, record: dict, text: str) -> None:
    """Write a folder's record and its card."""
    write_json(folder / RECORD, record)
    (folder / "README.md").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(SFTSettings, description=__doc__)
    use_cache(settings.cache_dir)

    # 1. Everything a user can get wrong, before the model loads.
    check_base_model(settings)
    from transformers import AutoTokenizer

    from parts.chat_templates import load_template, template_digest

    with loading(settings.model_name, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(settings.model_name, cache_dir=settings.cache_dir or None, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{settings.model_name}: its tokenizer has no end of sequence, expected one that ends the answers")
    template = load_template(settings.chat_template_name, tokenizer)
    training = read_examples(settings.dataset_path, settings, tokenizer, template, [settings.heldout_path] if settings.heldout_path else [])
    if settings.heldout_path:
        heldout = read_examples(settings.heldout_path, settings, tokenizer, template)
    else:
        training, heldout = split(training, settings.heldout_share)
    if not training or not heldout:
        raise InputError(f"{settings.dataset_path}: no rows left to train on or to hold out, expected more rows or --heldout_path")

    facts = read_facts(settings.model_name, tokenizer, settings.cache_dir or None)
    facts.require_fit([row["input_ids"] for row in (*training, *heldout)], settings.max_length)
    hold(settings.output_dir)
    if is_first_process():
        clear_leftovers(settings.output_dir)

    # 2. A model that is there already is either what this call would make, or in its way.
    files = {name: file_digest(path) for name in ("dataset_path", "heldout_path") if (path := getattr(settings, name))}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = {name: value for name, value in asdict(settings).items() if name not in HARMLESS | {"model_name", *files}}
    launch = [processes, launch_facts()]
    fingerprint = digest([chosen, model_identity(settings.model_name), template_digest(template), files, launch])
    base = {} if settings.merge else {"base_sample": weight_sample(settings.model_name)}  # an adapter's record says what it is for
    output, unfinished = Path(settings.output_dir), Path(f"{settings.output_dir}.unfinished")
    if output.exists():
        made = read_json(output / RECORD).get("fingerprint") if (output / RECORD).is_file() else None
        if made is None and not (output.is_dir() and not any(output.iterdir())):
            raise InputError(f"--output_dir: {output} is there and is no model of this command, expected another place")
        if made == fingerprint and not settings.overwrite:
            print(f"{output}: is there already, made as it would be now")
            return
        if made is not None and not settings.overwrite:
            raise InputError(f"{output}: exists already, made otherwise (--overwrite=true replaces it)")
    checkpoint = resumable_training(unfinished, fingerprint, settings.overwrite)

    # 3. The processes, the model, the Trainer.
    arguments = training_arguments(settings, unfinished)
    is_main = arguments.process_index == 0
    resumed = str(checkpoint) if checkpoint else None
    arguments.eval_on_start = resumed is None
    trainer = make_trainer(settings, load_model(settings, arguments.mixed_precision), arguments, tokenizer.eos_token_id, training, heldout)
    if is_main:
        begin_training(unfinished, fingerprint, checkpoint)
        learnt = sum(label != NOT_LEARNT for row in training for label in row["labels"])
        print(f"{len(training)} rows to learn from, {learnt} answer tokens; {len(heldout)} rows held out")
        print(f"resumes from {resumed}" if resumed else f"checkpoints: {unfinished}")
    trainer.accelerator.wait_for_everyone()

    # 4. Training; the Trainer's bar shows the rate and the time left.
    trainer.train(resume_from_checkpoint=resumed)
    if not any("eval_loss" in row and row["step"] == trainer.state.global_step for row in trainer.state.log_history):
        trainer.evaluate()  # the run was killed between its last checkpoint, which resumes, and this measurement
    trained = unfinished / "trained"
    trainer.save_model(str(trained))

    # 5. The model folder, its record and its card, by one process.
    if is_main:
        history = trainer.state.log_history
        losses = [row["eval_loss"] for row in history if "eval_loss" in row]
        facts = {
            "rows": len(training),
            "steps": trainer.state.global_step,
            "heldout_rows": len(heldout),
            "before": losses[0],
            "after": losses[-1],
        }
        record = provenance(
            seed=settings.seed,
            dtype=arguments.mixed_precision if arguments.mixed_precision != "no" else "float32",
            model=settings.model_name,
            template=settings.chat_template_name,
            processes=processes,
            data=files,
            fingerprint=fingerprint,
            **base,
            **facts,
            history=history,
            settings=asdict(settings),
        )
        if settings.merge:
            write_model(trained, settings, tokenizer, record, card(settings, facts))
        else:
            write_adapter(trained, settings, record, card(settings, facts))
        shutil.rmtree(unfinished)
        print(f"held-out loss {losses[0]:.3f} before, {losses[-1]:.3f} after {facts['steps']} steps: {output}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
