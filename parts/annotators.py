"""What annotates rows: an API, a local language model or a classifier; and how far annotated files agree.

An API and a local model answer questions: a label or a reference that some rows lack. `Answers` keeps each answer as soon as it comes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from parts.errors import InputError
from parts.files import JsonLines, digest, file_digest
from parts.locks import hold
from parts.models import check_model_name
from parts.qtype_classifier import PROBE, QtypeClassifier, cross_validate, embed, label_logprobs, label_prompt, require_both_labels
from parts.rows import QTYPES, read_rows
from parts.runs import provenance

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

OPENAI_URL = "https://api.openai.com/v1"
LABEL_TOKENS = 32  # most tokens of a labelling reply, which is a small JSON object
ATTEMPTS = 3  # most requests for one answer, where the reply is no label or empty
REQUEST_SECONDS = 120.0
BYTES_PER_TOKEN = 4  # of English in today's vocabularies: for the estimate only
PROBLEMS_SHOWN = 20

LABEL_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "query_type",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"qtype": {"type": "string", "enum": list(QTYPES)}},
            "required": ["qtype"],
            "additionalProperties": False,
        },
    },
}


# ---------------------------------------------------------------------------------------------------- rows and questions


def rows_and_instructions(path: str) -> tuple[list[dict], list[str]]:
    """Read rows of either schema, and the instruction of each.

    Raises:
        InputError: an unusable file, a row with neither `input` nor `instruction`, an empty instruction, an output that is not text, or a
            value that JSON has no word for.
    """
    rows = read_rows(path, {})
    prompts = []
    for number, row in enumerate(rows, start=1):
        names = [name for name in ("input", "instruction") if name in row]
        if not names:
            raise InputError(f"{path}: row {number}: found neither 'input' nor 'instruction', expected one of them")
        value = row[names[0]]
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{path}: row {number}: field '{names[0]}' is {value!r}, expected an instruction")
        if not isinstance(row.get("output") or "", str):
            raise InputError(f"{path}: row {number}: field 'output' is {type(row['output']).__name__}, expected text")
        try:
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except ValueError as error:  # half of a surrogate pair, NaN: the annotated rows could not be written
            raise InputError(f"{path}: row {number}: cannot be written as JSON ({error})") from None
        prompts.append(value)
    return rows, prompts


def lacks_qtype(row: dict) -> bool:
    return row.get("qtype") not in QTYPES


def lacks_output(row: dict) -> bool:
    return not (row.get("output") or "").strip()


@dataclass
class Question:
    """A label ("qtype") or an answer ("output") that rows lack, and all that it depends on; the same for rows of the same text."""

    field: str
    request: dict
    rows: list[int]

    @cached_property
    def key(self) -> str:
        return digest([self.field, self.request])


def questions_of(prompts: Sequence[str], places: dict[str, list[int]], request: Callable[[str, str], dict]) -> list[Question]:
    """The questions about the rows in `places` (field to row numbers from 0), each once; `request(field, prompt)` is what is asked."""
    questions: dict[str, Question] = {}
    for field, rows in places.items():
        for row in rows:
            question = Question(field, request(field, prompts[row]), [])
            questions.setdefault(question.key, question).rows.append(row)
    return list(questions.values())


class Answers:
    """Answers by question, in a file that grows as they come and that a later start reads.

    A question that is asked otherwise (another model, another prompt ...) has another key, so its old answer is not used.

    Raises:
        InputError: the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._store = JsonLines(path)
        try:
            self.known: dict[str, dict] = {found["key"]: found for found in self._store.read()}
        except (TypeError, KeyError):
            raise InputError(f"{path}: not a file of answers, expected a key on each line; delete it to start again") from None

    def put(self, question: Question, answer: str, **facts: int) -> None:
        """Keep an answer at once; `facts` are what it cost."""
        self.known[question.key] = {"key": question.key, "answer": answer, **facts}
        self._store.append(self.known[question.key])

    def remove(self) -> None:
        """Delete the file: the result is whole."""
        self.path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- an API


class Refusal(ValueError):
    """A question that the API does not answer, and why; others may fare better."""


def is_web_address(address: str) -> bool:
    """Whether it is http or https, with a host and a port that is a number where it has one."""
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def api_address(base_url: str) -> str:
    """Where the API is. Raises InputError for an address that is none, or that has a secret in it: addresses are recorded."""
    address = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    if not is_web_address(address):
        raise InputError(f"--base_url is {address!r}, expected http:// or https://")
    if "@" in address or "?" in address:
        raise InputError("--base_url holds a user, a password or a query, expected the key in OPENAI_API_KEY and nothing in the address")
    return address


def api_request(model: str, address: str, field: str, prompt: str, max_new_tokens: int) -> dict:
    """The body of a chat completion, under the address it goes to."""
    label = field == "qtype"
    body = {
        "model": model,
        "messages": [{"role": "user", "content": label_prompt(prompt) if label else prompt}],
        "temperature": 0,
        "max_tokens": LABEL_TOKENS if label else max_new_tokens,
    }
    return {"address": address, "body": body | ({"response_format": LABEL_FORMAT} if label else {})}


def estimate(questions: Sequence[Question], price_input: float, price_output: float) -> str:
    """Tokens that these questions take, from the length of their text, and their price where it is known."""
    bodies = [question.request["body"] for question in questions]
    read = sum(len(body["messages"][0]["content"].encode("utf-8", "surrogatepass")) for body in bodies) / BYTES_PER_TOKEN
    written = sum(body["max_tokens"] for body in bodies)
    text = f"estimate: {len(bodies)} requests, about {round(read):,} input tokens, at most {written:,} output tokens"
    if not price_input and not price_output:
        return f"{text} (--price_input and --price_output for the cost)"
    return f"{text}, at most about ${(read * price_input + written * price_output) / 1e6:.4f}"


def ask_all(questions: Sequence[Question], answers: Answers, concurrency: int, max_retries: int) -> list[tuple[Question, str]]:
    """Send questions to the API, `concurrency` at a time; the client sends each up to `max_retries` times again.

    Returns:
        The questions that got no usable answer, each with the reason.
    """
    from openai import OpenAI

    refused = []
    address = questions[0].request["address"]
    client = OpenAI(base_url=address, max_retries=max_retries, timeout=REQUEST_SECONDS)
    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = {pool.submit(ask, client, question, answers): question for question in questions}
        for future in tqdm(as_completed(futures), total=len(futures), desc=questions[0].request["body"]["model"], unit="request"):
            try:
                future.result()
            except Refusal as refusal:
                refused.append((futures[future], str(refusal)))
    finally:
        pool.shutdown(cancel_futures=True)  # what was sent is paid for: its answers are waited for and kept
    return refused


def ask(client: OpenAI, question: Question, answers: Answers) -> None:
    """Send one question, again where the reply is no label, and keep the answer.

    Raises:
        Refusal: the API finds fault with the request, or its replies cannot be used.
        InputError: the API knows no such key or model.
        ConnectionError: the API did not answer, retries included.
    """
    import openai

    address, body = question.request["address"], question.request["body"]
    used = {"input_tokens": 0, "output_tokens": 0, "retries": 0}
    for _ in range(ATTEMPTS):
        try:
            response = client.chat.completions.with_raw_response.create(**body)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            what = "model or address" if error.status_code == 404 else "OPENAI_API_KEY"
            raise InputError(f"{address}: HTTP {error.status_code}, expected another {what}") from None
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
            status = f"HTTP {error.status_code}" if isinstance(error, openai.APIStatusError) else str(error)
            raise ConnectionError(f"{address}: {status} after {client.max_retries} retries; the same command resumes") from None
        except openai.APIStatusError as error:
            raise Refusal(f"HTTP {error.status_code}: {error.message}".replace(client.api_key, "<key>")) from None
        used["retries"] += response.retries_taken
        try:
            completion: ChatCompletion = response.parse()
            reply = completion.choices[0].message.content or ""
            cut = completion.choices[0].finish_reason == "length"
        except (ValueError, AttributeError, TypeError, IndexError):  # the client takes a body of any shape
            reason = "the reply is not a chat completion"
            continue
        if completion.usage:
            used["input_tokens"] += completion.usage.prompt_tokens
            used["output_tokens"] += completion.usage.completion_tokens
        answer = label_in(reply) if question.field == "qtype" else reply.strip()
        if answer:
            answers.put(question, answer, references_cut=int(cut and question.field == "output"), **used)
            return
        reason = f"the reply is {reply[:60]!r}"
    raise Refusal(f"{reason}, {ATTEMPTS} times")


def label_in(reply: str) -> str:
    """The label in a JSON reply, or nothing."""
    try:
        label = json.loads(reply)["qtype"]
    except (ValueError, TypeError, KeyError):
        return ""
    return label if label in QTYPES else ""


# --------------------------------------------------------------------------------------------------------- a local model


def local_request(model: str, template: str, field: str, prompt: str, max_new_tokens: int) -> dict:
    """What a local model's answer depends on; `model` says which weights, as `model_identity` knows them."""
    label = field == "qtype"
    return {
        "model": model,
        "template": template,
        "prompt": label_prompt(prompt) if label else prompt,
        "max_new_tokens": 0 if label else max_new_tokens,
    }


def answer_locally(
    questions: Sequence[Question],
    answers: Answers,
    data: str,
    model_name: str,
    chat_template_name: str,
    max_new_tokens: int,
    batch_size: int,
    device: str = "",
    cache_dir: str = "",
) -> None:
    """Label and answer with a local language model, greedily; `data` is the file of the rows, for messages.

    Raises:
        InputError: the model cannot be loaded, or a prompt is too long for it.
    """
    import torch

    from parts.chat_templates import encode_instructions, load_template
    from parts.generation import HFEngine, generate_responses
    from parts.models import load_tokenizer, read_facts
    from parts.sampling import Decoding, check_sampling, end_tokens

    tokenizer = load_tokenizer(model_name, cache_dir or None)
    template = load_template(chat_template_name, tokenizer)
    facts = read_facts(model_name, tokenizer, cache_dir or None)
    limit, ends = facts.positions or sys.maxsize, end_tokens(tokenizer, facts.generation, template)
    names = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in QTYPES]
    added = {"qtype": max(map(len, names)), "output": max_new_tokens}
    asked: dict[str, list[Question]] = {"qtype": [], "output": []}
    prompts: dict[str, list[list[int]]] = {"qtype": [], "output": []}
    encoded = encode_instructions(tokenizer, template, [question.request["prompt"] for question in questions])
    for question, tokens in zip(questions, encoded):
        length = len(tokens) + added[question.field]
        if length > limit:
            where = f"{data}: row {question.rows[0] + 1}"
            raise InputError(f"{where}: prompt and response take up to {length} tokens, {model_name} takes {limit}")
        asked[question.field].append(question)
        prompts[question.field].append(tokens)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = HFEngine(model_name, tokenizer, device, batch_size, cache_dir or None).model

    def labelled(place: int, logprobs: list[float]) -> None:
        answers.put(asked["qtype"][place], QTYPES[int(np.argmax(logprobs))])

    def answered(place: int, response: list[int]) -> None:
        text = template.strip_response(tokenizer.decode(response, skip_special_tokens=True))
        answers.put(asked["output"][place], text, references_cut=int(response[-1] not in ends))

    if prompts["qtype"]:
        label_logprobs(model, prompts["qtype"], names, batch_size, labelled, "labels")
    if prompts["output"]:
        check_sampling(model)
        decoding = Decoding(max_new_tokens, temperature=0)
        generate_responses(model, tokenizer, prompts["output"], decoding, batch_size, 0, "references", finished=answered, ends=ends)


# ---------------------------------------------------------------------------------------------------------- a classifier


def classify(
    prompts: Sequence[str],
    folder: str,
    encoder_name: str,
    train_from: str = "",
    seed: int = 42,
    batch_size: int = 16,
    device: str = "",
    cache_dir: str = "",
) -> tuple[list[str], dict]:
    """The query types of instructions by the classifier of a folder, and the record of its training.

    With `train_from`, a file of labelled rows, the classifier is trained and measured first, unless it was on these; `seed` is that of the folds.

    Raises:
        InputError: no classifier, one that was trained on other rows than `train_from`, another encoder than that of its training, or unusable labelled rows.
    """
    path = Path(folder) / "classifier.json"
    if train_from:
        rows, texts = rows_and_instructions(train_from)
        read_rows(train_from, {"qtype": QTYPES})
        constrained = np.array([row["qtype"] == "CONSTRAINED" for row in rows])
        require_both_labels(texts, constrained, train_from)
        hold(path)
    own = {"digest": file_digest(train_from), "seed": seed} if train_from else {}
    classifier = QtypeClassifier.load(path) if path.is_file() or not train_from else None
    if classifier and any(classifier.record.get(name) != value for name, value in own.items()):
        raise InputError(f"{path}: exists already, trained on other rows or with another seed; expected another --model")
    check_model_name(encoder_name)

    from parts.relevance import RelevanceModel

    encoder = RelevanceModel(encoder_name, device or None, batch_size, cache_dir or None)
    probe = encoder.embed([PROBE]).numpy()[0]

    if classifier is None:
        vectors = embed(encoder, texts, "training rows")
        measured = cross_validate(texts, vectors, constrained, seed)
        print(
            f"five-fold accuracy {measured['accuracy']:.4f}, standard error {measured['standard_error']:.4f} ({len(rows)} rows, "
            f"the commoner label {measured['majority']:.4f}; by fold {', '.join(f'{value:.4f}' for value in measured['by_fold'])})"
        )
        record = provenance(
            train_from=train_from, rows=len(rows), encoder=encoder_name, cross_validation=measured, **own,
        )  # fmt: skip
        classifier = QtypeClassifier.fit(texts, vectors, constrained, probe, record)
        classifier.save(path)
        print(path)
    else:
        classifier.check_encoder(encoder_name, probe)
    found = classifier.probabilities(prompts, embed(encoder, prompts, "rows")) > 0.5 if prompts else []
    return ["CONSTRAINED" if constrained else "OPENENDED" for constrained in found], classifier.record


# ------------------------------------------------------------------------------------------------------------- agreement


def compare_files(paths: Sequence[str]) -> str:
    """Share of equal labels and Cohen's kappa (Cohen, 1960) of every two files, over the prompts that all of them have.

    A prompt that a file has several times is matched in order. Raises InputError for an unusable file, or where no prompt is in all.
    """
    from sklearn.metrics import cohen_kappa_score

    if len(paths) < 2:
        raise InputError("--compare names one file, expected at least two")
    tables = []
    for path in paths:
        rows, prompts = rows_and_instructions(path)
        read_rows(path, {"qtype": QTYPES})
        seen: dict[str, int] = {}
        table = {}
        for row, prompt in zip(rows, prompts):
            seen[prompt] = seen.get(prompt, 0) + 1
            table[prompt, seen[prompt]] = row["qtype"]
        tables.append(table)
    common = [key for key in tables[0] if all(key in table for table in tables)]
    if not common:
        raise InputError(f"{', '.join(paths)}: no prompt is in all of these files")
    lines = []
    for path, table in zip(paths, tables):
        missing = list(dict.fromkeys(key for other in tables for key in other if key not in table))
        if missing:
            lines.append(f"{path}: {len(missing)} rows of the others are missing, left out everywhere:")
            lines += [f"    {prompt[:80]!r}" for prompt, _ in missing[:PROBLEMS_SHOWN]]
            lines += [f"    and {len(missing) - PROBLEMS_SHOWN} more"] if len(missing) > PROBLEMS_SHOWN else []
    labels = [[table[key] for key in common] for table in tables]
    lines.append(f"n = {len(common)} rows")
    for number, (path, column) in enumerate(zip(paths, labels), start=1):
        lines.append(f"[{number}] {path}: {column.count('CONSTRAINED') / len(column):.3f} CONSTRAINED")

    def agreement(first: list[str], second: list[str]) -> float:
        return sum(one == other for one, other in zip(first, second)) / len(first)

    def kappa(first: list[str], second: list[str]) -> float:
        if len({*first, *second}) == 1:
            return float("nan")  # one label everywhere: 0 / 0
        return cohen_kappa_score(first, second, labels=QTYPES)

    for name, measure in (("agreement", agreement), ("kappa", kappa)):
        lines.append(f"{name:<12}" + " ".join(f"{f'[{number}]':>9}" for number in range(1, len(paths) + 1)))
        for number, first in enumerate(labels, start=1):
            cells = [measure(first, second) for second in labels]
            lines.append(f"{f'[{number}]':<12}" + " ".join(f"{'undefined' if np.isnan(cell) else f'{cell:.3f}':>9}" for cell in cells))
    return "\n".join(lines)
