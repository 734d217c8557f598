"""Overlap of a response with a reference text, by the libraries of the field."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, stemmed. Range [0, 1]; 0 where either has no ASCII word. (Lin 2004, rouge-score)"""
    return _rouge_scorer().score(reference, text)["rougeL"].fmeasure


def bleu(reference: str, text: str) -> float:
    """BLEU of one sentence: up to 4-grams, 13a tokens, exponential smoothing. Range [0, 1]. (Papineni et al. 2002, sacrebleu)"""
    from sacrebleu import sentence_bleu

    return min(sentence_bleu(text, [reference]).score / 100, 1.0)  # a perfect match comes out as 100.00000000000004


@functools.cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
