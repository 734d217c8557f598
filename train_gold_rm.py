"""Fit a Bradley-Terry reward model to preference pairs: LoRA and a scalar head on a small language model.

    python train_gold_rm.py --preferences preferences.jsonl.gz --output_dir outputs/gold_rm
    python train_gold_rm.py --preferences FILE --evaluate_only=true --output_dir assets/demo_gold_rm   # held-out accuracy alone

Each row of the preferences: {"instruction", "output_1", "output_2", "preference": 1 or 2}. Prompts are held out whole, by a hash
of their text. In most preference data the longer answer wins, and a model trained on it as it is learns little else: training
pairs are therefore balanced so that the longer answer wins half of them, and part of the pairs set the preferred answer
against a damaged text (another prompt's answer, a repetition, a cut).

The result is a PEFT adapter folder that `gold_models.load_gold_reward_model` reads. Interrupted, the same command goes on from
the last of its checkpoints, kept in `<output_dir>.unfinished` until the end.
"""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from records import InputError, atomic_path, provenance, read_rows, run_main, write_json
from settings import parse_settings, setting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

DAMAGES = ("another prompt's answer", "repetition", "cut")


@dataclass
class GoldTrainingSettings:
    preferences: str = setting("", "preference pairs: .json, .jsonl, or either gzipped")
    data_note: str = setting("not stated", "origin and licence of the preferences, for the card")
    output_dir: str = setting("outputs/gold_rm", "folder that receives the adapter and its card")
    model_name: str = setting("models/SmolLM2-135M-Instruct", "language model that the adapter and the head sit on")
    pairs: int = setting(3000, "training pairs (one epoch)")
    damaged_share: float = setting(0.25, "share of the training pairs whose worse answer is a damaged text")
    heldout_share: float = setting(0.15, "share of the prompts held out")
    heldout_pairs: int = setting(600, "held-out pairs that the accuracy is measured on")
    max_length: int = setting(320, "longest conversation in tokens, truncated on the left")
    batch_size: int = setting(8, "pairs per optimiser step")
    learning_rate: float = setting(3e-4, "peak learning rate, warmed up and decayed linearly")
    lora_r: int = setting(8, "LoRA rank")
    lora_layers: int = setting(10, "how many of the last transformer layers carry LoRA; the frozen ones below need no backward pass")
    bf16: bool = setting(True, "bf16 autocast")
    save_steps: int = setting(50, "optimiser steps between checkpoints to resume from")
    seed: int = setting(42, "seed of pair selection and training")
    evaluate_only: bool = setting(False, "measure the adapter in output_dir on the held-out pairs and print, nothing else")


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer; `kind` is "preference" or the damage done to the worse one."""

    instruction: str
    chosen: str
    rejected: str
    kind: str = "preference"

    @property
    def longer_wins(self) -> bool:
        return len(self.chosen) > len(self.rejected)

    @property
    def similar_length(self) -> bool:
        """Whether the lengths in characters are within 25% of the longer one."""
        shorter, longer = sorted((len(self.chosen), len(self.rejected)))
        return shorter >= 0.75 * longer


def read_pairs(path: str) -> list[Pair]:
    """Preference pairs of a file. Raises InputError naming the row whose preference is not 1 or 2."""
    pairs = []
    for number, row in enumerate(read_rows(path, {"instruction": None, "output_1": None, "output_2": None}), start=1):
        if row.get("preference") not in (1, 2):
            raise InputError(f"{path}: row {number}: field 'preference' is {row.get('preference')!r}, expected 1 or 2")
        answers = (row["output_1"], row["output_2"])
        chosen = answers[row["preference"] - 1]
        pairs.append(Pair(row["instruction"], chosen, answers[2 - row["preference"]]))
    return pairs


def is_heldout(instruction: str, share: float) -> bool:
    """Whether a prompt is held out: decided by a hash of its text, so that it never depends on seed or file order."""
    digest = hashlib.sha256(instruction.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def damage(pair: Pair, other_answer: str, kind: str, rng: random.Random) -> Pair:
    """`pair` with its worse answer replaced by a damaged text."""
    if kind == "another prompt's answer":
        rejected = other_answer
    else:
        words = pair.chosen.split(" ")
        kept = words[: max(1, int(len(words) * rng.uniform(0.2, 0.6)))]
        rejected = " ".join(kept)
        if kind == "repetition":
            phrase = " ".join(kept[-rng.randint(3, 25) :])
            while len(rejected) < len(pair.chosen):
                rejected += " " + phrase
    return Pair(pair.instruction, pair.chosen, rejected, kind)


def select_pairs(pairs: list[Pair], count: int, damaged_share: float, rng: random.Random) -> list[Pair]:
    """`count` training pairs: half of the preferences with the longer answer winning, and `damaged_share` of damaged ones."""
    pairs = rng.sample(pairs, len(pairs))
    damaged_count = round(count * damaged_share)
    long_wins, short_wins = [pair for pair in pairs if pair.longer_wins], [pair for pair in pairs if not pair.longer_wins]
    each = min((count - damaged_count) // 2, len(long_wins), len(short_wins))
    balanced = long_wins[:each] + short_wins[:each]
    return balanced + damaged_pairs(pairs[:damaged_count], rng)


def damaged_pairs(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    """Every pair damaged, the kinds of damage in turn; the foreign answer comes from the next pair of another prompt."""
    result = []
    for number, pair in enumerate(pairs):
        others = (pairs[(number + step) % len(pairs)] for step in range(1, len(pairs)))
        other = next((other.chosen for other in others if other.instruction != pair.instruction), None)
        kind = DAMAGES[number % len(DAMAGES)] if other is not None else "cut"
        damaged = damage(pair, other or "", kind, rng)
        if damaged.rejected != damaged.chosen:
            result.append(damaged)
    return result


def encode_pairs(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Token ids of both conversations of each pair; "length" is what batches are grouped by."""
    from gold_models import encode_conversation

    encoded = []
    for pair in pairs:
        chosen = encode_conversation(tokenizer, pair.instruction, pair.chosen, max_length)
        rejected = encode_conversation(tokenizer, pair.instruction, pair.rejected, max_length)
        encoded.append({"chosen": chosen, "rejected": rejected, "length": max(len(chosen), len(rejected))})
    return encoded


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected) over [pairs] scores (Bradley and Terry, 1952)."""
    import torch

    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def accuracies(pairs: list[Pair], margins: list[float]) -> dict[str, dict[str, float]]:
    """Share of positive margins with its n: all preferences, those of similar length, by whether the longer wins, each damage."""
    preferences = [(pair, margin) for pair, margin in zip(pairs, margins) if pair.kind == "preference"]
    groups = {
        "all preferences": preferences,
        "lengths within 25%": [row for row in preferences if row[0].similar_length],
        "longer answer preferred": [row for row in preferences if row[0].longer_wins],
        "shorter answer preferred": [row for row in preferences if not row[0].longer_wins],
    }
    for kind in DAMAGES:
        groups[f"against {kind}"] = [row for row in zip(pairs, margins) if row[0].kind == kind]
    return {name: {"accuracy": sum(margin > 0 for _, margin in rows) / len(rows), "n": len(rows)} for name, rows in groups.items() if rows}


def heldout_accuracies(adapter: str, pairs: list[Pair], max_length: int, batch_size: int) -> dict[str, dict[str, float]]:
    """Accuracies of a saved adapter, scored through the same class that the gold stage uses."""
    from tqdm import tqdm

    from gold_models import SequenceClassificationRMForInference

    gold = SequenceClassificationRMForInference(adapter, batch_size=batch_size, max_length=max_length)
    margins = []
    for start in tqdm(range(0, len(pairs), 50), desc="held-out pairs", unit="batch"):
        rows = pairs[start : start + 50]
        queries, both = [row.instruction for row in rows] * 2, [row.chosen for row in rows] + [row.rejected for row in rows]
        scores = gold.get_reward({"query": queries, "response": both})
        margins += [chosen - rejected for chosen, rejected in zip(scores[: len(rows)], scores[len(rows) :])]
    return accuracies(pairs, margins)


def train(settings: GoldTrainingSettings, pairs: list[Pair]) -> None:
    """Train on `pairs` and write the adapter to `settings.output_dir`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model_name)
    model = AutoModelForSequenceClassification.from_pretrained(settings.model_name, num_labels=1)
    layers = model.config.num_hidden_layers
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(max(0, layers - settings.lora_layers), layers)),
        modules_to_save=["score"],
    )
    model = get_peft_model(model, lora)
    pad = model.config.pad_token_id

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        sequences = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        longest = max(map(len, sequences))
        ids = torch.tensor([sequence + [pad] * (longest - len(sequence)) for sequence in sequences])
        mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
        return {"input_ids": ids, "attention_mask": mask}

    class BradleyTerryTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            scores = model(**inputs).logits.squeeze(-1).float()
            loss = bradley_terry_loss(*scores.chunk(2))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {self.state.global_step}")
            return (loss, scores) if return_outputs else loss

    unfinished = Path(f"{settings.output_dir}.unfinished")
    arguments = TrainingArguments(
        output_dir=str(unfinished),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=20,
        weight_decay=0.01,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        logging_steps=10,
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    dataset = Dataset.from_list(encode_pairs(pairs, tokenizer, settings.max_length))
    trainer = BradleyTerryTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    trainer.train(resume_from_checkpoint=any(unfinished.glob("checkpoint-*")))
    with atomic_path(settings.output_dir) as temporary:
        model.save_pretrained(temporary)
    shutil.rmtree(unfinished)


CARD = """# Reward model: LoRA and a scalar head on {settings.model_name}

Trained by `train_gold_rm.py` with the Bradley-Terry loss; `gold_models.load_gold_reward_model` reads this folder.
Settings, seed, commit and package versions: `training_record.json`.

**Data and licence.** {note}

**Command.** `{command}`

**Training pairs.** {settings.pairs}, one epoch; half of the preferences with the longer answer preferred and half with the shorter, as far as
the data holds them; {share:.0%} of the pairs set the preferred answer against a damaged text. Conversations are cut on the left at
{settings.max_length} tokens.

**Held-out accuracy** (prompts that training never saw; a pair counts as right when the preferred answer scores higher):

| pairs | accuracy | n |
|---|---|---|
{rows}
"""


def write_card(settings: GoldTrainingSettings, measured: dict[str, dict[str, float]]) -> None:
    """Write the model card, in place of the empty form that PEFT leaves."""
    rows = "\n".join(f"| {name} | {row['accuracy']:.3f} | {row['n']} |" for name, row in measured.items())
    card = CARD.format(
        settings=settings, command=shlex.join(["python", *sys.argv]), note=settings.data_note, share=settings.damaged_share, rows=rows
    )
    with atomic_path(Path(settings.output_dir) / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(GoldTrainingSettings, description=__doc__)
    pairs = read_pairs(settings.preferences)
    rng = random.Random(settings.seed)
    heldout = [pair for pair in pairs if is_heldout(pair.instruction, settings.heldout_share)]
    training = [pair for pair in pairs if not is_heldout(pair.instruction, settings.heldout_share)]
    if not heldout or not training:
        raise InputError(f"{settings.preferences}: no prompts left to train on or to hold out, expected more prompts")
    heldout = random.Random(0).sample(heldout, min(settings.heldout_pairs, len(heldout)))
    heldout += damaged_pairs(heldout[: len(heldout) // 2], random.Random(0))
    dtype = "bf16 autocast" if settings.bf16 else "float32"
    record = provenance(settings=asdict(settings), seed=settings.seed, dtype=dtype, model=settings.model_name)
    if not settings.evaluate_only:
        train(settings, select_pairs(training, settings.pairs, settings.damaged_share, rng))
    measured = heldout_accuracies(settings.output_dir, heldout, settings.max_length, settings.batch_size)
    for name, row in measured.items():
        print(f"{name:36} {row['accuracy']:.3f}  (n={row['n']})")
    if not settings.evaluate_only:
        write_json(Path(settings.output_dir) / "training_record.json", {**record, "heldout": measured})
        write_card(settings, measured)


if __name__ == "__main__":
    run_main(main)
