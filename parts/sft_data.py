"""Rows for supervised fine-tuning: prompts and answers as tokens, and the order in which a training reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from parts.data_checks import check_rows
from parts.errors import InputError
from parts.rows import is_heldout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from parts.chat_templates import ChatTemplate

NOT_LEARNT = -100  # the label of a token without a loss
SORTED_TOGETHER = 16  # batches within which rows are sorted by length


# A full stop, question or exclamation mark, with quotes and brackets that close, before white space and no small letter. Not after a digit
# ("1." begins an item of a list), and not in a name ("J.", "Mr.").
_SENTENCE_END = re.compile(r"""(?<![0-9])(?<!\b[A-Z])(?<!\b[DM]r)(?<!\bMs)(?<!\bMrs)[.!?]["'”’)\]]*(?=\s+[^\sa-z]|\s*$)""")


def first_sentences(text: str, words: int) -> str | None:
    """The first whole sentences of `text` that have `words` words at most together; None where the first one is longer."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    fitting = [end for end in [*ends, len(text.rstrip())] if len(text[:end].split()) <= words]
    return text[: fitting[-1]].strip() if fitting else None


def read_examples(
    path: str, settings, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, against: Sequence[str] = ()
) -> list[dict]:
    """Rows as {"input", "input_ids", "labels"}: prompt, answer and end of sequence as tokens; the prompt's labels are `NOT_LEARNT`.

    A line says how many rows were left out, and why.

    Raises:
        InputError: an unusable row, an empty output, or no row left.
    """
    from parts.chat_templates import encode_answers, encode_rows

    rows = check_rows(path, {"input": None, "output": None}, against)
    kept, empty, long_sentence = [], 0, 0
    for number, (row, prompt) in enumerate(zip(rows, encode_rows(tokenizer, template, rows, "input", str(path))), start=1):
        answer: str | None = row["output"].strip()
        if not answer:
            empty += 1
            if settings.empty_outputs == "error":
                raise InputError(
                    f"{path}: row {number}: field 'output' is empty, expected an answer (--empty_outputs=drop leaves such rows out)"
                )
            continue
        answer = first_sentences(answer, settings.answer_words) if settings.answer_words else answer
        if answer is None:
            long_sentence += 1
        else:
            kept.append((row, prompt, answer))
    answers = encode_answers(tokenizer, template, [answer for _, _, answer in kept])
    examples = [
        {"input": row["input"], "input_ids": prompt + answer, "labels": [NOT_LEARNT] * len(prompt) + answer}
        for (row, prompt, _), answer in zip(kept, answers)
        if len(prompt) + len(answer) <= settings.max_length
    ]
    left_out = {
        "output is empty": empty,
        f"first sentence has more than {settings.answer_words} words": long_sentence,
        f"prompt and answer have more than {settings.max_length} tokens": len(kept) - len(examples),
    }
    reasons = "; ".join(f"{count}: {reason}" for reason, count in left_out.items() if count)
    if not examples:
        raise InputError(f"{path}: no row is left to learn from ({reasons})")
    if reasons and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {len(rows) - len(examples)} of {len(rows)} rows are left out ({reasons})")
    return examples


def split(examples: list[dict], share: float) -> tuple[list[dict], list[dict]]:
    """Examples to learn from, and those whose prompt is held out."""
    held = [is_heldout(example["input"], share) for example in examples]
    return [row for row, out in zip(examples, held) if not out], [row for row, out in zip(examples, held) if out]


def collate(rows: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """[rows, longest] token ids, mask and labels, padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    mask = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=NOT_LEARNT),
    }


class ByLength:
    """A sampler: places of rows, so that each `batch` in a row are of similar length. Its order depends on seed and epoch alone."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        generator = np.random.default_rng([self.seed, self.epoch])
        order, chunk = generator.permutation(len(self)).tolist(), self.batch * SORTED_TOGETHER
        batches = []
        for start in range(0, len(order), chunk):
            places = sorted(order[start : start + chunk], key=lambda place: self.lengths[place], reverse=True)
            batches += [places[first : first + self.batch] for first in range(0, len(places), self.batch)]
        last = [] if len(order) % self.batch == 0 else [batches.pop()]  # the one that is not full
        for place in generator.permutation(len(batches)).tolist():
            yield from batches[place]
        for places in last:
            yield from places
