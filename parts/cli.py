"""Command lines and YAML files into one dataclass of settings; whatever is not a declared setting is an error.

A YAML setting means what the same words mean on the command line, and the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from parts.errors import InputError
from parts.files import read_text

Settings = TypeVar("Settings")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class _Parser(HfArgumentParser):
    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        if names[0].startswith("--no_"):  # a second spelling of --X=false
            options["help"] = argparse.SUPPRESS
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the settings)")


def setting(default: object, help: str, positional: bool = False) -> dataclasses.Field:
    """A dataclass field with its default and its help text; a positional one takes the words that no `--name` precedes."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), init=not positional, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def parse_settings(cls: type[Settings], arguments: Sequence[str] | None = None, description: str | None = None) -> Settings:
    """Parse `--name value` and `--name=value` into `cls`, with `--config FILE.yaml` supplying defaults.

    Args:
        cls: a dataclass, each field made by `setting`.
        arguments: the words of the command line; `sys.argv[1:]` by default.
        description: shown by `--help`.

    Raises:
        InputError: an unknown setting, a value of the wrong type, or an unusable YAML file.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config_parser = _Parser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    known, rest = config_parser.parse_known_args(arguments)
    parser = _Parser(cls, description=description, formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings; the command line overrides it")
    for field in dataclasses.fields(cls):
        if not field.init:
            parser.add_argument(field.name, nargs="+", help=field.metadata["help"])
    values = vars(parser.parse_args(_words_of_yaml(cls, known.config) + rest))
    settings = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.init})
    for field in dataclasses.fields(cls):
        if not field.init:
            setattr(settings, field.name, values[field.name])
    return settings


def _words_of_yaml(cls: type, path: str | None) -> list[str]:
    """The settings of a YAML file as words of a command line, so that both are read by the same rules."""
    if not path:
        return []
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise InputError(f"{path}: broken YAML{line}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of settings")
    names = {field.name for field in dataclasses.fields(cls)}
    words = []
    for name, value in content.items():
        if name not in names:
            raise InputError(f"{path}: unknown setting '{name}'")
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words
