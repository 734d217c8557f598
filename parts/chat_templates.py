"""Chat templates: one Jinja file each in `configs/chat_templates/`, or the tokenizer's own.

A template file is an ordinary Hugging Face chat template that also sets `stop_strings`, the literal texts at which a response
is over, and `role_headings`, the literal texts that announce a turn. Add a model family by adding a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from parts.errors import InputError
from parts.files import REPOSITORY, digest, file_digest, read_text
from parts.rows import say_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = REPOSITORY / "configs" / "chat_templates"
TOKENIZER_OWN = "tokenizer"
_MARK = "\ue000"  # a private-use character, which no instruction holds
_DAY = "26 Jul 2024"  # what a template that prints today's date prints: prompts are the same on every day


@dataclass(frozen=True)
class ChatTemplate:
    """A single-turn prompt format.

    Args:
        name: the file's name without `.jinja`, or "tokenizer".
        source: the Jinja text.
        stop_strings: literal texts that end a response.
        role_headings: literal texts that announce a turn.
        special_tokens: what the Jinja text may ask for (`bos_token`, `eos_token` ...).
    """

    name: str
    source: str
    stop_strings: tuple[str, ...]
    role_headings: tuple[str, ...]
    special_tokens: dict[str, str] = field(default_factory=dict)

    def render(self, instruction: str) -> str:
        """The prompt up to where the response begins."""
        return self.render_chat([{"role": "user", "content": instruction}], add_generation_prompt=True)

    def render_row(self, row: Mapping, field: str) -> str:
        """The prompt of a row: its turns where it keeps several (`messages`), else its field's text.

        Only a tokenizer's own template knows a system turn; for the others it begins the user's next one.
        """
        turns = row.get("messages") or []
        if len(turns) < 2:
            return self.render(row[field])
        return self.render_chat(turns if self.name == TOKENIZER_OWN else _without_system(turns), add_generation_prompt=True)

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Render `messages` ({"role", "content"}) through transformers' own Jinja machinery. Raises InputError where the template fails."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=self.source, add_generation_prompt=add_generation_prompt, **self.special_tokens
            )
        except (TemplateError, TypeError) as error:
            raise InputError(f"chat template '{self.name}': it cannot be rendered ({type(error).__name__}: {error})") from None
        return rendered[0]

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What stands before and after the instruction in a prompt, without outer white space."""
        before, after = self.render(_MARK).split(_MARK)
        return before.strip(), after.strip()

    def raw_instruction(self, prompt: str) -> str:
        """The instruction inside a rendered prompt; a text that is not a rendered prompt comes back stripped."""
        before, after = self._frame
        text = prompt.strip()
        if text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after):
            text = text[len(before) : len(text) - len(after)]
        return text.strip()

    def strip_response(self, response: str) -> str:
        """The response up to the first stop string, without outer newlines and spaces (before and after the cut)."""
        text = response.strip("\n ")
        if self.stop_strings:
            text = re.split("|".join(map(re.escape, self.stop_strings)), text, maxsplit=1)[0]
        return text.strip("\n ")


def _without_system(turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Turns whose last one is the user's, with each system turn at the beginning of the user's next one."""
    found, waiting = [], []
    for turn in turns:
        if turn["role"] == "system":
            waiting.append(turn["content"])
        elif turn["role"] == "user":
            found.append({"role": "user", "content": "\n\n".join([*waiting, turn["content"]])})
            waiting = []
        else:
            found.append(dict(turn))
    return found


def own_source(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A tokenizer's template, of several named ones the default; where it prints today's date, the same date on every day."""
    source = tokenizer.chat_template
    source = source.get("default") if isinstance(source, dict) else source
    if source is None or "strftime_now" not in source:
        return source
    say_once(f"chat template 'tokenizer': it prints today's date, which is {_DAY} on every day here")
    return f"{{%- macro strftime_now(format) %}}{_DAY}{{% endmacro %}}{source}"


def template_names() -> list[str]:
    """The names that `load_template` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja")) + [TOKENIZER_OWN]


def template_digest(template: ChatTemplate) -> str:
    """What tells a template from others of its name: a digest of its file, or of a tokenizer's own."""
    file = FOLDER / f"{template.name}.jinja"
    return file_digest(file) if file.is_file() else digest(asdict(template))


def load_template(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> ChatTemplate:
    """Load a template by name; "tokenizer" is the tokenizer's own, with its special tokens as stop strings and role headings.

    Raises:
        InputError: an unknown name, a file that lacks `stop_strings` or `role_headings`, a tokenizer without a chat template, or one whose
            template fails or leaves the instruction out.
    """
    if name == TOKENIZER_OWN:
        if tokenizer is None:
            raise InputError(
                "chat template 'tokenizer': no chat template of its own is known: no record names the model, expected a template by name"
            )
        source = own_source(tokenizer)
        if source is None:
            several = f", but others called {', '.join(tokenizer.chat_template)}" if tokenizer.chat_template else ""
            raise InputError(f"chat template 'tokenizer': this tokenizer has no chat template of its own{several}")
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        stops = tuple(sorted({str(token) for token in tokenizer.all_special_tokens}))
        own = ChatTemplate(name, source, stops, stops, special)
        if (count := own.render(_MARK).count(_MARK)) != 1:
            raise InputError(f"chat template 'tokenizer': a prompt holds the instruction {count} times, expected once")
        return own
    if name not in template_names():
        raise InputError(f"unknown chat template '{name}', expected one of {', '.join(template_names())}")
    return _load_file(FOLDER / f"{name}.jinja")


def _load_file(path: Path) -> ChatTemplate:
    source = read_text(path)
    example = [{"role": "user", "content": _MARK}]
    try:
        variables = ImmutableSandboxedEnvironment().from_string(source).make_module({"messages": example, "add_generation_prompt": True})
    except TemplateError as error:
        raise InputError(f"{path}: the template fails ({type(error).__name__}: {error})") from None
    if str(variables).count(_MARK) != 1:
        raise InputError(f"{path}: a prompt holds the instruction {str(variables).count(_MARK)} times, expected once")
    lists = []
    for variable in ("stop_strings", "role_headings"):
        texts = getattr(variables, variable, None)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"{path}: expected `set {variable} = [...]` with at least one text")
        lists.append(tuple(texts))
    return ChatTemplate(path.stem, source, *lists)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, rows: Sequence[Mapping], field: str, file: str = ""
) -> list[list[int]]:
    """Token ids of the prompts of rows (`render_row`). A control token that a row's text spells out is text, not a control token.

    Raises:
        InputError: a row that the template does not take, a system turn for some; it names the `file` that they are from, if any.
    """
    as_text, prompts = _marker(tokenizer, template), []
    for number, row in enumerate(rows, start=1):
        turns = [{**turn, "content": as_text(turn["content"])} for turn in row.get("messages") or []]
        try:
            prompts.append(template.render_row({field: as_text(row[field]), "messages": turns}, field))
        except InputError as error:
            raise InputError(f"{file}: row {number}: {error}" if file else str(error)) from None
    return encode_prompts(tokenizer, prompts)


def encode_answers(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of answers to learn, with the tokenizer's end of sequence. One that an answer ends with already is that end; elsewhere
    control tokens that it spells out are text."""
    as_text, end = _marker(tokenizer, template), tokenizer.eos_token
    pieces = [as_text(answer.removesuffix(end).rstrip()).split(_MARK) for answer in answers]
    return [
        [*(token for piece in own for token in tokenizer(piece, add_special_tokens=False)["input_ids"]), tokenizer.eos_token_id]
        for own in pieces
    ]


def _marker(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Callable[[str], str]:
    """Puts `_MARK` into the control tokens that a text spells out: pieces between marks are encoded apart."""
    control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    control |= {*template.stop_strings, *template.role_headings} & tokenizer.get_added_vocab().keys()
    split = "|".join(re.escape(token[0]) + f"(?={re.escape(token[1:])})" for token in sorted(control) if len(token) > 1)
    return lambda text: re.sub(split, rf"\g<0>{_MARK}", text) if split else text


def encode_instructions(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, instructions: list[str]) -> list[list[int]]:
    """As `encode_rows`, of rows that are one text each."""
    return encode_rows(tokenizer, template, [{"input": text} for text in instructions], "input")


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """Token ids of rendered prompts.

    The tokenizer adds the special tokens that it puts before a text, unless the prompt already starts with the first; what it puts after
    a text would end the prompt, and is left out. A prompt is encoded in pieces where `_MARK` stands in it.
    """
    bos, encoded = tokenizer.bos_token, []
    for prompt in prompts:
        first, *others = prompt.split(_MARK)
        plain = tokenizer(first, add_special_tokens=False, truncation=False)["input_ids"]
        ids = plain if bos and first.startswith(bos) else _without_end(tokenizer(first, truncation=False)["input_ids"], plain)
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        encoded.append(ids + [token for text in others for token in tokenizer(text, add_special_tokens=False)["input_ids"]])
    return encoded


def _without_end(ids: list[int], plain: list[int]) -> list[int]:
    """`ids`, which holds the ids of the `plain` text, up to where these end."""
    if not plain:
        return ids
    starts = (start for start in range(len(ids) - len(plain) + 1) if ids[start : start + len(plain)] == plain)
    start = next(starts, None)
    return ids if start is None else ids[: start + len(plain)]
