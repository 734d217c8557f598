"""Command lines and YAML files into dataclasses of settings; whatever is not a declared setting is an error.

A YAML setting means what the same words mean on the command line, and the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from parts.errors import InputError
from parts.files import REPOSITORY, read_text


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each setting by its one name; its default, unless that is nothing or the help text tells it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=max(80, min(shutil.get_terminal_size().columns, 140)))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[-1 if action.dest == "help" else 0]
        return name if action.nargs == 0 else f"{name} {action.metavar} {'...' if action.nargs == '+' else ''}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        is_told = action.default in ("", None) or action.default == [] or "(default: " in action.help
        return action.help if is_told else super()._get_help_string(action)


_METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT"}


class _Parser(argparse.ArgumentParser):
    """Flags from fields made by `setting`, under the headings that some of them begin."""

    def __init__(self, classes: Sequence[type] = (), **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        group: Any = self
        for cls in classes:
            types = get_type_hints(cls)
            for field in dataclasses.fields(cls):
                if heading := field.metadata["group"]:
                    group = self.add_argument_group(heading[0], heading[1] or None)
                if field.init:
                    self._add_field(group, field, types[field.name])

    @staticmethod
    def _add_field(group: Any, field: dataclasses.Field, expected: Any) -> None:
        name, rules = field.name, field.metadata["rules"]
        if get_origin(expected) in (Union, UnionType):  # "or None"
            expected = next(each for each in get_args(expected) if each is not type(None))
        is_list = get_origin(expected) is list
        kind = get_args(expected)[0] if is_list else expected
        options: dict[str, Any] = {
            "default": field.default if field.default is not dataclasses.MISSING else field.default_factory(),
            "type": _truth if kind is bool else kind,
            "help": field.metadata["help"].replace("%", "%%"),
            "metavar": "PATH" if rules["path"] or rules["written"] else "|".join(filter(None, rules["choices"])) or _METAVARS[kind],
        }
        if is_list:
            options["nargs"] = "+"
        if kind is bool:
            options |= {"nargs": "?", "const": True}
        group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name, **options)
        if kind is bool and options["default"] is True:  # a second spelling of --X=false
            names = dict.fromkeys((f"--no_{name}", f"--no-{name.replace('_', '-')}"))
            group.add_argument(*names, dest=name, action="store_false", default=True, help=argparse.SUPPRESS)

    def parse_known_args(self, *words: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
        found, self.unknown = super().parse_known_args(*words, **options)
        return found, self.unknown

    def error(self, message: str) -> NoReturn:
        flags = [word.partition("=")[0] for word in getattr(self, "unknown", []) if word.startswith("--")]
        meant = [hint for flag in flags if (hint := did_you_mean(flag, self._option_string_actions))]
        raise InputError(f"{message}{''.join(meant)} (--help lists the settings)")


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The known name that a misspelt one is like, as words for the end of a message; empty where there is none."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.7)
    return f", did you mean {close[0]}?" if close else ""


def _truth(text: str) -> bool:
    """What a switch's value says, in TRL's and transformers' spellings."""
    known = {**dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True), **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False)}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r}, expected true or false")
    return known[text.lower()]


def setting(
    default: object,
    help: str,
    positional: bool = False,
    path: bool = False,
    written: bool = False,
    required: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
    expected: str = "",
    group: tuple[str, str] | None = None,
) -> dataclasses.Field:
    """A dataclass field with its default, its help text, and what it may be.

    Args:
        positional: the field takes the words that no `--name` precedes.
        path: the text is a file, a folder or a model: `found_path` is applied to it.
        written: the text is where something is written, so `normal_path` alone is applied to it.
        required: the text or list cannot be empty.
        least, above, most: bounds of a number; `above` is not allowed itself.
        choices: the texts allowed.
        expected: the error's words for what is allowed, where those made of the others do not say it well.
        group: the heading under which the help lists this field and those after it, and what is said under the heading.
    """
    bounds = {"at least": least, "more than": above, "at most": most}
    words = " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None)
    rules = {
        "path": path,
        "written": written,
        "required": required,
        "least": least,
        "above": above,
        "most": most,
        "choices": tuple(choices),
    }
    rules["expected"] = expected or words or " or ".join(choices)
    metadata = {"help": help, "rules": rules, "group": group}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), init=not positional, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """Base of the dataclasses of settings: normalises each field that holds paths, and checks its other rules.

    Raises:
        InputError: a value that its field does not allow.
    """

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name, None), types[field.name])
            value, rules = getattr(self, field.name, None), field.metadata["rules"]
            if value and (change := _change_of(rules)):
                setattr(self, field.name, [change(each) for each in value if each] if isinstance(value, list) else change(value))
            if rules["required"] and not value:
                raise InputError(f"--{field.name} is missing" + (f", expected {rules['expected']}" if rules["expected"] else ""))
            if not _is_allowed(value, rules):
                raise InputError(f"--{field.name} is {value!r}, expected {rules['expected']}")


def _check_type(name: str, value: object, expected: object) -> None:
    """Raises InputError for a value that the command line could not have given: one out of a record, for example."""
    if get_origin(expected) is list and isinstance(value, list):
        for each in value:
            _check_type(name, each, get_args(expected)[0])
        return
    allowed = {float: int | float, int: int, bool: bool, str: str}.get(expected)
    is_of_type = (
        isinstance(value, allowed) and (expected is bool or not isinstance(value, bool)) if allowed else get_origin(expected) is not list
    )
    if not is_of_type:
        raise InputError(f"--{name} is {value!r}, expected {'a list' if allowed is None else expected.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} is {value!r}, expected a finite number")


def _is_allowed(value: object, rules: Mapping) -> bool:
    """Whether a value is one of its choices and within its bounds (NaN is within none)."""
    return (
        (not rules["choices"] or value in rules["choices"])
        and (rules["least"] is None or value >= rules["least"])
        and (rules["above"] is None or value > rules["above"])
        and (rules["most"] is None or value <= rules["most"])
    )


def _change_of(rules: Mapping) -> Callable[[str], str] | None:
    """What is done to the texts of a field that holds paths; None for other fields."""
    return normal_path if rules["written"] else found_path if rules["path"] else None


def normal_path(text: str) -> str:
    """One spelling for each path: `~` expanded, no doubled or last slash, no `.` or `..` that can go; `.` itself gets its name.

    A leading "./" stays where nothing is there yet: it tells a folder's name from a hub's.
    """
    text = os.path.expanduser(text)  # noqa: PTH111 - a Path would drop a leading "./"
    normal = os.path.normpath(text)
    if os.path.realpath(normal) != os.path.realpath(text):  # beyond a link, `..` is not the folder that is spelled before it
        normal = str(Path(text))
    if Path(normal).name in ("", ".."):
        return os.path.abspath(normal)
    return f"./{normal}" if text.startswith("./") and not normal.startswith(".") and not os.path.lexists(normal) else normal


def found_path(text: str) -> str:
    """`normal_path` of what is read; where it is not here, but in the repository, it is that one.

    So scripts find what is shipped (data, models, assets) from any working directory. "file.py:name" is found by its file.
    """
    text = normal_path(text)
    file = Path(text.rpartition(":")[0] if ".py:" in text else text)
    if not file.is_absolute() and not file.exists() and (REPOSITORY / file).exists():
        return str(REPOSITORY / text)
    return text


def parse_settings(
    classes: type | Sequence[type],
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    typed_only: type | None = None,
    otherwise: str = "",
) -> Any:
    """Parse `--name value` and `--name=value` into dataclasses, with `--config FILE.yaml` supplying defaults.

    Args:
        classes: a dataclass, or several with different fields, each field made by `setting`.
        arguments: the words of the command line; `sys.argv[1:]` by default.
        description: shown by `--help`.
        typed_only: a dataclass whose fields have other defaults than its own, for instance those of a run's record.
        otherwise: the help's words for those defaults.

    Returns:
        An object of the class, or a list of one for each of several. With `typed_only` a list that ends with {name: value} of those of its
        fields that the user gave.

    Raises:
        InputError: an unknown setting, a value of the wrong type, or an unusable YAML file.
    """
    single = isinstance(classes, type)
    classes = [classes] if single else list(classes)
    every = [*classes, _all_optional(typed_only, otherwise)] if typed_only else classes
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config_parser = _Parser(add_help=False)
    config_parser.add_argument("--config", type=found_path, action="append", default=[])
    known, rest = config_parser.parse_known_args(arguments)
    if len(known.config) > 1:
        raise InputError(f"--config is given {len(known.config)} times, expected one file")
    fields = [field for cls in every for field in dataclasses.fields(cls)]
    words = " ".join(field.name.upper() for field in fields if not field.init)
    usage = f"%(prog)s {words} [--setting=value ...]" if words else "%(prog)s [--setting=value ...]"
    parser = _Parser(every, usage=usage, description=description, formatter_class=_Help)
    parser.add_argument("--config", metavar="PATH", help="YAML file of settings; the command line overrides it")
    for field in fields:
        if not field.init:
            parser.add_argument(field.name, nargs="+", help=field.metadata["help"])
    values = vars(parser.parse_args(_words_of_yaml({field.name for field in fields}, *known.config) + rest))
    parsed: list = []
    for cls in classes:
        settings = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.init})
        for field in dataclasses.fields(cls):
            if not field.init:
                change = _change_of(field.metadata["rules"])
                setattr(settings, field.name, [change(word) if change else word for word in values[field.name]])
        parsed.append(settings)
    if typed_only:
        names = [field.name for field in dataclasses.fields(typed_only)]
        parsed.append({name: values[name] for name in names if values[name] is not None})
    return parsed[0] if single and not typed_only else parsed


def _all_optional(cls: type, otherwise: str) -> type:
    """A dataclass with the fields of `cls`, each None unless it is given."""
    types = get_type_hints(cls)
    fields = [
        (
            field.name,
            types[field.name] | None,
            dataclasses.field(default=None, metadata={**field.metadata, "help": f"{field.metadata['help']} (default: {otherwise})"}),
        )
        for field in dataclasses.fields(cls)
    ]
    return dataclasses.make_dataclass(f"Optional{cls.__name__}", fields)


class _Words(yaml.SafeLoader):
    """YAML whose scalars stay the texts that are written, except null: 010 is no octal, and 1.10 a name. A key comes once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise ValueError(f"{name!r} comes twice, the second time at line {key.start_mark.line + 1}")
            seen.add(name)
        return super().construct_mapping(node, deep)


_Words.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _words_of_yaml(names: set[str], path: str = "") -> list[str]:
    """The settings of a YAML file as words of a command line, so both are read by the same rules. A null is not given."""
    if not path:
        return []
    text = read_text(path)
    try:
        content = _Words(text).get_single_data()
    except yaml.YAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise InputError(f"{path}: broken YAML{line}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a date that is none, thousands of brackets
        raise InputError(f"{path}: broken YAML ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of settings")
    words = []
    for name, value in content.items():
        if name not in names:
            raise InputError(f"{path}: unknown setting {str(name)!r}{did_you_mean(str(name), names)}")
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return [*words, f"--config={path}"]  # which ends a list, before the files that may follow
