"""Fit a Bradley-Terry reward model to preference pairs: LoRA and a scalar head on a small language model.

    python train_gold_rm.py --preferences preferences.jsonl.gz --output_dir outputs/gold_rm
    python train_gold_rm.py --preferences FILE --evaluate_only=true --output_dir assets/demo_gold_rm   # held-out accuracy alone

Each row of the preferences: {"instruction", "output_1", "output_2", "preference": 1 or 2}, and "generator_1", "generator_2" where
systems are held out. Prompts are held out whole, by a hash of their text. In most preference data the longer answer wins, and a
model trained on it as it is learns little else: training pairs are therefore balanced so that the longer answer wins half of them.
Pairs of one prompt are ranked together, so that an answer they share is read once and orders the answers that it was not compared
with; every ranking brings damaged texts: other prompts' answers, and a preferred answer repeating itself or cut short.

The result is a PEFT adapter folder that `parts.gold_models.load_gold_reward_model` reads. Interrupted, the same command goes on from
the last of its checkpoints, kept in `<output_dir>.unfinished` until the end.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from parts.cli import parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import atomic_path, read_json, write_json
from parts.models import adapter_base, check_model_name, loading
from parts.rows import is_heldout, read_rows
from parts.runs import provenance

if TYPE_CHECKING:
    import torch

FORWARD_TOKENS = 4096  # in one forward pass of training, padding included
FOREIGN, REPETITION, CUT = DAMAGES = ("another prompt's answer", "repetition", "cut")


@dataclass
class GoldTrainingSettings:
    preferences: str = setting("", "preference pairs: .json, .jsonl, or either gzipped")
    data_note: str = setting("not stated", "origin and licence of the preferences, for the card")
    output_dir: str = setting("outputs/gold_rm", "folder that receives the adapter and its card")
    model_name: str = setting("models/SmolLM2-135M-Instruct", "language model that the adapter and the head sit on")
    start_from: str = setting("", "reward adapter on the same model to go on from, LoRA settings and all; empty means a new one")
    pairs: int = setting(5000, "most training pairs (one epoch)")
    ranked_together: int = setting(6, "most pairs of one prompt that are ranked together, with three damaged texts")
    heldout_share: float = setting(0.15, "share of the prompts held out")
    heldout_systems: list[str] = setting([], "generators whose answers are never trained on")
    heldout_pairs: int = setting(400, "held-out pairs that the accuracy is measured on, and as many again of similar length or damaged")
    max_length: int = setting(448, "longest conversation in tokens; training leaves pairs with a longer one out")
    batch_size: int = setting(4, "rankings per optimiser step")
    learning_rate: float = setting(3e-4, "peak learning rate, warmed up and decayed linearly")
    lora_r: int = setting(8, "LoRA rank")
    lora_layers: int = setting(12, "how many of the last transformer layers carry LoRA; the frozen ones below need no backward pass")
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
    systems: tuple[str, ...] = ()

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
        systems = tuple(row[field] for field in ("generator_1", "generator_2") if field in row)
        pairs.append(Pair(row["instruction"], chosen, answers[2 - row["preference"]], systems=systems))
    return pairs


def damage(pair: Pair, other_answer: str, kind: str, rng: random.Random) -> Pair:
    """`pair` with its worse answer replaced by a damaged text."""
    if kind == FOREIGN:
        rejected = other_answer
    else:
        words = pair.chosen.split(" ")
        kept = words[: max(1, int(len(words) * rng.uniform(0.2, 0.6)))]
        rejected = " ".join(kept)
        if kind == REPETITION:
            phrase = " ".join(kept[-rng.randint(3, 25) :])
            while len(rejected) < len(pair.chosen):
                rejected += " " + phrase
    return Pair(pair.instruction, pair.chosen, rejected, kind)


def damaged_pairs(pairs: list[Pair], kinds: Sequence[str], rng: random.Random) -> list[Pair]:
    """Every pair damaged, `kinds` in turn; the foreign answer is the preferred one of the next pair of another prompt."""
    result = []
    for number, pair in enumerate(pairs):
        others = (pairs[(number + step) % len(pairs)] for step in range(1, len(pairs)))
        other = next((other.chosen for other in others if other.instruction != pair.instruction), None)
        result.append(damage(pair, other or "", kinds[number % len(kinds)] if other is not None else CUT, rng))
    return result


def select_pairs(pairs: list[Pair], count: int, fits: Callable[[Pair], bool], rng: random.Random) -> list[Pair]:
    """`count` pairs that fit, drawn at random, the longer answer winning one half and the shorter the other, in random order."""
    pairs = rng.sample(pairs, len(pairs))
    halves = [list(islice((pair for pair in pairs if pair.longer_wins is longer and fits(pair)), count // 2)) for longer in (True, False)]
    each = min(map(len, halves))
    return rng.sample(halves[0][:each] + halves[1][:each], 2 * each)


def by_prompt(pairs: list[Pair], most: int) -> list[list[Pair]]:
    """The pairs of each prompt, up to `most` together, prompts in order of first appearance."""
    prompts: dict[str, list[Pair]] = {}
    for pair in pairs:
        prompts.setdefault(pair.instruction, []).append(pair)
    return [group[start : start + most] for group in prompts.values() for start in range(0, len(group), most)]


def implied(comparisons: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """`comparisons` (better, worse), and those that follow through one shared answer, but for what another comparison denies."""
    follow = {(better, worse) for better, middle in comparisons for other, worse in comparisons if middle == other and better != worse}
    return comparisons | {(better, worse) for better, worse in follow if (worse, better) not in comparisons}


def encode_rankings(groups: list[list[Pair]], encode: Callable[[str, str], list[int]], rng: random.Random) -> list[dict]:
    """Each group of one prompt's pairs as token ids of its texts, and who beats whom: preferences, foreign answers, other damages.

    The damaged texts are those of the group's first pair. A foreign answer is worse than all of the group's; the preferred answer
    that repeats itself or ends early is worse than it was whole.
    """
    first = [group[0] for group in groups]
    damages = [damaged_pairs(first, (FOREIGN,), rng), damaged_pairs(first[::-1], (FOREIGN,), rng)[::-1]]
    damages.append(damaged_pairs(first, (REPETITION, CUT), rng))
    rankings = []
    for group, *damaged in zip(groups, *damages):
        texts = list(dict.fromkeys(text for pair in group for text in (pair.chosen, pair.rejected)))
        comparisons = {"preference": implied({(texts.index(pair.chosen), texts.index(pair.rejected)) for pair in group})}
        for place, pair in enumerate(damaged, start=len(texts)):
            better = range(len(texts)) if pair.kind == FOREIGN else [texts.index(pair.chosen)]
            comparisons.setdefault(pair.kind, set()).update((one, place) for one in better if pair.rejected != texts[one])
        texts += [pair.rejected for pair in damaged]
        rankings.append(
            {
                "sequences": [encode(group[0].instruction, text) for text in texts],
                "comparisons": [{"kind": kind, "pairs": sorted(ordered)} for kind, ordered in comparisons.items()],
            }
        )
    return rankings


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected) over [pairs] scores (Bradley and Terry, 1952)."""
    import torch

    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def heldout_sample(pairs: list[Pair], count: int) -> list[Pair]:
    """What accuracy is measured on: `count` random pairs, `count // 2` more of similar length, `count // 2` damaged ones."""
    rng = random.Random(0)
    pairs = rng.sample(pairs, len(pairs))
    measured, rest = pairs[:count], pairs[count:]
    similar = [replace(pair, kind="similar length") for pair in rest if pair.similar_length][: count // 2]
    return measured + similar + [pair for pair in damaged_pairs(measured[: count // 2], DAMAGES, rng) if pair.rejected != pair.chosen]


def accuracies(pairs: list[Pair], margins: list[float], heldout_systems: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Share of positive margins with its n: all preferences, those of similar length, by whether the longer wins, each damage."""
    rows = list(zip(pairs, margins))
    preferences = [row for row in rows if row[0].kind == "preference"]
    groups = {
        "all preferences": preferences,
        "of systems never trained on": [row for row in preferences if set(row[0].systems) & set(heldout_systems)],
        "lengths within 25%": [row for row in rows if row[0].kind in ("preference", "similar length") and row[0].similar_length],
        "longer answer preferred": [row for row in preferences if row[0].longer_wins],
        "shorter answer preferred": [row for row in preferences if not row[0].longer_wins],
    }
    for kind in DAMAGES:
        groups[f"against {kind}"] = [row for row in rows if row[0].kind == kind]
    return {
        name: {"accuracy": sum(margin > 0 for _, margin in group) / len(group), "n": len(group)} for name, group in groups.items() if group
    }


def heldout_accuracies(settings: GoldTrainingSettings, pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """Accuracies of the saved adapter, on whole texts, scored through the same class that the gold stage uses."""
    from tqdm import tqdm

    from parts.gold_models import SequenceClassificationRMForInference

    gold = SequenceClassificationRMForInference(settings.output_dir)
    texts = list(dict.fromkeys((pair.instruction, text) for pair in pairs for text in (pair.chosen, pair.rejected)))
    texts.sort(key=lambda text: len(text[0] + text[1]))
    scores = {}
    for start in tqdm(range(0, len(texts), 64), desc="held-out texts", unit="batch"):
        rows = texts[start : start + 64]
        scores |= zip(rows, gold.get_reward({"query": [query for query, _ in rows], "response": [text for _, text in rows]}))
    margins = [scores[pair.instruction, pair.chosen] - scores[pair.instruction, pair.rejected] for pair in pairs]
    return accuracies(pairs, margins, settings.heldout_systems)


def train(settings: GoldTrainingSettings, pairs: list[Pair]) -> None:
    """Train on a balanced choice of `pairs` and write the adapter to `settings.output_dir`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

    from parts.gold_models import batches_by_length, encode_conversation

    set_seed(settings.seed)
    rng = random.Random(settings.seed)
    with loading(settings.model_name, "a language model"):
        tokenizer = AutoTokenizer.from_pretrained(settings.model_name)
        model = AutoModelForSequenceClassification.from_pretrained(settings.model_name, num_labels=1)

    def encode(instruction: str, text: str) -> list[int]:
        return encode_conversation(tokenizer, instruction, text, tokenizer.model_max_length)

    def fits(pair: Pair) -> bool:
        lengths = [len(encode(pair.instruction, text)) for text in (pair.chosen, pair.rejected)]
        return max(lengths) <= settings.max_length and pair.chosen != pair.rejected

    selected = select_pairs(pairs, settings.pairs, fits, rng)
    if not selected:
        raise InputError(
            f"{settings.preferences}: no pairs within {settings.max_length} tokens in which now the longer, now the shorter wins"
        )
    groups = by_prompt(selected, settings.ranked_together)
    rng.shuffle(groups)
    print(f"{len(selected)} training pairs in {len(groups)} rankings")
    if settings.start_from:
        model = PeftModel.from_pretrained(model, settings.start_from, is_trainable=True)
    else:
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

    def collate(rows: list[dict]) -> dict[str, list]:
        sequences, comparisons = [], {}
        for row in rows:
            start = len(sequences)
            # A foreign answer may be longer than the others: it loses its end.
            sequences += [sequence[: settings.max_length] for sequence in row["sequences"]]
            for entry in row["comparisons"]:
                comparisons.setdefault(entry["kind"], []).extend([start + place for place in pair] for pair in entry["pairs"])
        return {"sequences": sequences, "comparisons": comparisons}

    class BradleyTerryTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            sequences = inputs["sequences"]
            scores = torch.empty(len(sequences), device=model.device)
            for places in batches_by_length(list(map(len, sequences)), len(sequences), FORWARD_TOKENS):
                longest = max(len(sequences[place]) for place in places)
                ids = torch.tensor([sequences[place] + [pad] * (longest - len(sequences[place])) for place in places])
                mask = torch.arange(longest) < torch.tensor([[len(sequences[place])] for place in places])
                logits = model(input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device)).logits
                scores[places] = logits.squeeze(-1).float()
            # Each kind of comparison weighs the same, however many there are of it.
            kinds = [torch.tensor(pairs).T for pairs in inputs["comparisons"].values() if pairs]
            loss = torch.stack([bradley_terry_loss(scores[better], scores[worse]) for better, worse in kinds]).mean()
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
        remove_unused_columns=False,
        logging_steps=10,
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    dataset = Dataset.from_list(encode_rankings(groups, encode, rng))
    trainer = BradleyTerryTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    trainer.train(resume_from_checkpoint=any(unfinished.glob("checkpoint-*")))
    with atomic_path(settings.output_dir) as temporary:
        model.save_pretrained(temporary)
    shutil.rmtree(unfinished)


CARD = """# Reward model: LoRA and a scalar head on {settings.model_name}

Trained by `train_gold_rm.py` with the Bradley-Terry loss; `parts.gold_models.load_gold_reward_model` reads this folder.
Settings, seed, commit and package versions, also of what it goes on from: `training_record.json`.

**Data and licence.** {note}

**Command.** `{command}`

**Training pairs.** Up to {settings.pairs}, one epoch, of conversations within {settings.max_length} tokens: one half with the longer answer
preferred, the other with the shorter. Up to {settings.ranked_together} pairs of a prompt are ranked together, with two other prompts' answers
below all of them, and a preferred answer above itself repeated or cut short. Systems never trained on: {systems}.

**Held-out accuracy** (prompts that training never saw, whole texts; a pair counts as right when the preferred answer scores higher):

| pairs | accuracy | n |
|---|---|---|
{rows}
"""


def write_card(settings: GoldTrainingSettings, measured: dict[str, dict[str, float]]) -> None:
    """Write the model card, in place of the empty form that PEFT leaves."""
    rows = "\n".join(f"| {name} | {row['accuracy']:.3f} | {row['n']} |" for name, row in measured.items())
    card = CARD.format(
        settings=settings,
        command=shlex.join(["python", *sys.argv]),
        note=settings.data_note,
        systems=", ".join(settings.heldout_systems) or "none",
        rows=rows,
    )
    with atomic_path(Path(settings.output_dir) / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def earlier_training(settings: GoldTrainingSettings) -> dict:
    """The record of the adapter to go on from. Raises InputError for another base model, or prompts or systems held out otherwise."""
    folder = Path(settings.start_from)
    base = adapter_base(folder)
    if Path(base).resolve() != Path(settings.model_name).resolve():
        raise InputError(f"--start_from: {folder} sits on {base}, expected {settings.model_name}")
    record = read_json(folder / "training_record.json")
    for name in ("heldout_share", "heldout_systems"):
        # What was trained on then cannot be held out now.
        if record["settings"][name] != getattr(settings, name):
            raise InputError(f"--start_from: {folder} was trained with {name} {record['settings'][name]}, expected the same as now")
    return record


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(GoldTrainingSettings, description=__doc__)
    pairs = read_pairs(settings.preferences)
    check_model_name(settings.output_dir if settings.evaluate_only else settings.model_name)
    earlier = earlier_training(settings) if settings.start_from else None
    known = {system for pair in pairs for system in pair.systems}
    for system in settings.heldout_systems:
        if system not in known:
            raise InputError(f"--heldout_systems: no row of {settings.preferences} has the generator {system!r}")
    heldout = [pair for pair in pairs if is_heldout(pair.instruction, settings.heldout_share)]
    training = [
        pair
        for pair in pairs
        if not is_heldout(pair.instruction, settings.heldout_share) and not set(pair.systems) & set(settings.heldout_systems)
    ]
    if not heldout or not training:
        raise InputError(f"{settings.preferences}: no prompts left to train on or to hold out, expected more prompts")
    heldout = heldout_sample(heldout, settings.heldout_pairs)
    dtype = "bf16 autocast" if settings.bf16 else "float32"
    record = provenance(settings=asdict(settings), seed=settings.seed, dtype=dtype, model=settings.model_name, start_from=earlier)
    if not settings.evaluate_only:
        train(settings, training)
    measured = heldout_accuracies(settings, heldout)
    for name, row in measured.items():
        print(f"{name:36} {row['accuracy']:.3f}  (n={row['n']})")
    if not settings.evaluate_only:
        write_json(Path(settings.output_dir) / "training_record.json", {**record, "heldout": measured})
        write_card(settings, measured)


if __name__ == "__main__":
    run_main(main)
