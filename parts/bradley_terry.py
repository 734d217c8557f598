"""Training a reward model on rankings: what is worked out from a batch of them, and the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Trainer

from parts.batching import batches_by_length, pad, unused_id


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected) over [pairs] scores (Bradley and Terry, 1952)."""
    return -nn.functional.logsigmoid(chosen - rejected).mean()


@dataclass(frozen=True)
class RankingCollator:
    """Rankings, as `preferences.encode_rankings` makes them, into one batch: sequences, and comparisons of their places by kind.

    Args:
        max_length: tokens of a sequence; a longer one loses its end (a foreign answer may be longer than the others).
    """

    max_length: int

    def __call__(self, rankings: list[dict]) -> dict:
        sequences, comparisons = [], {}
        for ranking in rankings:
            start = len(sequences)
            sequences += [sequence[: self.max_length] for sequence in ranking["sequences"]]
            for entry in ranking["comparisons"]:
                comparisons.setdefault(entry["kind"], []).extend([start + place for place in pair] for pair in entry["pairs"])
        return {"sequences": sequences, "comparisons": comparisons}


def score_sequences(model: nn.Module, sequences: list[list[int]], padding: int, most_tokens: int) -> torch.Tensor:
    """[sequences] scores in fp32, with gradients; passes are over sequences of about the same length, `most_tokens` with padding."""
    scores = torch.empty(len(sequences), device=model.device)
    for places in batches_by_length(list(map(len, sequences)), most_tokens=most_tokens):
        ids, mask = pad([sequences[place] for place in places], padding, device=model.device)
        scores[places] = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float()
    return scores


class BradleyTerryTrainer(Trainer):
    """transformers' Trainer with the Bradley-Terry loss over batches of a `RankingCollator`.

    Args:
        forward_tokens: in one forward pass, padding included.

    Raises:
        FloatingPointError: the loss is not finite.
    """

    def __init__(self, *, forward_tokens: int, **kwargs):
        super().__init__(**kwargs)
        self.forward_tokens = forward_tokens

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        config, sequences = self.model.config, inputs["sequences"]
        before = config.pad_token_id
        if before is None:  # a model that knows no padding reads its score at the last token that is none
            config.pad_token_id = unused_id(sequences, config.vocab_size)
        try:
            scores = score_sequences(model, sequences, config.pad_token_id, self.forward_tokens)
        finally:
            config.pad_token_id = before
        # Each kind of comparison weighs the same, however many there are of it.
        kinds = [torch.tensor(pairs).T for pairs in inputs["comparisons"].values() if pairs]
        loss = torch.stack([bradley_terry_loss(scores[better], scores[worse]) for better, worse in kinds]).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.state.global_step}")
        return (loss, scores) if return_outputs else loss
