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

Output: a list of rows, and <output>.meta.json, how they were made. Files are written atomically: one that exists is
complete. After an interruption, or if rows got no answer, openai and local leave <output>.partial.jsonl; the same command resumes there.
"""

from __future__ import annotations

import os
import sys

# The modules lie one folder up, which Python does not search for a script in a folder of its own.
sys.path.insert(0, os.path.realpath(f"{__file__}/../.."))

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from parts.annotators import (
    PROBLEMS_SHOWN,
    Answers,
    Question,
    answer_locally,
    api_address,
    api_request,
    ask_all,
    classify,
    compare_files,
    estimate,
    lacks_output,
    lacks_qtype,
    local_request,
    questions_of,
    rows_and_instructions,
)
from parts.cli import Settings, parse_settings, setting
from parts.errors import InputError, run_main
from parts.files import file_digest, write_json
from parts.locks import hold
from parts.models import check_device, check_whole_model, model_identity, use_cache
from parts.rows import QTYPES
from parts.runs import provenance

ANNOTATORS = ("openai", "local", "classifier")


@dataclass
class AnnotationSettings(Settings):
    data: list[str] = setting([], "the file of rows: .json, .jsonl, or either gzipped", positional=True, path=True)
    annotator: str = setting("", "who annotates: openai, local or classifier")
    model: str = setting("", "openai: the API's name of a model; local: hub name or folder; classifier: its folder", written=True)
    output: str = setting("", "file that receives the rows, .json", written=True)
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
    train_from: str = setting("", "classifier: labelled rows to train on; empty means that it is trained already", path=True)
    encoder: str = setting("models/all-MiniLM-L6-v2", "classifier: sentence encoder, hub name or folder", path=True)
    seed: int = setting(42, "classifier: seed of the folds")
    batch_size: int = setting(16, "local and classifier: texts at a time")
    device: str = setting("", "local and classifier: cuda, cpu, ...; empty means the GPU where there is one")
    cache_dir: str = setting("", "local and classifier: where hub downloads are kept; empty means the default cache", written=True)

    def __post_init__(self) -> None:
        super().__post_init__()
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
class ComparisonSettings(Settings):
    compare: list[str] = setting([], "annotated files, at least two", path=True)


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
    use_cache(settings.cache_dir)

    # 1. What there is to do, and everything a user can get wrong.
    if len(settings.data) != 1:
        raise InputError(f"{len(settings.data)} files of rows, expected one")
    rows, prompts = rows_and_instructions(settings.data[0])
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
        check_whole_model(settings.model, "--model")

    # 2. Labels and references.
    answers = None
    record: dict = {}
    given: dict[str, dict[int, str]] = {"qtype": {}, "output": {}}
    if settings.annotator == "classifier":
        hold(settings.output)
        labels, record["classifier"] = classify(
            [prompts[row] for row in places["qtype"]], settings.model, settings.encoder, settings.train_from, settings.seed,
            settings.batch_size, settings.device, settings.cache_dir,
        )  # fmt: skip
        given["qtype"] = dict(zip(places["qtype"], labels))
    else:
        answers = Answers(Path(f"{settings.output}.partial.jsonl"))
        if settings.annotator == "openai":
            address = record["address"] = api_address(settings.base_url)
            request = partial(api_request, settings.model, address, max_new_tokens=settings.max_new_tokens)
        else:
            request = partial(
                local_request, model_identity(settings.model), settings.chat_template_name, max_new_tokens=settings.max_new_tokens
            )
        questions = questions_of(prompts, places, request)
        new = [question for question in questions if question.key not in answers.known]
        if len(new) < len(questions):
            print(f"{len(questions) - len(new)} of {len(questions)} answers are known from an earlier start")
        if settings.annotator == "openai":
            print(estimate(new, settings.price_input, settings.price_output))
            if settings.estimate_only:
                return
            if new and not os.environ.get("OPENAI_API_KEY"):
                raise InputError("OPENAI_API_KEY is not set, expected the API's key in the environment")
        hold(settings.output)
        if new and settings.annotator == "openai":
            require_answers(ask_all(new, answers, settings.concurrency, settings.max_retries), answers.path)
        elif new:
            answer_locally(
                new, answers, settings.data[0], settings.model, settings.chat_template_name, settings.max_new_tokens,
                settings.batch_size, settings.device, settings.cache_dir,
            )  # fmt: skip
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
