"""The documents name only what exists: links, headings, scripts, flags, make targets, metrics."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import REPOSITORY, run_script
from markdown_it import MarkdownIt
from markdown_it.token import Token

README = REPOSITORY / "README.md"
PAGES = [README, *sorted(REPOSITORY.glob("docs/*.md")), REPOSITORY / "data" / "README.md", *sorted(REPOSITORY.glob("assets/*/README.md"))]
COMMAND_PAGES = [page for page in PAGES if page.parts[-3] != "assets"]
KEYWORDS = {"do", "done", "then", "fi"}
ALPACA_EVAL = {"--reference_outputs"}  # flags that the text names without their program
LAUNCHERS = {"accelerate", "torchrun"}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(REPOSITORY)) for path in paths]


# ---------------------------------------------------------------------------------------------------------------- reading


def tokens_of(text: str) -> Iterator[Token]:
    """Every Markdown token of a page, those inside paragraphs and cells included."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def links_of(text: str) -> list[str]:
    """Targets of links and images, those written as HTML included."""
    found = []
    for token in tokens_of(text):
        found += [str(token.attrs[name]) for name in ("href", "src") if name in token.attrs]
        if token.type in ("html_block", "html_inline"):
            found += re.findall(r'\b(?:src|href)="([^"]*)"', token.content)
    return found


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings: lower case, no punctuation, "-" for a space, "-1" for a second one."""
    anchors: set[str] = set()
    tokens = list(tokens_of(text))
    for opening, inline in zip(tokens, tokens[1:]):
        if opening.type == "heading_open":
            title = "".join(child.content for child in inline.children or ())
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            number = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", anchor) is not None for anchor in anchors)
            anchors.add(f"{slug}-{number}" if number else slug)
    return anchors


def snippets_of(text: str) -> list[str]:
    """Shell blocks, and every piece of inline code."""
    return [token.content for token in tokens_of(text) if token.type == "code_inline" or (token.type == "fence" and token.info == "bash")]


def commands_of(snippet: str) -> list[list[str]]:
    """The simple commands of a piece of shell, each as its words, without comments and without leading assignments.

    Raises:
        ValueError: an open quotation mark.
    """
    text = re.sub(r"(^|\s)#.*", r"\1", snippet.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();&|\n")
    lexer.whitespace = " \t"  # the end of a line ends a command
    lexer.whitespace_split = True
    lexer.commenters = ""
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word in KEYWORDS or set(word) <= set("();&|\n"):
            commands.append([])
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    return [words for words in commands if words]


# --------------------------------------------------------------------------------------------------------------- checking


@functools.cache
def flags_of(script: tuple[str, ...]) -> frozenset[str]:
    """The flags in a script's own `--help`; `script` is what follows `python`, and may end in a flag that has a help of its own."""
    done = run_script(*script, "--help")
    assert done.returncode == 0, f"{script}: {done.stderr[-2000:]}"
    options = [line for line in done.stdout.splitlines() if re.match(r"  -\S", line)]
    return frozenset(flag for line in options for flag in re.findall(r"--[\w-]+", line))


def exists(path: str) -> bool:
    return (REPOSITORY / path).exists()


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w/-]+):(?!=)", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def own_script(words: list[str]) -> tuple[tuple[str, ...], list[str]] | None:
    """What follows `python` in a command that starts a script or module of this project, and the words after; None for any other."""
    program, rest = Path(words[0]).name, words[1:]
    if re.fullmatch(r"python[\d.]*", program) and rest:
        if rest[0] == "-m":
            return (("-m", rest[1]), rest[2:]) if rest[1].startswith("parts.") else None
        return ((rest[0],), rest[1:]) if rest[0].endswith(".py") else None
    if program in LAUNCHERS:  # whose own flags come before the script
        place = next((place for place, word in enumerate(rest) if word.endswith(".py")), None)
        return None if place is None else ((rest[place],), rest[place + 1 :])
    return ((words[0],), rest) if program.endswith(".py") else None


def command_problems(words: list[str]) -> list[str]:
    """What one command says that is not so."""
    if Path(words[0]).name == "make":
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        return [f"make {target}: no such target" for target in targets if target not in make_targets()]
    files = [word.rpartition("=")[2] for word in words]
    missing = [f"{file}: no such file" for file in files if re.fullmatch(r"(assets|configs|examples)/[\w./-]+", file) and not exists(file)]
    started = own_script(words)
    if started is None:
        return missing
    script, rest = started
    path = script[1].replace(".", "/") + ".py" if script[0] == "-m" else script[0]
    if not exists(path):
        return [f"{path}: no such script"]
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    absent = [flag for flag in flags if flag not in flags_of(script) and flag not in flags_of((*script, flag, "x"))]
    return missing + [f"{' '.join(script)} has no {flag}" for flag in absent]


def snippet_problems(snippet: str) -> list[str]:
    """What a shell block or a piece of inline code says that is not so."""
    if re.match(r"--\w", snippet):  # a flag by itself, of whichever script the paragraph is about
        flags = {word.partition("=")[0] for word in snippet.split() if word.startswith("--")} - ALPACA_EVAL
        return [f"no script has {flag}" for flag in sorted(flags) if not any(flag in flags_of(script) for script in SCRIPTS)]
    try:
        commands = commands_of(snippet)
    except ValueError as error:
        return [f"{snippet}: {error}"]
    return [problem for words in commands for problem in command_problems(words)]


def link_problems(page: Path, text: str) -> list[str]:
    problems = []
    for link in links_of(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / unquote(name)).resolve() if name else page
        if not target.exists() or not target.is_relative_to(REPOSITORY):
            problems.append(f"{link}: no such file")
        elif anchor and anchor not in anchors_of(text if target == page else target.read_text(encoding="utf-8")):
            problems.append(f"{link}: no such heading")
    return problems


SCRIPTS = [
    (name,)
    for name in names([*sorted(REPOSITORY.glob("*.py")), *sorted(REPOSITORY.glob("data/*.py"))])
    if "__main__" in (REPOSITORY / name).read_text(encoding="utf-8")
]


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("page", names(PAGES))
def test_links_lead_somewhere(page):
    assert link_problems(REPOSITORY / page, (REPOSITORY / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", names(COMMAND_PAGES))
def test_commands_exist(page):
    snippets = snippets_of((REPOSITORY / page).read_text(encoding="utf-8"))
    assert [problem for snippet in snippets for problem in snippet_problems(snippet)] == []


def test_every_page_starts_with_a_command():
    for page in REPOSITORY.glob("docs/*.md"):
        first = next(token for token in tokens_of(page.read_text(encoding="utf-8")) if token.type == "fence")
        assert first.info == "bash" and first.map[0] < 5 and commands_of(first.content), page


def test_readme_is_short_and_names_every_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert {f"docs/{page.name}" for page in REPOSITORY.glob("docs/*.md")} <= set(links_of(text))


def test_readme_shows_the_kept_diff():
    shown = [token.content for token in tokens_of(README.read_text(encoding="utf-8")) if token.type == "fence" and token.info == "diff"]
    assert shown == [(REPOSITORY / "examples" / "damped_length.diff").read_text(encoding="utf-8")]


def test_every_logged_metric_is_explained():
    """Those of the kept run, against the first column of the table in docs/ppo.md, where "..." stands for anything."""
    table = re.findall(r"^\| (`.*?) \|", (REPOSITORY / "docs" / "ppo.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    explained = [re.escape(name).replace(r"\.\.\.", ".+") for row in table for name in re.findall("`([^`]+)`", row)]
    lines = (REPOSITORY / "assets" / "demo_run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {name for line in lines for name in json.loads(line)}
    assert len(logged) > 50
    assert [name for name in sorted(logged) if not any(re.fullmatch(pattern, name) for pattern in explained)] == []


@pytest.mark.parametrize(
    ("snippet", "problems"),
    [
        ("python run_ppo.py --exp_name=a --lora_r 8", []),
        ("python run_ppo.py --exp_nam=a", ["run_ppo.py has no --exp_nam"]),
        ("a=1 accelerate launch --num_processes 2 run_ppo.py \\\n  --lora_r 8 \\\n  --bogus=true", ["run_ppo.py has no --bogus"]),
        ("torchrun --nproc_per_node 2 ppo.py ...", ["ppo.py: no such script"]),
        ("for i in $(seq 1 3); do\n  python evaluation.py --bogus $i\ndone", ["evaluation.py has no --bogus"]),
        ("python train.py  # python run_ppo.py --bogus\npython data/validate.py FILE --bogus", ["train.py: no such script",
                                                                                            "data/validate.py has no --bogus"]),
        ("python -m parts.bundled_models --bogus x", ["-m parts.bundled_models has no --bogus"]),
        ("data/annotate_data.py --compare a.json b.json", []),
        ("python -m parts.nothing", ["parts/nothing.py: no such script"]),
        ("evaluation.py --bogus", ["evaluation.py has no --bogus"]),
        ("alpaca_eval --annotators_config x | tee log", []),
        ("make PYTHON=python3.12 demo nothing", ["make nothing: no such target"]),
        ("--lora_r 8 --bogus=1", ["no script has --bogus"]),
        ("config=configs/nothing.yaml x --y=examples/nothing.sh", ["examples/nothing.sh: no such file"]),
        ("configs/nothing.yaml", ["configs/nothing.yaml: no such file"]),
    ],
)  # fmt: skip
def test_the_check_of_commands_finds_what_is_wrong(snippet, problems):
    assert snippet_problems(snippet) == problems


def test_the_check_of_links_finds_what_is_wrong():
    text = '# One, two\n\n## A `b`\n\n## A b\n\n[a](#one-two) [b](#a-b-1) ![c](no.png) [d](#no) [e](data/README.md#no) <img src="x.svg">\n'
    assert link_problems(README, text) == ["no.png: no such file", "#no: no such heading", "data/README.md#no: no such heading",
                                           "x.svg: no such file"]  # fmt: skip
