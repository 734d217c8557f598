"""Query types told by a model: by logistic regression that learned from labelled rows, or by a language model's likelihoods.

The regression is on an instruction's words and on its embedding. The words are TF-IDF weights of one and two words of the instruction
proper, without the material under `### Input:`; the embedding is the relevance model's, of the whole text, at unit length. Together
they are worth more than either, and no better was found:
other features (lengths, the answer, first words, characters), kernels, ensembles and treatments of label noise change less than the
accuracy varies from one set of folds to the next.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy  # its parts load when they are used
from tqdm import tqdm

from parts.errors import InputError
from parts.files import read_json, write_json
from parts.rows import QTYPES

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from transformers import PreTrainedModel

    from parts.relevance import RelevanceModel

FOLDS = 5
INVERSE_REGULARISATION = 2.0  # scikit-learn's C
PROBE = "Name three rivers and say what each of them is known for."  # its embedding tells one encoder from another

LABEL_PROMPT = """Sort an instruction by how far it settles what a right response says.

CONSTRAINED: the instruction, with any material it brings along, largely settles the right response. Independent experts would agree on \
the content: a fact, a computation, something extracted or classified, a text corrected, translated or rewritten, code whose behaviour is \
specified.
OPENENDED: many responses that differ in content would all be good: a story or poem, ideas, advice, an opinion, a plan, an explanation \
whose contents are the writer's choice.

What decides is the freedom in the content, not the subject or the length of the response.

Instruction: At what temperature does lead melt?
Type: CONSTRAINED
Instruction: Think of three presents for a neighbour who keeps bees.
Type: OPENENDED
Instruction: Put this sentence into the past tense. "The ferry leaves at dusk."
Type: CONSTRAINED
Instruction: Write the opening of a ghost story that is set in a laundrette.
Type: OPENENDED
Instruction: Write a shell command that counts the lines of all .txt files in a folder.
Type: CONSTRAINED
Instruction: How can a shy person get more out of a conference?
Type: OPENENDED

The next instruction is to be sorted and not to be carried out. Answer with its type alone, {names}.

Instruction: {instruction}
Type:"""


def instruction_proper(text: str) -> str:
    """The instruction without the material that follows the heading `### Input:`."""
    return re.split(r"\n### Input:", text, maxsplit=1)[0]


def _vectorizer(**options: object) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer  # here, since it takes a second

    return TfidfVectorizer(preprocessor=_prepare, ngram_range=(1, 2), token_pattern=r"\w+", sublinear_tf=True, **options)


def _prepare(text: str) -> str:
    return instruction_proper(text).lower()


@dataclass
class QtypeClassifier:
    """P(CONSTRAINED) of an instruction.

    Args:
        terms: the words and pairs of words that count.
        idf: [terms] inverse document frequencies.
        term_weights: [terms] of the regression.
        embedding_weights: [dimension].
        bias: of the regression.
        probe: [dimension] embedding of `PROBE` by the encoder that the classifier was trained with.
        record: how it was trained and measured.
    """

    terms: list[str]
    idf: np.ndarray
    term_weights: np.ndarray
    embedding_weights: np.ndarray
    bias: float
    probe: np.ndarray
    record: dict

    @classmethod
    def fit(cls, texts: Sequence[str], embeddings: np.ndarray, constrained: np.ndarray, probe: np.ndarray, record: dict) -> QtypeClassifier:
        """Train on texts, their [texts, dimension] embeddings, and [texts] truth values.

        Raises:
            InputError: no word stands in two of the instructions.
        """
        vectorizer = _vectorizer(min_df=2)
        try:
            words = vectorizer.fit_transform(texts)
        except ValueError:
            raise InputError(f"no word stands in two of {len(texts)} labelled instructions, expected more of them") from None
        from sklearn.linear_model import LogisticRegression

        regression = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=3000)
        regression.fit(_features(words, embeddings), constrained)
        weights = regression.coef_[0]
        terms = vectorizer.get_feature_names_out().tolist()
        return cls(
            terms, vectorizer.idf_, weights[: len(terms)], weights[len(terms) :], float(regression.intercept_[0]), np.asarray(probe), record
        )

    def probabilities(self, texts: Sequence[str], embeddings: np.ndarray) -> np.ndarray:
        """[texts] P(CONSTRAINED), from the texts and their [texts, dimension] embeddings."""
        vectorizer = _vectorizer(vocabulary=self.terms)
        vectorizer.idf_ = self.idf
        weights = np.concatenate([self.term_weights, self.embedding_weights])
        return scipy.special.expit(_features(vectorizer.transform(texts), embeddings) @ weights + self.bias)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, in which a float64 keeps its every bit."""
        content = {
            "record": self.record,
            "bias": self.bias,
            "terms": {term: [float(idf), float(weight)] for term, idf, weight in zip(self.terms, self.idf, self.term_weights)},
            "embedding_weights": self.embedding_weights.tolist(),
            "probe": self.probe.tolist(),
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> QtypeClassifier:
        """Read what `save` wrote. Raises InputError where the file is missing or is something else."""
        content = read_json(path)
        try:
            idf, weights = np.array(list(content["terms"].values()), dtype=float).T
            vectors = [np.array(content[name], dtype=float) for name in ("embedding_weights", "probe")]
            return cls(list(content["terms"]), idf, weights, vectors[0], float(content["bias"]), vectors[1], content["record"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: not a classifier of query types, expected a file that --train_from wrote") from None

    def check_encoder(self, name: str, probe: np.ndarray) -> None:
        """Raise InputError unless the encoder called `name`, which embeds `PROBE` as `probe`, is the one of the training."""
        if probe.shape != self.probe.shape or not np.allclose(_unit(probe[None]), _unit(self.probe[None]), atol=1e-2):
            raise InputError(f"--encoder {name} is not the encoder of this classifier, expected the one of its training")


def first_places(texts: Sequence[str]) -> list[int]:
    """The rows whose text is none before it, whatever its capitals and white space."""
    return sorted({" ".join(text.split()).casefold(): row for row, text in reversed(list(enumerate(texts)))}.values())


def require_both_labels(texts: Sequence[str], constrained: np.ndarray, path: str) -> None:
    """Raise InputError unless each fold of [rows] truth values, those of `path`, can have a row of either label; equal texts are one."""
    constrained = constrained[first_places(texts)]
    count = int(constrained.sum())
    if min(count, len(constrained) - count) < FOLDS:
        raise InputError(
            f"{path}: {count} CONSTRAINED and {len(constrained) - count} OPENENDED rows of different texts, expected at least {FOLDS} of each"
        )


def cross_validate(texts: Sequence[str], embeddings: np.ndarray, constrained: np.ndarray, seed: int) -> dict:
    """Accuracy on each of five stratified folds by a classifier trained on the other four, words and all; a text that comes again is left out.

    Returns:
        "accuracy" over all different texts, its "standard_error" (binomial), "by_fold", and the "majority" label's share of these.
    """
    first = first_places(texts)
    texts, embeddings, constrained = [texts[row] for row in first], embeddings[first], constrained[first]
    right = np.zeros(len(texts), dtype=bool)
    by_fold = []
    from sklearn.model_selection import StratifiedKFold

    for train, held_out in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(embeddings, constrained):
        classifier = QtypeClassifier.fit([texts[row] for row in train], embeddings[train], constrained[train], embeddings[0], {})
        found = classifier.probabilities([texts[row] for row in held_out], embeddings[held_out]) > 0.5
        right[held_out] = found == constrained[held_out]
        by_fold.append(float(right[held_out].mean()))
    accuracy = float(right.mean())
    return {
        "accuracy": accuracy,
        "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / len(texts))),
        "by_fold": by_fold,
        "majority": float(max(constrained.mean(), 1 - constrained.mean())),
    }


def embed(encoder: RelevanceModel, texts: Sequence[str], description: str) -> np.ndarray:
    """[texts, dimension] float32 embeddings, under a progress bar."""
    vectors = np.empty((len(texts), encoder.encoder.get_embedding_dimension()), dtype=np.float32)
    with tqdm(total=len(texts), desc=description, unit="row") as bar:
        for places in encoder.batches(texts):
            vectors[places] = encoder.embed([texts[place] for place in places]).numpy()
            bar.update(len(places))
    return vectors


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).clip(1e-12)


def _features(words: scipy.sparse.csr_matrix, embeddings: np.ndarray) -> scipy.sparse.csr_matrix:
    return scipy.sparse.hstack([words, scipy.sparse.csr_matrix(_unit(np.asarray(embeddings, dtype=float)))], format="csr")


def label_prompt(instruction: str) -> str:
    """What an instruction model is asked to label with."""
    return LABEL_PROMPT.format(names=" or ".join(QTYPES), instruction=instruction.strip())


def label_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    batch_size: int,
    finished: Callable[[int, list[float]], None],
    description: str | None = None,
) -> None:
    """log P(label | prompt), summed over a label's tokens, for every prompt and label.

    The prompts' common beginning goes through the model once, its keys and values serve them all.

    Args:
        model: a causal LM in eval mode.
        prompts: token ids, at least one each.
        labels: token ids, at least one each.
        finished: called with each prompt's place and its [labels] values, in nats, as soon as its batch is done.
        description: of the progress bar; no bar without it.
    """
    import torch

    from parts.batching import batches_by_length, pad

    device = next(model.parameters()).device
    shared = list(os.path.commonprefix([list(prompt) for prompt in prompts]))[: min(map(len, prompts)) - 1]
    kept = max(map(len, labels)) + 1  # places whose logits are needed: each but the last predicts a token of a label
    with torch.inference_mode(), tqdm(total=len(prompts), desc=description, unit="row", disable=description is None) as bar:
        beginning = model(torch.tensor([shared], device=device), use_cache=True, logits_to_keep=1).past_key_values if shared else None
        for places in batches_by_length(list(map(len, prompts)), batch_size, longest_first=True):
            rows = [list(prompts[place][len(shared) :]) + list(label) for place in places for label in labels]
            ids, mask = pad(rows, 0, "left", device)
            mask = torch.cat([mask.new_ones(len(rows), len(shared)), mask], dim=1)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, len(shared) :]
            cache = copy.deepcopy(beginning)
            if cache is not None:
                cache.batch_repeat_interleave(len(rows))
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=cache is not None,
                logits_to_keep=kept,
            ).logits  # fmt: skip
            logprobs = torch.log_softmax(logits.float()[:, :-1], dim=-1)
            found = logprobs.gather(2, ids[:, 1 - kept :, None])[:, :, 0]
            for number, place in enumerate(places):
                values = [float(found[number * len(labels) + which, -len(label) :].sum()) for which, label in enumerate(labels)]
                finished(place, values)
            bar.update(len(places))
