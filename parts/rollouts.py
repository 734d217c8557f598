"""Rollouts as jobs: what a finished one leaves, how an unfinished one resumes, and the rows that are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parts.errors import InputError
from parts.files import JsonLines, clear_leftovers, read_json
from parts.locks import alone_at
from parts.runs import Checkpoint, meta_path, partial_path

if TYPE_CHECKING:
    from accelerate import PartialState

    from parts.chat_templates import ChatTemplate
    from parts.generation import HFEngine
    from parts.sampling import Decoding
    from parts.vllm_engines import VLLMEngine


@dataclass(frozen=True)
class Job:
    """One evaluation of one checkpoint.

    Args:
        files: the files to write, each with a fingerprint of all that its responses depend on.
        columns: by file, a digest of all that it holds besides responses.
        prompts: token ids by row.
        stream: what has draws of its own, as in `sampling.draw_key`.
        ends: the tokens at which a response is over.
        num_samples: responses to each prompt.
    """

    checkpoint: Checkpoint
    evaluation: str
    files: dict[Path, str]
    columns: dict[Path, str]
    template: ChatTemplate
    prompts: list[list[int]]
    decoding: Decoding
    stream: str
    ends: frozenset[int]
    num_samples: int = 1

    @property
    def target(self) -> Path:
        """The file that holds all that is drawn."""
        return next(iter(self.files))

    def is_done(self) -> bool:
        """Whether the files are there, made as they would be now, which is then said. Raises InputError where one was made otherwise."""
        there = [file for file in self.files if file.exists()]
        for file in there:
            meta = read_json(meta_path(file)) if meta_path(file).is_file() else {}
            if meta.get("fingerprint") != self.files[file]:
                raise InputError(f"{file}: exists already, made otherwise (--overwrite=true replaces it)")
            if meta.get("columns", self.columns[file]) != self.columns[file]:
                raise InputError(f"{file}: exists already, of the same prompts with other columns (--overwrite=true replaces it)")
        if len(there) == len(self.files):
            print(f"{self.target}: is there already, made as it would be now")
            with alone_at(self.target) as alone:
                if alone:
                    self.clear()
        return len(there) == len(self.files)

    def clear(self) -> None:
        """Remove what kills left beside files that are whole."""
        shutil.rmtree(partial_path(self.target), ignore_errors=True)
        for path in self.files:
            clear_leftovers(path)
            clear_leftovers(meta_path(path))


def generate_all(job: Job, engine: HFEngine | VLLMEngine, seed: int, processes: PartialState) -> list[list[int]] | None:
    """The responses to the prompts: from the partial folder where they are known already, and generated where they are not.

    Each process generates its share, and appends it to a file of its own. The first samples are drawn apart from the others, in the
    batches that they would have alone: so not even the rounding of their logits depends on how many are asked for.

    Returns:
        Token ids on the main process, the first sample of every prompt, then the second of every prompt ...; None on other processes.
    """
    folder, target, is_main = partial_path(job.target), job.target.name, processes.is_main_process
    rows, count = len(job.prompts), len(job.prompts) * job.num_samples
    marker = folder / "fingerprint"
    if is_main:
        for path in job.files:
            clear_leftovers(path)
            clear_leftovers(meta_path(path))
    if is_main and not (marker.is_file() and marker.read_text(encoding="utf-8") == job.files[job.target]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marker.write_text(job.files[job.target], encoding="utf-8")
    processes.wait_for_everyone()
    known = read_partial(folder)
    processes.wait_for_everyone()
    if is_main and known:
        print(f"{target}: {len(known)} of {count} {'rows' if count == rows else 'responses'} are known from an earlier start")
    log = JsonLines(folder / f"rows_{processes.process_index}_{os.getpid()}.jsonl")
    for numbers, which in ((range(rows), ""), (range(rows, count), ", further samples")):
        missing = [number for number in numbers if number not in known][processes.process_index :: processes.num_processes]
        if missing:

            def finished(place: int, response: list[int], missing: list[int] = missing) -> None:
                log.append([missing[place], response])

            places, samples = [number % rows for number in missing], [number // rows for number in missing]
            wanted = [job.prompts[place] for place in places]
            title = target + which if is_main else None
            engine.generate(job.checkpoint.adapter, wanted, job.decoding, seed, places, finished, title, job.stream, samples, job.ends)
    processes.wait_for_everyone()
    if not is_main:
        return None
    known = read_partial(folder)
    return [known[number] for number in range(count)]


def read_partial(folder: Path) -> dict[int, list[int]]:
    """Responses from the files of a partial folder, by number: that of the sample times the number of rows, plus that of the row."""
    return {number: response for path in sorted(folder.glob("rows_*.jsonl")) for number, response in JsonLines(path).read()}


def alpaca_rows(data: Sequence[Mapping], texts: Sequence[str], generator: str) -> list[dict]:
    """Rows in AlpacaEval's format."""
    rows = []
    for row, text in zip(data, texts):
        kept = {"dataset": row.get("dataset", "unknown"), "instruction": row["instruction"]}
        kind = {"qtype": row["qtype"]} if "qtype" in row else {}
        rows.append({**kept, "output": text.strip(), "generator": generator, **kind})
    return rows


def sample_rows(data: Sequence[Mapping], texts: Sequence[str], finished: Sequence[bool], generator: str) -> list[dict]:
    """Rows of `{dataset, instruction, messages, reference, qtype, generator, responses}`, the last a list of `{output, finish_reason}`.

    A finish reason is "stop" for a response that ended by itself, "length" for one that was cut. What `data` lacks is left out.

    Args:
        data: rows of the AlpacaEval schema.
        texts, finished: of the first sample of every row, then of the second of every row ...
        generator: whose responses they are.
    """
    rows = []
    for place, row in enumerate(data):
        kept = {"dataset": row.get("dataset", "unknown"), "instruction": row["instruction"]}
        kept |= {name: row[own] for name, own in (("messages", "messages"), ("reference", "output"), ("qtype", "qtype")) if own in row}
        own = zip(texts[place :: len(data)], finished[place :: len(data)])
        responses = [{"output": text.strip(), "finish_reason": "stop" if ended else "length"} for text, ended in own]
        rows.append({**kept, "generator": generator, "responses": responses})
    return rows
