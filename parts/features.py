"""What a white-box feature is: a function, and a line about it, from which its flag, help text and columns follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from functools import cached_property

import regex

from parts.cli import Settings, setting
from parts.rows import QTYPES

PROXY = ("the proxy reward", "LI is the length incentive, RP the repetition penalty, QR and RAR are relevances by a sentence encoder M.")
UNBRANCHED = "any row of a reward without branches"
OPTIONS = ("length_target", "max_sequence_length")  # settings that a feature's function may read


def tokens_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores, and runs of other marks: what nltk's `wordpunct_tokenize` gives, which takes a second to import.

    nltk reads the pattern with the `regex` package, to which "\u00b2" is no letter or digit; to `re` it is one.
    """
    return regex.findall(r"\w+|[^\w\s]+", text)


@dataclass(frozen=True)
class Feature:
    """A line of `FEATURES`: everything about a feature that its function does not say.

    Args:
        column: its name in scores, logs, tables and records.
        function: computes it. The names of its parameters say what it reads of a row:
            "tokens" and "text", the response cut at its first stop string, as `tokens_of` gives its tokens and as text;
            "response", uncut; "query", "reference" and any other column of the dataset;
            "response_embeddings", "query_embeddings", "reference_embeddings", [rows, dimension]: it then returns a list, a value a row;
            "length_target" and "max_sequence_length", the settings.
        switch: the flag that turns it on. Its help text is the first sentence of the function's docstring.
        default: whether it is on unless a flag says otherwise.
        rows: the rows whose reward it multiplies: those of a query type under branching, `UNBRANCHED` without.
        scale: what it is put through before it multiplies, with `max_sequence_length`; its column shows the raw value.
        symbol: its name in tables of designs.
        always_shown: its column is there where it is off, too, if no model has to be loaded for it.
    """

    column: str
    function: Callable
    switch: str
    default: bool = False
    rows: Sequence[str] = (UNBRANCHED, *QTYPES)
    scale: Callable[[float, int], float] | None = None
    symbol: str = ""
    always_shown: bool = False

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The names of the function's parameters."""
        return tuple(inspect.signature(self.function).parameters)

    @property
    def is_embedded(self) -> bool:
        return any(name.endswith("_embeddings") for name in self.reads)

    @property
    def columns(self) -> list[str]:
        """The columns of a batch that it reads besides "response"."""
        names = [name.removesuffix("_embeddings") for name in self.reads]
        return [name for name in names if name not in ("response", "text", "tokens", *OPTIONS)]

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return inspect.getdoc(self.function).split("\n")[0].split(". ")[0]


def by_switch(features: Sequence[Feature]) -> dict[str, list[Feature]]:
    """The features that each switch turns on."""
    switches: dict[str, list[Feature]] = {}
    for feature in features:
        switches.setdefault(feature.switch, []).append(feature)
    return switches


def switches_of(features: Sequence[Feature]) -> type[Settings]:
    """A dataclass of settings with a flag for each switch, whose help text is what its features' docstrings say."""
    fields = []
    for switch, turned_on in by_switch(features).items():
        help_text = f"proxy reward: {'; '.join(feature.summary for feature in turned_on)}"
        fields.append((switch, bool, setting(turned_on[0].default, help_text, group=None if fields else PROXY)))
    return make_dataclass("Switches", fields, bases=(Settings,))
