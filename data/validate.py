"""All problems of data files at once, and what their rows look like.

    python data/validate.py data/train.json data/dev.json --against data/eval.json
    python data/validate.py my_rows.jsonl.gz --require output qtype --tokenizer $MODEL_NAME --max_prompt_length 512

Files hold training or development rows {input, output, qtype} or evaluation rows {instruction, output, ...}, told apart by their first
row: `.json` (one list) or `.jsonl`, either also gzipped. Exit code 2 where a file has an error, 0 where it has warnings alone. A file
is read once and never held in memory.
"""

from __future__ import annotations

import os
import sys

# The modules lie one folder up, which Python does not search for a script in a folder of its own.
sys.path.insert(0, os.path.realpath(f"{__file__}/../.."))

import parts  # noqa: F401 - first, so that a signal is one line from here on

# isort: split

from dataclasses import asdict, dataclass
from pathlib import Path

from parts.cli import Settings, parse_settings, setting
from parts.data_checks import Tokens, examine, index_prompts
from parts.errors import InputError, run_main
from parts.files import check_writable, write_json
from parts.models import check_tokenizer_name
from parts.runs import provenance


@dataclass
class ValidationSettings(Settings):
    files: list[str] = setting([], "files of rows", positional=True, path=True)
    require: list[str] = setting([], "fields that every row must have besides its prompt; the paper's reward reads output and qtype")
    against: list[str] = setting([], "files of evaluation prompts, which no other file should hold", path=True)
    tokenizer: str = setting("", "count tokens with the tokenizer of this model: hub name or folder", path=True)
    chat_template_name: str = setting("alpaca", "template that prompts are counted in, as in run_ppo.py")
    max_prompt_length: int = setting(512, "with a tokenizer, training prompts must have fewer tokens than this")
    long_text: int = setting(20000, "characters from which a text is called long")
    show: int = setting(20, "how many problems of each kind to list")
    output: str = setting("", "file for the report, as JSON", written=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show < 0:
            raise InputError(f"--show is {self.show}, expected 0 or more")
        for name in ("max_prompt_length", "long_text"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least 1")


def load_tokens(settings: ValidationSettings) -> Tokens | None:
    """The tokenizer in its template, where one was asked for. Raises InputError where either cannot be loaded."""
    if not settings.tokenizer:
        return None
    check_tokenizer_name(settings.tokenizer)
    from parts.chat_templates import load_template
    from parts.models import load_tokenizer

    tokenizer = load_tokenizer(settings.tokenizer)
    return Tokens(tokenizer, load_template(settings.chat_template_name, tokenizer), settings.max_prompt_length)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = parse_settings(ValidationSettings, description=__doc__)
    inputs = [*settings.files, *settings.against]
    if settings.output and any(Path(settings.output).resolve() == Path(path).resolve() for path in inputs):
        raise InputError(f"--output is {settings.output}, which is one of the files to validate")
    if settings.output:
        check_writable(settings.output)
    tokens = load_tokens(settings)
    against = {path: index_prompts(path) for path in settings.against}

    reports = []
    for path in settings.files:
        report = examine(path, settings.require, against, settings.long_text, settings.show, tokens)
        print(report.describe())
        reports.append(report)
    if settings.output:
        record = provenance(model=settings.tokenizer, template=settings.chat_template_name, settings=asdict(settings))
        write_json(settings.output, {"files": [report.content() for report in reports], "provenance": record})
    broken = [report for report in reports if report.errors]
    if broken:
        errors = sum(sum(report.errors.values()) for report in broken)
        raise InputError(f"{errors} problem{'s' * (errors != 1)} in {len(broken)} of {len(reports)} files")


if __name__ == "__main__":
    run_main(main)
