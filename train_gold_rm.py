"""Fit a Bradley-Terry reward model to preference pairs: LoRA and a scalar head on a small language model.

    python train_gold_rm.py --preferences preferences.jsonl.gz --output_dir outputs/gold_rm
    python train_gold_rm.py --preferences FILE --evaluate_only=true --output_dir assets/demo_gold_rm   # held-out accuracy alone

Each row of the preferences: {"instruction", "output_1", "output_2", "preference": 1 or 2}, and "generator_1", "generator_2" where
systems are held out. Prompts are held out whole, by a hash of their text. In most preference data the longer answer wins, and a
model trained on it as it is learns little else: training pairs are balanced so that the longer answer wins half of them, unless
--balanced=false. Pairs of one prompt are ranked together, so that an answer they share is read once and orders the answers that it
was not compared with; every ranking brings damaged texts, unless --damaged_texts=false: other prompts' answers, and a preferred answer
repeating itself or cut short.

The result is a PEFT adapter folder that `parts.gold_models.load_gold_reward_model` reads. After an interruption the same command resumes
from the last of its checkpoints, which are kept in `<output_dir>.unfinished` until the end; with other settings or preferences it is
refused, and so is a folder with another adapter (--overwrite=true starts again from nothing, or replaces it).
"""

from __future__ import annotations

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

import os
import random
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from parts.chat_templates import FOLDER
from parts.cli import Settings, found_path, parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import atomic_path, clear_leftovers, digest, file_digest, read_json, read_text, write_json
from parts.locks import hold
from parts.models import ModelFacts, adapter_base, check_model_name, check_whole_model, loading, model_identity
from parts.preferences import Pair, accuracies, by_prompt, encode_rankings, heldout_sample, read_pairs, select_pairs
from parts.processes import launched_processes
from parts.rows import is_heldout
from parts.runs import RECORD, Checkpoint, begin_training, provenance, resumable_training

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Settings that do not reach the weights, and names of what is known by its content.
HARMLESS = {"data_note", "output_dir", "heldout_pairs", "save_steps", "overwrite", "evaluate_only"}
HARMLESS |= {"preferences", "model_name", "start_from"}


@dataclass
class GoldTrainingSettings(Settings):
    preferences: str = setting("", "preference pairs: .json, .jsonl, or either gzipped", path=True)
    data_note: str = setting("not stated", "origin and licence of the preferences, for the card")
    output_dir: str = setting("outputs/gold_rm", "folder that receives the adapter and its card", written=True)
    model_name: str = setting("models/SmolLM2-135M-Instruct", "language model that the adapter and the head sit on", path=True)
    start_from: str = setting("", "reward adapter on the same model to continue, with its LoRA settings; empty means a new one", path=True)
    pairs: int = setting(5000, "most training pairs", least=1)
    epochs: int = setting(1, "times that training goes over the pairs", least=1)
    ranked_together: int = setting(6, "most pairs of one prompt that are ranked together, with three damaged texts", least=1)
    balanced: bool = setting(True, "the longer answer wins one half of the training pairs; false leaves length its natural share")
    damaged_texts: bool = setting(True, "rank damaged texts below the answers: other prompts' answers, repetition, cut answers")
    heldout_share: float = setting(0.15, "share of the prompts held out", above=0, most=1)
    heldout_systems: list[str] = setting([], "generators whose answers are never trained on")
    heldout_pairs: int = setting(
        400, "held-out pairs that the accuracy is measured on, and as many again of similar length or damaged", least=1
    )
    max_length: int = setting(448, "longest conversation in tokens; training leaves pairs with a longer one out", least=1)
    batch_size: int = setting(4, "rankings per optimiser step", least=1)
    forward_tokens: int = setting(4096, "most tokens in one forward pass, padding included; more keep a GPU busy", least=1)
    learning_rate: float = setting(3e-4, "peak learning rate, warmed up and decayed linearly", above=0)
    lora_r: int = setting(8, "LoRA rank", least=1)
    lora_layers: int = setting(
        12, "how many of the last transformer layers carry LoRA; the frozen ones below need no backward pass", least=1
    )
    bf16: bool = setting(True, "bf16 autocast")
    save_steps: int = setting(50, "optimiser steps between checkpoints to resume from", least=1)
    seed: int = setting(42, "seed of pair selection and training", least=0, most=2**32 - 1, expected="0 to 2**32 - 1")
    overwrite: bool = setting(False, "replace an adapter, or an unfinished training, that was made with other settings")
    evaluate_only: bool = setting(False, "measure the adapter in output_dir on the held-out pairs and print, nothing else")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate_only:
            self.output_dir = found_path(self.output_dir)
        elif launched_processes() > 1:
            raise InputError(f"{launched_processes()} processes were launched, expected one: the training is for one GPU")
        for name in ("lora_r", "lora_layers"):
            if self.start_from and getattr(self, name) != getattr(type(self), name):
                raise InputError(f"--{name} with --start_from, whose LoRA goes on as it is, expected one of the two")


def heldout_accuracies(settings: GoldTrainingSettings, pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """Accuracies of the saved adapter, on whole texts, scored through the same class that the gold stage uses."""
    from tqdm import tqdm

    from parts.gold_models import SequenceClassificationRMForInference
    from parts.gold_settings import GoldSettings

    gold = SequenceClassificationRMForInference(settings.output_dir, settings=GoldSettings(gold_dtype="float32"))
    texts = list(dict.fromkeys((pair.instruction, text) for pair in pairs for text in (pair.chosen, pair.rejected)))
    batch = {"query": [query for query, _ in texts], "response": [text for _, text in texts]}
    scores = {}
    with tqdm(total=len(texts), desc="held-out texts", unit="text") as bar:
        for rows, found in gold.iter_rewards(batch):
            scores |= {texts[row]: score for row, score in zip(rows, found)}
            bar.update(len(rows))
    margins = [scores[pair.instruction, pair.chosen] - scores[pair.instruction, pair.rejected] for pair in pairs]
    return accuracies(pairs, margins, settings.heldout_systems)


def load_framing_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A language model's tokenizer. One without a chat template gets alpaca's, with its own first and last token."""
    from transformers import AutoTokenizer

    with loading(name, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not tokenizer.chat_template:
        tokenizer.chat_template = "{{ bos_token }}" + read_text(FOLDER / "alpaca.jinja") + "{{ eos_token }}"
    return tokenizer


def reward_model(settings: GoldTrainingSettings) -> PeftModel:
    """The language model with a scalar head and LoRA, new or those of `start_from`. Raises InputError where it cannot be loaded."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    with loading(settings.model_name, "a language model"):
        dtype = "auto" if settings.bf16 else torch.float32
        safe = {"use_safetensors": True, "trust_remote_code": False}  # as it will be loaded to score
        model = AutoModelForSequenceClassification.from_pretrained(settings.model_name, num_labels=1, dtype=dtype, **safe)
    if settings.start_from:
        return _in_fp32(PeftModel.from_pretrained(model, settings.start_from, is_trainable=True))
    layers = model.config.num_hidden_layers
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        target_modules=linear_modules(model.base_model),
        layers_to_transform=list(range(max(0, layers - settings.lora_layers), layers)),
        modules_to_save=["score"],
    )
    with loading(settings.model_name, "a language model to put LoRA on"):
        return _in_fp32(get_peft_model(model, lora))


def linear_modules(backbone: nn.Module) -> list[str]:
    """The last names of a model's linear layers, whatever its family calls them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return sorted({name.rpartition(".")[2] for name, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)})


def _in_fp32(model: PeftModel) -> PeftModel:
    """Whatever is trained, in fp32: PEFT leaves the head in the model's own precision, where small steps round away."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return model


def training_rankings(settings: GoldTrainingSettings, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """A choice of `pairs`, each prompt's ranked together, as token ids in random order.

    Raises:
        InputError: no pair fits `max_length`, or none of one half of the balance.
    """
    from parts.conversations import encode_conversation

    rng = random.Random(settings.seed)

    @cache
    def encode(instruction: str, text: str) -> list[int]:
        return encode_conversation(tokenizer, instruction, text, sys.maxsize)  # whole: what is too long is left out, not cut

    unfit = {"longer than max_length": 0, "of equal answers": 0}

    def fits(pair: Pair) -> bool:
        lengths = [len(encode(pair.instruction, text)) for text in (pair.chosen, pair.rejected)]
        unfit["of equal answers"] += pair.chosen == pair.rejected
        unfit["longer than max_length"] += max(lengths) > settings.max_length
        return max(lengths) <= settings.max_length and pair.chosen != pair.rejected

    selected = select_pairs(pairs, settings.pairs, fits, rng, settings.balanced)
    if not selected:
        wanted = " in which now the longer, now the shorter wins" if settings.balanced else ""
        raise InputError(f"{settings.preferences}: no pairs within {settings.max_length} tokens{wanted}")
    groups = by_prompt(selected, settings.ranked_together)
    rng.shuffle(groups)
    longer = sum(pair.longer_wins for pair in pairs)
    balance = ", of which as many each are taken" if settings.balanced else ""
    print(
        f"{len(selected)} training pairs in {len(groups)} rankings, of {len(pairs)} on prompts to train on: the longer answer wins {longer} and "
        f"the shorter {len(pairs) - longer}{balance}, {settings.pairs} at most"
        + "".join(f"; {count} left out, {what}" for what, count in unfit.items() if count)
    )
    return encode_rankings(groups, encode, rng, settings.damaged_texts)


def training_fingerprint(settings: GoldTrainingSettings) -> str:
    """What a training depends on: the settings that reach its weights, and the contents of its files."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in HARMLESS}
    models = [model_identity(name) for name in (settings.model_name, settings.start_from) if name]
    return digest([chosen, models, file_digest(settings.preferences)])


def train(settings: GoldTrainingSettings, pairs: list[Pair], fingerprint: str, resumed: Path | None) -> None:
    """Train on a choice of `pairs`, from the checkpoint `resumed` on where there is one, and write the adapter to `settings.output_dir`."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, TrainingArguments, set_seed

    from parts.bradley_terry import BradleyTerryTrainer, RankingCollator

    set_seed(settings.seed)
    tokenizer = load_framing_tokenizer(settings.model_name)
    rankings = training_rankings(settings, pairs, tokenizer)
    with loading(settings.model_name, "a language model"):
        config = AutoConfig.from_pretrained(settings.model_name, trust_remote_code=False).get_text_config()
    facts = ModelFacts(settings.model_name, getattr(config, "max_position_embeddings", None), config.vocab_size, None)
    facts.require_fit([ids[: settings.max_length] for ranking in rankings for ids in ranking["sequences"]], settings.max_length)
    model = reward_model(settings)
    unfinished = Path(f"{settings.output_dir}.unfinished")
    arguments = TrainingArguments(
        output_dir=str(unfinished),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=20,
        weight_decay=0.01,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_steps=10,
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process trains on one GPU: the Trainer would spread its batches over all it sees
    trainer = BradleyTerryTrainer(
        forward_tokens=settings.forward_tokens,
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rankings),
        data_collator=RankingCollator(settings.max_length),
    )
    begin_training(unfinished, fingerprint, resumed)
    if resumed:
        print(f"resumes from {resumed}")
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    with atomic_path(settings.output_dir) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


CARD = """# Reward model: LoRA and a scalar head on {settings.model_name}

Trained by `train_gold_rm.py` with the Bradley-Terry loss; `parts.gold_models.load_gold_reward_model` reads this folder.
Settings, seed, commit and package versions, also of the adapter it continues: `training_record.json`.

**Data and licence.** {note}

**Command.** `{command}`

**Training pairs.** Up to {settings.pairs}, {settings.epochs} times over, of conversations within {settings.max_length} tokens{share}. Up to
{settings.ranked_together} pairs of a prompt are ranked together{damaged}. Systems never trained on: {systems}.

**Held-out accuracy** (prompts that training never saw, whole texts; a pair counts as right when the preferred answer scores higher; beside
it, what "the longer answer wins" gets right):

| pairs | accuracy | the longer wins | n |
|---|---|---|---|
{rows}
"""


def write_card(settings: GoldTrainingSettings, measured: dict[str, dict[str, float]]) -> None:
    """Write the model card, in place of the empty form that PEFT leaves."""
    rows = "\n".join(f"| {name} | {row['accuracy']:.3f} | {row['longer_wins']:.3f} | {row['n']} |" for name, row in measured.items())
    share = ": one half with the longer answer preferred, the other with the shorter" if settings.balanced else ", as they come"
    damaged = ", with two other prompts' answers below all of them, and a preferred answer above itself repeated or cut short"
    card = CARD.format(
        settings=settings,
        share=share,
        damaged=damaged if settings.damaged_texts else ", without damaged texts",
        command=shlex.join(["python", *sys.argv]),
        note=settings.data_note,
        systems=", ".join(settings.heldout_systems) or "none",
        rows=rows,
    )
    with atomic_path(Path(settings.output_dir) / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def earlier_training(settings: GoldTrainingSettings) -> dict:
    """The record of the adapter to continue. Raises InputError for another base model, or prompts or systems held out otherwise."""
    folder = Path(settings.start_from)
    base = adapter_base(folder)
    if Path(base).resolve() != Path(settings.model_name).resolve():
        raise InputError(f"--start_from: {folder} sits on {base}, expected {settings.model_name}")
    record = read_json(folder / RECORD)
    trained = Checkpoint(folder).trained
    for name in ("heldout_share", "heldout_systems"):
        # What was trained on then cannot be held out now.
        if trained.get(name) != getattr(settings, name):
            raise InputError(f"--start_from: {folder} was trained with {name} {trained.get(name)}, expected the same as now")
    return record


def require_unseen(settings: GoldTrainingSettings) -> None:
    """Raises InputError where the adapter to measure, by its record, was trained on prompts or systems that are to be held out now.

    Nothing is known of preferences that it was not trained on; those of a record without a digest count as the same.
    """
    folder, own = settings.output_dir, file_digest(settings.preferences)
    record = Checkpoint(Path(folder)).record
    while record:  # its own, and those of the adapters that it went on from
        trained = record.get("settings") or {}
        if dict(record.get("data") or {}).get("preferences", own) == own:
            if (share := trained.get("heldout_share", 1)) < settings.heldout_share:
                raise InputError(f"--heldout_share is {settings.heldout_share}, expected {share} at most, with which {folder} was trained")
            if "heldout_systems" in trained and (seen := sorted(set(settings.heldout_systems) - set(trained["heldout_systems"]))):
                raise InputError(f"--heldout_systems holds {seen[0]!r}, which {folder} did not hold out, expected some that it did")
        record = record.get("start_from")


def split_pairs(settings: GoldTrainingSettings, pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, without those of held-out systems, and pairs of held-out prompts.

    Raises:
        InputError: an unknown system, or nothing to train on or to hold out.
    """
    known = {system for pair in pairs for system in pair.systems}
    for system in settings.heldout_systems:
        if system not in known:
            raise InputError(f"--heldout_systems: no row of {settings.preferences} has the generator {system!r}")
    heldout = [pair for pair in pairs if is_heldout(pair.instruction, settings.heldout_share)]
    rest = [pair for pair in pairs if not is_heldout(pair.instruction, settings.heldout_share)]
    training = [pair for pair in rest if not set(pair.systems) & set(settings.heldout_systems)]
    if not heldout or not (training or settings.evaluate_only):
        raise InputError(f"{settings.preferences}: no prompts left to train on or to hold out, expected more prompts")
    of_systems = f", {len(rest) - len(training)} of held-out systems" if len(rest) > len(training) else ""
    print(f"{settings.preferences}: {len(pairs)} pairs, {len(heldout)} on held-out prompts{of_systems}, {len(training)} to train on")
    return training, heldout


def is_done(settings: GoldTrainingSettings, fingerprint: str) -> bool:
    """Lock the folder of the adapter, and say whether this training's is there already.

    Raises:
        InputError: something else is there, or an adapter made otherwise that is not to be replaced, or another process writes it.
    """
    output = Path(settings.output_dir)
    hold(output)
    clear_leftovers(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    is_whole = "heldout" in Checkpoint(output).record  # which is written last
    if not is_whole and not Path(f"{output}.unfinished").is_dir():
        raise InputError(f"--output_dir: {output} is there and is no gold model, expected another place")
    if settings.overwrite or not is_whole:
        return False
    if Checkpoint(output).record.get("fingerprint") != fingerprint:
        raise InputError(f"{output}: exists already, made otherwise (--overwrite=true replaces it)")
    print(f"{output}: is there already, made as it would be now")
    return True


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(GoldTrainingSettings, description=__doc__)

    # 1. Data, and everything a user can get wrong, before any model loads.
    pairs = read_pairs(settings.preferences)
    if settings.evaluate_only:
        check_model_name(settings.output_dir)
        require_unseen(settings)
    else:
        check_whole_model(settings.model_name, "--model_name")
    earlier = earlier_training(settings) if settings.start_from else None
    training, heldout = split_pairs(settings, pairs)
    resumed, fingerprint = None, ""
    if not settings.evaluate_only:
        fingerprint = training_fingerprint(settings)
        if is_done(settings, fingerprint):
            return
        resumed = resumable_training(Path(f"{settings.output_dir}.unfinished"), fingerprint, settings.overwrite)
    dtype = "bf16 autocast" if settings.bf16 else "float32"
    data = {"preferences": file_digest(settings.preferences)}
    record = provenance(
        settings=asdict(settings), seed=settings.seed, dtype=dtype, model=settings.model_name, start_from=earlier, data=data
    )

    # 2. Training.
    if not settings.evaluate_only:
        train(settings, training, fingerprint, resumed)

    # 3. Accuracy on prompts that training never saw.
    measured = heldout_accuracies(settings, heldout_sample(heldout, settings.heldout_pairs))
    for name, row in measured.items():
        print(f"{name:36} {row['accuracy']:.3f}  (the longer wins: {row['longer_wins']:.3f}; n={row['n']})")

    # 4. Record and card.
    if not settings.evaluate_only:
        write_card(settings, measured)
        write_json(Path(settings.output_dir) / RECORD, {**record, "fingerprint": fingerprint, "heldout": measured})
        shutil.rmtree(f"{settings.output_dir}.unfinished")


if __name__ == "__main__":
    run_main(main)
