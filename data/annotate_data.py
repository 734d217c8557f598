"""Give rows their query type (`qtype`) and, where they lack one, a reference answer (`output`).

    python data/annotate_data.py data/mine.json --annotator openai --model gpt-4o-mini --output data/mine_annotated.json
    python data/annotate_data.py data/mine.json --annotator local --model HuggingFaceTB/SmolLM2-1.7B-Instruct --output ...
    python data/annotate_data.py data/mine.json --annotator classifier --train_from data/train.json --model outputs/qtype_classifier --output ...
    python data/annotate_data.py --compare a.json b.json c.json      # agreement and Cohen's kappa between annotated files

Rows are {"input" or "instruction", "output"?, "qtype"?}; all other fields are kept, and so is their order. A row keeps a valid qtype
(`--overwrite_labels=true` gives it a new one). `--add_references=true` fills in the outputs that are missing.

    openai       any API of OpenAI's form: the key is OPENAI_API_KEY, the address --base_url or OPENAI_BASE_URL. --estimate_only=true
                 prints what it would cost and sends nothing.
    local        a language model, which labels a row with the likelier of the two names after the same prompt.
    classifier   logistic regression on words and an embedding, trained on --train_from and kept in <model>/classifier.json; without
                 --train_from the one that is there is used.

Output: a list of rows, and <output>.meta.json, how they were made. A file is there when it is whole. Interrupted, or with rows that
got no answer, openai and local leave <output>.partial.jsonl, and the same command goes on from there.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parts.cli import parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import digest, file_digest, write_json
from parts.models import check_device, check_model_name, loading
from parts.qtype_classifier import PROBE, QtypeClassifier, cross_validate, embed, label_logprobs, label_prompt, require_both_labels
from parts.rows import QTYPES, read_rows
from parts.runs import provenance

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

ANNOTATORS = ("openai", "local", "classifier")
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


@dataclass
class AnnotationSettings:
    data: list[str] = setting([], "the file of rows: .json, .jsonl, or either gzipped", positional=True)
    annotator: str = setting("", "who annotates: openai, local or classifier")
    model: str = setting("", "openai: the API's name of a model; local: hub name or folder; classifier: its folder")
    output: str = setting("", "file that receives the rows, .json")
    overwrite_labels: bool = setting(False, "give a new qtype to rows that have a valid one, too")
    add_references: bool = setting(False, "openai and local: answer the rows that have no output")
    max_new_tokens: int = setting(512, "longest added reference in tokens")
    base_url: str = setting("", "openai: address of the API; empty means OPENAI_BASE_URL, else OpenAI's own")
    concurrency: int = setting(8, "openai: requests at a time")
    max_retries: int = setting(5, "openai: how often a request is sent again, ever later, after 408, 409, 429, 5xx and lost connections")
    price_input: float = setting(0.0, "openai: USD per million input tokens, for the estimate; 0 means unknown")
    price_output: float = setting(0.0, "openai: USD per million output tokens, for the estimate; 0 means unknown")
    estimate_only: bool = setting(False, "openai: print the estimate and send nothing")
    chat_template_name: str = setting("tokenizer", "local: a template of configs/chat_templates/, or the tokenizer's own")
    train_from: str = setting("", "classifier: labelled rows to train on; empty means that it is trained already")
    encoder: str = setting("models/all-MiniLM-L6-v2", "classifier: sentence encoder, hub name or folder")
    seed: int = setting(42, "classifier: seed of the folds")
    batch_size: int = setting(16, "local and classifier: texts at a time")
    device: str = setting("", "local and classifier: cuda, cpu, ...; empty means the GPU where there is one")
    cache_dir: str = setting("", "local and classifier: where hub downloads are kept; empty means the default cache")

    def __post_init__(self) -> None:
        if self.annotator not in ANNOTATORS:
            raise InputError(f"--annotator is {self.annotator!r}, expected {' or '.join(ANNOTATORS)}")
        if not self.model:
            raise InputError("--model is missing")
        if not self.output.endswith(".json"):
            raise InputError(f"--output is {self.output!r}, expected a .json file")
        if Path(self.output).exists():
            raise InputError(f"{self.output}: exists already, expected a new --output")
        for name in ("concurrency", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least 1")
        for name in ("max_retries", "price_input", "price_output"):
            if not getattr(self, name) >= 0:  # a price may be given as NaN
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least 0")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}, expected 0 to 2**32 - 1")
        if self.annotator == "classifier" and self.add_references:
            raise InputError("--add_references: the classifier writes no answers, expected --annotator openai or local")
        for name, annotator in (("estimate_only", "openai"), ("train_from", "classifier")):
            if getattr(self, name) and self.annotator != annotator:
                raise InputError(f"--{name} is for --annotator {annotator} alone")


@dataclass
class ComparisonSettings:
    compare: list[str] = setting([], "annotated files, at least two")


# ------------------------------------------------------------------------------------------------------------------- rows


def read_prompts(path: str) -> tuple[list[dict], list[str]]:
    """Rows of either schema, and the instruction of each.

    Raises:
        InputError: an unusable file, a row with both or neither of `input` and `instruction`, an empty instruction, or an output that is
            not text.
    """
    rows = read_rows(path, {})
    prompts = []
    for number, row in enumerate(rows, start=1):
        names = [name for name in ("input", "instruction") if name in row]
        if len(names) != 1:
            found = "both 'input' and 'instruction'" if names else "neither 'input' nor 'instruction'"
            raise InputError(f"{path}: row {number}: found {found}, expected one of them with the whole instruction")
        value = row[names[0]]
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{path}: row {number}: field '{names[0]}' is {value!r}, expected an instruction")
        if not isinstance(row.get("output") or "", str):
            raise InputError(f"{path}: row {number}: field 'output' is {type(row['output']).__name__}, expected text")
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
    """Answers by question, in a file of one line each that grows as they come and that a later start reads.

    Questions asked otherwise (another model, another prompt ...) have other keys: their lines are not seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writing = threading.Lock()
        self.known: dict[str, dict] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.split("\n"):
            try:
                found = json.loads(line)
                self.known[found["key"]] = found
            except (ValueError, TypeError, KeyError):
                continue  # cut short when the process was killed: as good as none
        self.file = path.open("a", encoding="utf-8") if text else None
        if text and not text.endswith("\n"):
            self.file.write("\n")

    def put(self, question: Question, answer: str, **facts: int) -> None:
        """Keep an answer at once; `facts` are what it cost."""
        with self.writing:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("a", encoding="utf-8")
            self.known[question.key] = {"key": question.key, "answer": answer, **facts}
            self.file.write(json.dumps(self.known[question.key]) + "\n")
            self.file.flush()

    def remove(self) -> None:
        """Delete the file: the result is whole."""
        if self.file is not None:
            self.file.close()
        self.path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------- openai


class Refusal(ValueError):
    """A question that the API does not answer, and why; others may fare better."""


def api_address(base_url: str) -> str:
    """Where the API is. Raises InputError for an address that is none, or that has a secret in it: addresses are recorded."""
    address = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    if not address.startswith(("http://", "https://")):
        raise InputError(f"--base_url is {address!r}, expected http:// or https://")
    if "@" in address or "?" in address:
        raise InputError("--base_url holds a user, a password or a query, expected the key in OPENAI_API_KEY and nothing in the address")
    return address


def api_request(settings: AnnotationSettings, address: str, field: str, prompt: str) -> dict:
    """The body of a chat completion, under the address it goes to."""
    label = field == "qtype"
    body = {
        "model": settings.model,
        "messages": [{"role": "user", "content": label_prompt(prompt) if label else prompt}],
        "temperature": 0,
        "max_tokens": LABEL_TOKENS if label else settings.max_new_tokens,
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
            raise ConnectionError(f"{address}: {status} after {client.max_retries} retries; the same command goes on") from None
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


def ask_all(settings: AnnotationSettings, questions: Sequence[Question], answers: Answers) -> list[tuple[Question, str]]:
    """Put questions to the API, `concurrency` at a time.

    Returns:
        The questions that got no usable answer, each with the reason.
    """
    from openai import OpenAI

    refused = []
    address = questions[0].request["address"]
    client = OpenAI(base_url=address, max_retries=settings.max_retries, timeout=REQUEST_SECONDS)
    pool = ThreadPoolExecutor(settings.concurrency)
    try:
        futures = {pool.submit(ask, client, question, answers): question for question in questions}
        for future in tqdm(as_completed(futures), total=len(futures), desc=settings.model, unit="request"):
            try:
                future.result()
            except Refusal as refusal:
                refused.append((futures[future], str(refusal)))
    finally:
        pool.shutdown(cancel_futures=True)  # what was sent is paid for: its answers are waited for and kept
    return refused


# ------------------------------------------------------------------------------------------------------------------ local


def answer_locally(settings: AnnotationSettings, questions: Sequence[Question], answers: Answers) -> None:
    """Label and answer with a local language model, greedily.

    Raises:
        InputError: the model cannot be loaded, or a prompt is too long for it.
    """
    import torch
    from transformers import AutoConfig

    from parts.chat_templates import encode_prompts, load_template
    from parts.generation import Decoding, HFEngine, generate_responses
    from parts.models import load_tokenizer

    tokenizer = load_tokenizer(settings.model, settings.cache_dir or None)
    template = load_template(settings.chat_template_name, tokenizer)
    with loading(settings.model, "a causal language model"):
        config = AutoConfig.from_pretrained(settings.model, cache_dir=settings.cache_dir or None)
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    names = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in QTYPES]
    added = {"qtype": max(map(len, names)), "output": settings.max_new_tokens}
    asked: dict[str, list[Question]] = {"qtype": [], "output": []}
    prompts: dict[str, list[list[int]]] = {"qtype": [], "output": []}
    encoded = encode_prompts(tokenizer, [template.render(question.request["prompt"]) for question in questions])
    for question, tokens in zip(questions, encoded):
        length = len(tokens) + added[question.field]
        if length > limit:
            where = f"{settings.data[0]}: row {question.rows[0] + 1}"
            raise InputError(f"{where}: prompt and response take up to {length} tokens, {settings.model} takes {limit}")
        asked[question.field].append(question)
        prompts[question.field].append(tokens)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = HFEngine(settings.model, tokenizer, device, settings.batch_size, settings.cache_dir or None).model

    def labelled(place: int, logprobs: list[float]) -> None:
        answers.put(asked["qtype"][place], QTYPES[int(np.argmax(logprobs))])

    def answered(place: int, response: list[int]) -> None:
        text = template.strip_response(tokenizer.decode(response, skip_special_tokens=True))
        answers.put(asked["output"][place], text, references_cut=int(response[-1] != tokenizer.eos_token_id))

    if prompts["qtype"]:
        label_logprobs(model, prompts["qtype"], names, settings.batch_size, labelled, "labels")
    if prompts["output"]:
        decoding = Decoding(settings.max_new_tokens, temperature=0)
        generate_responses(model, tokenizer, prompts["output"], decoding, settings.batch_size, 0, "references", finished=answered)


# ------------------------------------------------------------------------------------------------------------- classifier


def classify(settings: AnnotationSettings, prompts: Sequence[str]) -> tuple[list[str], dict]:
    """The query types of instructions by a classifier, trained first where `train_from` is given, and the record of its training."""
    path = Path(settings.model) / "classifier.json"
    if settings.train_from:
        rows, texts = read_prompts(settings.train_from)
        read_rows(settings.train_from, {"qtype": QTYPES})
        constrained = np.array([row["qtype"] == "CONSTRAINED" for row in rows])
        require_both_labels(constrained, settings.train_from)
    classifier = None if settings.train_from else QtypeClassifier.load(path)
    check_model_name(settings.encoder)

    from parts.relevance import RelevanceModel

    encoder = RelevanceModel(settings.encoder, settings.device or None, settings.batch_size, settings.cache_dir or None)
    probe = encoder.embed([PROBE]).numpy()[0]

    if classifier is None:
        vectors = embed(encoder, texts, "training rows")
        measured = cross_validate(texts, vectors, constrained, settings.seed)
        print(
            f"five-fold accuracy {measured['accuracy']:.4f}, standard error {measured['standard_error']:.4f} ({len(rows)} rows, "
            f"the commoner label {measured['majority']:.4f}; by fold {', '.join(f'{value:.4f}' for value in measured['by_fold'])})"
        )
        record = provenance(
            train_from=settings.train_from, digest=file_digest(settings.train_from), rows=len(rows), encoder=settings.encoder,
            seed=settings.seed, cross_validation=measured,
        )  # fmt: skip
        classifier = QtypeClassifier.fit(texts, vectors, constrained, probe, record)
        classifier.save(path)
        print(path)
    else:
        classifier.check_encoder(settings.encoder, probe)
    found = classifier.probabilities(prompts, embed(encoder, prompts, "rows")) > 0.5 if prompts else []
    return ["CONSTRAINED" if constrained else "OPENENDED" for constrained in found], classifier.record


# ---------------------------------------------------------------------------------------------------------------- compare


def compare_files(paths: Sequence[str]) -> str:
    """Share of equal labels and Cohen's kappa (Cohen, 1960) of every two files, over the prompts that all of them have.

    A prompt that a file has several times is matched in order. Raises InputError for an unusable file, or where no prompt is in all.
    """
    from sklearn.metrics import cohen_kappa_score

    if len(paths) < 2:
        raise InputError("--compare names one file, expected at least two")
    tables = []
    for path in paths:
        rows, prompts = read_prompts(path)
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


# ------------------------------------------------------------------------------------------------------------------- main


def require_answers(refused: Sequence[tuple[Question, str]], partial: Path) -> None:
    """Name the rows that got no answer on stderr, and raise InputError if there are any."""
    problems = sorted((row, question.field, reason) for question, reason in refused for row in question.rows)
    for row, field, reason in problems[:PROBLEMS_SHOWN]:
        print(f"row {row + 1}: no {field}: {reason}", file=sys.stderr)
    if problems:
        raise InputError(
            f"{len(problems)} answers are missing; the others are kept in {partial}, and the same command asks for these again"
        )


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "--compare" in sys.argv[1:]:
        print(compare_files(parse_settings(ComparisonSettings, description=__doc__).compare))
        return
    settings = parse_settings(AnnotationSettings, description=__doc__)

    # 1. What there is to do, and everything a user can get wrong.
    if len(settings.data) != 1:
        raise InputError(f"{len(settings.data)} files of rows, expected one")
    rows, prompts = read_prompts(settings.data[0])
    places = {"qtype": [row for row, found in enumerate(rows) if settings.overwrite_labels or lacks_qtype(found)], "output": []}
    if settings.add_references:
        places["output"] = [row for row, found in enumerate(rows) if lacks_output(found)]
    counts = {
        "rows": len(rows),
        "labels_kept": len(rows) - len(places["qtype"]),
        "labels_to_give": len(places["qtype"]),
        "labels_invalid": sum(bool(row.get("qtype")) and lacks_qtype(row) for row in rows),
        "references_to_add": len(places["output"]),
        "references_missing": sum(map(lacks_output, rows)),
    }
    print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
    if settings.annotator != "openai":
        check_device(settings.device)
    if settings.annotator == "local":
        check_model_name(settings.model)

    # 2. Labels and references.
    answers = None
    record: dict = {}
    given: dict[str, dict[int, str]] = {"qtype": {}, "output": {}}
    if settings.annotator == "classifier":
        labels, record["classifier"] = classify(settings, [prompts[row] for row in places["qtype"]])
        given["qtype"] = dict(zip(places["qtype"], labels))
    else:
        answers = Answers(Path(f"{settings.output}.partial.jsonl"))
        if settings.annotator == "openai":
            address = record["address"] = api_address(settings.base_url)
            questions = questions_of(prompts, places, lambda field, prompt: api_request(settings, address, field, prompt))
        else:
            facts = {"model": settings.model, "template": settings.chat_template_name}
            lengths = {"qtype": 0, "output": settings.max_new_tokens}
            asked = {"qtype": label_prompt, "output": str}
            questions = questions_of(
                prompts, places, lambda field, prompt: {**facts, "prompt": asked[field](prompt), "max_new_tokens": lengths[field]}
            )
        new = [question for question in questions if question.key not in answers.known]
        if len(new) < len(questions):
            print(f"{len(questions) - len(new)} of {len(questions)} answers are known from an earlier start")
        if settings.annotator == "openai":
            print(estimate(new, settings.price_input, settings.price_output))
            if settings.estimate_only:
                return
            if new and not os.environ.get("OPENAI_API_KEY"):
                raise InputError("OPENAI_API_KEY is not set, expected the API's key in the environment")
        if new and settings.annotator == "openai":
            require_answers(ask_all(settings, new, answers), answers.path)
        elif new:
            answer_locally(settings, new, answers)
        found = [answers.known[question.key] for question in questions]
        record["usage"] = {
            name: sum(one.get(name, 0) for one in found) for name in ("input_tokens", "output_tokens", "retries", "references_cut")
        }
        print(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in record["usage"].items()))
        for question, one in zip(questions, found):
            given[question.field] |= dict.fromkeys(question.rows, one["answer"])

    # 3. Files.
    annotated = []
    for number, row in enumerate(rows):
        added = {field: given[field][number] for field in ("output", "qtype") if number in given[field]}
        annotated.append({**row, **added})
    counts |= {qtype: sum(row["qtype"] == qtype for row in annotated) for qtype in QTYPES}
    counts["references_still_missing"] = sum(map(lacks_output, annotated))
    meta = provenance(
        settings=asdict(settings), model=settings.model, seed=settings.seed, digest=file_digest(settings.data[0]), counts=counts
    )
    write_json(Path(settings.output).with_suffix(".meta.json"), {**meta, **record})
    write_json(settings.output, annotated)
    if answers is not None:
        answers.remove()
    print(", ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in (*QTYPES, "references_still_missing")))
    print(settings.output)


if __name__ == "__main__":
    run_main(main)
