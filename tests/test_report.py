"""The figure and the page. What the page's own script does is read from Chromium, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lxml import html
from PIL import Image

from parts.comparison import comparison_table, sentences
from parts.figures import BestOfN, draw, draw_comparison, lines_of
from parts.files import read_json
from parts.rank_statistics import ScoredRun, compare
from parts.report import embedded_json, print_comparison, print_run, write_comparison, write_report, write_run, write_together

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")

HOSTILE = (
    "</script><script>document.documentElement.dataset.owned = 1</script><!--<script>"
    '<img src=x onerror="document.documentElement.dataset.owned = 2"> &lt;b&gt; {{ 7 * 7 }} ${1} \u2028 \'"\\'
)
RECORD = {
    "commit": "0123456789abcdef",
    "packages": {"python": "3.11.7", "trl": "0.9.6"},
    "command": ["eval_monotonicity.py", "--model_prefix=a run"],
    "decoding": {"temperature": 0.7},
    "template": "<b>alpaca</b>",
    "dtype": None,
    "seed": 42,
}
ROWS, STEPS = 22, [0, 5, 10, 15]


def scored_run(name: str = "tiny", golds: tuple[str, ...] = ("owner/gold",), means_only: bool = False) -> ScoredRun:
    """Four checkpoints, 22 prompts. The later the prompt, the more its proxy rises and its gold falls."""
    checkpoint, row = np.arange(4.0)[:, None], np.arange(ROWS)
    constrained = row % 2 == 1
    proxy = checkpoint * (1 + row / 10)
    gold = 7 * row % ROWS - proxy
    return ScoredRun(
        name=name,
        steps=STEPS,
        instructions=[f"Question {number}" for number in row],
        qtypes=["CONSTRAINED" if own else "OPENENDED" for own in constrained],
        references=[None if number == 0 else f"reference {number}" for number in row],
        responses=[[HOSTILE if number == 3 else f"answer {number} of step {step}" for number in row] for step in STEPS],
        tokens=np.array([[4 if number == 3 else 5 for number in row] for _ in STEPS]),
        components={"length": proxy + 1, "reference_relevance": np.where(constrained, proxy, np.nan), "bleu": np.full((4, ROWS), np.nan)},
        proxy=proxy,
        gold={own: gold.mean(axis=1, keepdims=True) if means_only else gold - number for number, own in enumerate(golds)},
        kl=[0.0, 1.5, 1.25, 4.0],
        found={
            own: {"n": 4, "spearman": -1.0 + number, "exact_pvalue": 1 / 12, "kendall": -1.0, "turning_point": 0, "interval": (-1.0, -0.5)}
            for number, own in enumerate(golds)
        },
    )


def write(folder: Path, *runs: ScoredRun, together: dict | None = None) -> Path:
    path = folder / "report.html"
    write_report(path, runs, together, RECORD)
    return path


def browse(path: Path, fragment: str = "", *options: str) -> subprocess.CompletedProcess:
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", f"--user-data-dir={path.parent / 'profile'}"]
    return subprocess.run(
        [CHROMIUM, *words, *options, f"file://{path}#{fragment}"], capture_output=True, text=True, timeout=120, check=True
    )


def look(path: Path, fragment: str = "") -> html.HtmlElement:
    """The page as its script leaves it."""
    page = html.document_fromstring(browse(path, fragment, "--dump-dom").stdout)
    assert page.get("data-ready") == "" and page.get("data-error") is None
    assert page.get("data-owned") is None and not page.xpath("//img")
    return page


def find(page: html.HtmlElement, path: str) -> list[html.HtmlElement]:
    """Elements by XPath, in which `#name` is short for any element of this id and `.name` for any of this class."""
    path = re.sub(r"(?<=/)#([\w-]+)", r'*[@id="\1"]', path)
    return page.xpath("." + re.sub(r"(?<=/)\.([\w-]+)", r'*[contains(concat(" ", @class, " "), " \1 ")]', path))


def texts(page: html.HtmlElement, path: str) -> list[str]:
    return [" ".join(element.text_content().split()) for element in find(page, path)]


def blocks(path: Path) -> list[dict]:
    found = re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [json.loads(block) for block in found]


def test_what_the_page_embeds(tmp_path):
    path = write(tmp_path, scored_run(), together={"owner/gold": {"runs": {"run": 0.25}, "mean": np.float64(0.25), "pvalue": None}})
    summary, rollouts = blocks(path)
    (run,) = summary["runs"]
    assert run["steps"] == STEPS and run["rows"] == ROWS and run["kl"] == [0, 1.5, 1.25, 4] and run["exact"] is True
    np.testing.assert_allclose(run["proxy"]["mean"], [0, 2.05, 4.1, 6.15])
    assert run["proxy"]["low"][0] == run["proxy"]["high"][0] == 0 and run["proxy"]["low"][3] < 6.15 < run["proxy"]["high"][3]
    assert (run["golds"][0]["name"], run["golds"][0]["label"]) == ("owner/gold", "gold")
    assert run["golds"][0]["found"] == {
        "n": 4, "spearman": -1, "exact_pvalue": 0.0833333, "kendall": -1, "turning_point": 0, "interval": [-1, -0.5],
    }  # fmt: skip
    np.testing.assert_allclose(run["components"]["reference_relevance"]["mean"], [0, 2.1, 4.2, 6.3])  # of the rows that have one
    assert run["components"]["bleu"] == {"mean": [None] * 4}
    assert run["length"]["mean"][0] == pytest.approx(5 - 1 / ROWS, rel=1e-5) and rollouts["length"][0][2:5] == [5, 4, 5]
    assert summary["together"] == {"owner/gold": {"mean": 0.25, "pvalue": None}}
    assert rollouts["responses"][2][3] == HOSTILE and rollouts["responses"][2][4] == "answer 4 of step 10"
    assert rollouts["components"]["reference_relevance"][1][:3] == [None, 1.1, None]
    assert rollouts["references"][:2] == [None, "reference 1"]
    assert [row[3] for row in rollouts["golds"][0]] == [21, 19.7, 18.4, 17.1]
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_embedded_json_holds_nothing_of_html():
    text = str(embedded_json([HOSTILE, "\ud83d", "\u2029", "é \U0001f600"]))
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", text) and "\U0001f600" in text
    assert json.loads(text) == [HOSTILE, "\ud83d", "\u2029", "é \U0001f600"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded_json([float("nan")])


def test_the_page_asks_the_network_for_nothing(tmp_path):
    text = write(tmp_path, scored_run()).read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text
    assert [link for link in re.findall(r'(?:src|href)="([^"]*)"', text) if not link.startswith("#")] == []
    assert "&lt;b&gt;alpaca&lt;/b&gt;" in text and "<b>alpaca" not in text


def test_golds_of_the_same_last_name_keep_their_whole_names(tmp_path):
    summary, _ = blocks(write(tmp_path, scored_run(golds=("a/rm", "b/rm"))))
    assert [gold["label"] for gold in summary["runs"][0]["golds"]] == ["a/rm", "b/rm"]


@needs_chromium
def test_the_page(tmp_path):
    path = write(tmp_path, scored_run())
    page = look(path)
    assert texts(page, "//.rho") == ["−1.00"]
    assert texts(page, "//.facts//dd")[:3] == [
        "4of one run",
        "−1.00 to −0.50over resampled prompts",
        "0.083over all orders of the checkpoints, two-sided",
    ]
    assert "lower mean gold" in texts(page, "//.says")[0] and "Gold peaks at step 0 while" in texts(page, "//.says")[0]
    assert "not independent" in texts(page, "//.caveat")[-1]
    assert texts(page, "//#table//th[@scope='col']") == [
        "step", "proxy", "gold", "length", "reference relevance", "bleu", "response length", "KL", "n",
    ]  # fmt: skip
    assert texts(page, "//#table/tbody/tr[last()]/*")[:6] == ["15", "6.150", "4.35", "7.150", "6.300", "–"]
    assert texts(page, "//#table/tbody/tr[last()]/*")[7:] == ["4.000", "22"]
    assert find(page, "//#table//th")[0].get("aria-sort") == "ascending"
    assert texts(page, "//#axis//button") == ["PPO step", "√KL", "proxy"]
    assert texts(page, "//#panels//.key") == ["proxy", "gold"] and len(find(page, "//#panels//.band")) == 2
    assert "Mean proxy against PPO step: step 0 0.000, step 5 2.050" in find(page, "//#panels//*[name()='svg']")[0].get("aria-label")
    assert texts(page, "//#multiples//.key") == ["length", "reference relevance", "bleu", "response length"]
    assert texts(page, "//#prompts//h3") == [f"Prompt {number}" for number in range(1, 21)]
    hostile = find(page, "//article[@data-row='4']")[0]
    assert texts(hostile, "//h4") == ["Reference", "step 0", "step 5", "step 15"]  # the first, the middle and the last
    assert [part.text_content() for part in find(hostile, "//.response//.words")] == [HOSTILE] * 3
    assert texts(hostile, "//.response[last()]/header/span") == ["proxy 3.90", "gold 17.10"]
    assert texts(page, "//article[@data-row='1']//.parts")[0] == "length1.00reference relevance–bleu–tokens5"
    assert texts(page, "//.record/div[1]/dd")[0] == RECORD["commit"]
    assert "eval_monotonicity.py '--model_prefix=a run'" in texts(page, "//.record//code")


@needs_chromium
def test_state_is_in_the_address(tmp_path):
    path = write(tmp_path, scored_run())
    page = look(path, "sort=gold&order=desc&by=gold&dir=desc&show=5,10&x=kl")
    assert texts(page, "//#prompts//h3")[:3] == ["Prompt 4", "Prompt 7", "Prompt 10"]
    assert texts(page, "//article[@data-row='4']//.response//h4") == ["step 5", "step 10"]
    assert texts(page, "//#status") == ["22 prompts, 1 to 20 shown, by gold at step 10, highest first"]
    assert texts(page, "//#table/tbody//th") == ["0", "5", "10", "15"]
    assert find(page, "//#table//th")[2].get("aria-sort") == "descending"
    assert find(page, "//#axis//button[@aria-pressed='true']")[0].text_content() == "√KL"
    page = look(path, "sort=disagreement&order=asc&qtype=CONSTRAINED&q=ANSWER&by=gold")
    assert texts(page, "//#prompts//h3")[:2] == ["Prompt 2", "Prompt 6"]  # prompt 4's responses are no answers
    assert texts(page, "//mark")[0] == "answer" and texts(page, "//#status")[0].startswith("10 prompts of 22, 1 to 10 shown")
    assert texts(page, "//#table/tbody//th") == ["15", "10", "5", "0"]
    page = look(path, "sort=disagreement&page=2")
    assert texts(page, "//#prompts//h3") == ["Prompt 2", "Prompt 1"]
    assert texts(page, "//article[@data-row='1']/header/span") == [
        "OPENENDED", "step 0 to 15", "proxy +3.00", "gold −3.00", "disagreement −1.00",
    ]  # fmt: skip


@needs_chromium
def test_buttons_do_what_they_say_and_keep_it_in_the_address(tmp_path):
    path = write(tmp_path, scored_run())
    clicks = """<script>addEventListener("DOMContentLoaded", () => {
      const press = (selector) => document.querySelector(selector).click();
      const turn = (id, value, kind) => { $(id).value = value; $(id).dispatchEvent(new Event(kind)); };
      press("#theme");
      press("#axis button:nth-of-type(2)");
      press("#table thead th:nth-child(3) button");
      press("#table thead th:nth-child(3) button");
      press("#show [data-step='5']");
      press("#show [data-step='10']");
      press("#show [data-step='15']");
      turn("sort", "proxy", "change");
      press("#order");
      turn("qtype", "OPENENDED", "change");
      turn("qtype", "", "change");
      press("#next");
      turn("at", "1", "input");
      root.dataset.hash = location.hash;
    });</script>"""
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", clicks + "</body>"), encoding="utf-8")
    page = look(path)
    state = dict(pair.split("=") for pair in page.get("data-hash").removeprefix("#").split("&"))
    assert state == {
        "theme": "dark", "x": "kl", "by": "gold", "dir": "desc", "show": "0%2C10", "sort": "proxy", "order": "asc", "page": "2",
    }  # fmt: skip
    assert page.get("data-theme") == "dark" and texts(page, "//#theme") == ["Light"]
    assert texts(page, "//#prompts//h3") == ["Prompt 21", "Prompt 22"]
    assert texts(page, "//#prompts//article[1]//.response//h4") == ["step 0", "step 10"]
    assert texts(page, "//#reading") == ["step 5, KL 1.500 nats per response"]
    proxy, gold = texts(page, "//#panels//figcaption/span[2]")
    assert proxy.startswith("2.050 [1.7") and proxy.endswith("], +2.050 since step 0") and gold.startswith("8.45 [5.")
    assert texts(page, "//#next/@disabled/..") == ["Next"]


@needs_chromium
def test_light_and_dark(tmp_path):
    path = write(tmp_path, scored_run())

    def corner(fragment: str, *options: str) -> tuple[int, ...]:
        browse(path, fragment, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=500,300", *options)
        with Image.open(tmp_path / "shot.png") as shot:
            return shot.convert("RGB").getpixel((3, 150))

    assert corner("theme=light") == (255, 255, 255)
    assert corner("theme=dark") == (20, 23, 26)
    assert corner("", "--blink-settings=preferredColorScheme=0") == (20, 23, 26)  # what the system prefers


@needs_chromium
def test_several_runs_and_two_golds(tmp_path):
    runs = [scored_run("first", ("owner/one", "owner/two")), scored_run("second <i>seed", ("owner/one", "owner/two"))]
    together = {"owner/one": {"mean": -0.5, "pvalue": 0.25}, "owner/two": {"mean": None, "pvalue": None}}
    page = look(write(tmp_path, *runs, together=together), "run=second+%3Ci%3Eseed&sort=gold2&order=asc")
    assert "Run second <i>seed" in texts(page, "//#answer-note")[0] and texts(page, "//.rho") == ["−1.00", "0.00"]
    tables = [[texts(row, "/*") for row in find(table, "//tr")] for table in find(page, "//#several//table")]
    assert tables[0][1] == ["first", "one", "−1.00", "−1.00 to −0.50", "4", "0.083", "−1.00", "step 0"]
    assert [row[:2] for row in tables[0][1:]] == [["first", "one"], ["first", "two"], ["second <i>seed", "one"], ["second <i>seed", "two"]]
    assert tables[1] == [
        ["all runs", "owner/one", "owner/two"],
        ["mean", "−0.500", "–"],
        ["pvalue", "0.250", "–"],
    ]  # fmt: skip
    assert texts(page, "//#sort/option") == [
        "order in the file", "proxy", "gold one", "disagreement with one", "gold two", "disagreement with two",
    ]  # fmt: skip
    assert texts(page, "//#table//th[@scope='col']")[1:4] == ["proxy", "gold one", "gold two"]
    assert len(find(page, "//#panels//.other")) == 3  # the other run's proxy and golds
    assert texts(page, "//#prompts//h3")[0] == "Prompt 20"


@needs_chromium
def test_a_gold_of_means_only(tmp_path):
    page = look(write(tmp_path, scored_run(means_only=True)), "sort=gold")
    assert texts(page, "//#sort/option") == ["order in the file", "proxy"]
    assert texts(page, "//#prompts//h3")[0] == "Prompt 1"
    assert len(find(page, "//#panels//.band")) == 1
    assert texts(page, "//#table/tbody/tr[last()]/*")[2] == "4.35"
    assert (
        texts(page, "//.response")[0].startswith("step 0proxy 0.00length")
        and "Of gold, only means are known" in texts(page, "//#rollouts-note")[0]
    )


def figure_of(monkeypatch, path: Path, run: ScoredRun | list[ScoredRun], draw: Callable = draw):
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    draw(path, run, RECORD)
    monkeypatch.undo()
    pyplot.close(drawn[0])
    return drawn[0]


def test_the_figure(tmp_path, monkeypatch):
    path = tmp_path / "monotonicity.png"
    figure = figure_of(monkeypatch, path, scored_run())
    with Image.open(path) as image:
        assert image.width == 1020  # 3.4 inches at 300 dpi
        assert json.loads(image.text["Description"]) == RECORD
    assert figure.get_suptitle() == "tiny: SpearmanR −1.00 over 4 checkpoints"
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "PPO step", "√KL from the start (KL in nats)"]
    assert [axis.get_title(loc="left") for axis in figure.axes][::2] == ["mean proxy reward", "mean gold reward, its peak dotted"]
    proxy_by_kl = figure.axes[1].lines[0]
    # In the order of steps, also where KL falls.
    assert proxy_by_kl.get_xdata() == pytest.approx([0, 1.5**0.5, 1.25**0.5, 2])
    assert proxy_by_kl.get_ydata() == pytest.approx([0, 2.05, 4.1, 6.15])
    assert figure.axes[2].lines[0].get_color() == "#c2570c" and all(len(axis.collections) == 1 for axis in figure.axes)


def test_the_figure_without_the_kl_of_some_steps(tmp_path, monkeypatch):
    run = scored_run()
    run.kl[:3] = [0.0, None, -0.1]
    figure = figure_of(monkeypatch, tmp_path / "monotonicity.png", run)
    assert figure.axes[3].get_xlabel() == "√KL from the start (KL in nats)\nwithout step 5, 10: KL unknown or below 0"
    assert figure.axes[1].lines[0].get_xdata().tolist() == [0, 2] and len(figure.axes[0].lines[0].get_xdata()) == 4


def test_the_figure_of_two_golds_without_kl(tmp_path, monkeypatch):
    run = scored_run(golds=("owner/one", "owner/two"), means_only=True)
    run.kl[:] = [None] * 4
    run.found["owner/two"].update(spearman=None, turning_point=None)
    figure = figure_of(monkeypatch, tmp_path / "monotonicity.png", run)
    assert figure.get_suptitle() == "tiny, SpearmanR over 4 checkpoints\none −1.00, two undefined"
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "mean proxy reward", "mean gold reward, one, its peak dotted", "mean gold reward, two",
    ]  # fmt: skip
    assert [len(axis.collections) for axis in figure.axes] == [1, 0, 0]  # no band without scores by row
    assert len({axis.lines[0].get_color() for axis in figure.axes}) == 3


# ------------------------------------------------------------------------------------------------------ designs side by side


def two_designs() -> list[ScoredRun]:
    """LI, whose gold falls, and a design whose gold rises by 6 more; the second run has no checkpoint 15."""
    li, full = scored_run("li"), scored_run("full <i>run")
    full.gold["owner/gold"] = full.gold["owner/gold"] + np.arange(4.0)[:, None] * (3 + np.arange(ROWS) / 10)
    full.responses[2][0] = "the full design's answer"
    proxy = np.arange(ROWS) + li.proxy  # a start that is not the same on every prompt
    return [
        replace(li, proxy=proxy, design="LI", own=True),
        replace(full, proxy=proxy, design="LI * <b>RP</b>", own=True, steps=[0, 5, 10, 20]),
    ]


def gain(difference: float, standard_error: float | None, **more: object) -> dict:
    return {"difference": difference, "standard_error": standard_error, **more}


def entry(name: str, design: str, proxy: dict, *golds: dict, own: bool = True, steps: tuple[int, int] = (0, 12)) -> dict:
    known = {"spearman": -1.0, "interval": (-1.0, -0.8), "peak": 4}
    named = {f"owner/rm{number}": {**known, **gold} for number, gold in enumerate(golds)}
    return {"name": name, "design": design, "own": own, "steps": list(steps), "rows": 64, "proxy": proxy, "golds": named,
            "tokens": [18.2, 65.9], "repetition": [0.995, 0.9], "kl": [0.0, 17.94]}  # fmt: skip


def test_what_is_said_of_designs():
    li = entry("a", "LI", gain(0.478, 0.031), gain(-3.01, 0.33))
    full = entry("b", "LI * RP", gain(0.53, 0.21), gain(0.08, 0.29))
    pair = {"runs": ["a", "b"], "golds": {"owner/rm0": gain(3.09, 0.4)}}
    caveat = "Standard errors are over prompts. They say nothing of another seed."
    assert sentences({"runs": [li, full], "pairs": [pair], "unpaired": []}) == [
        "LI: the proxy rises by 0.48 (15 SE) and gold falls by 3.01 (9 SE): the policy over-optimises the proxy.",
        "LI * RP: the proxy rises by 0.53 (2.5 SE) and gold does not move (+0.08, 0.2 SE): these prompts do not show that gold follows.",
        "Gold differs between the two by 3.09 (7 SE), paired by prompt, in favour of LI * RP over LI.",
        caveat,
    ]
    chosen = [
        {"design": name, "n": 16, "golds": {"owner/rm0": gain(*own)}} for name, own in (("LI", (-0.99, 0.32)), ("LI * RP", (0.98, 0.15)))
    ]
    assert sentences({"runs": [li, full], "pairs": [], "unpaired": [], "best_of_n": chosen})[2:4] == [
        "Best-of-n and PPO agree about LI: gold falls in the best of 16 (-0.99, 3 SE) and falls under PPO.",
        "Best-of-n and PPO do not agree about LI * RP: gold rises in the best of 16 (+0.98, 6 SE) and does not move under PPO.",
    ]
    idle = sentences({"runs": [entry("a", "LI", gain(0.01, 0.031), gain(-3.01, 0.33))], "pairs": [], "unpaired": [], "best_of_n": chosen})
    assert len(idle) == 2  # PPO did not raise the proxy: nothing to compare
    other = {**li, "own": False}  # trained on who knows what
    assert len(sentences({"runs": [other], "pairs": [], "unpaired": [], "best_of_n": chosen})) == 2
    assert comparison_table({"runs": [li]}) == [{
        "run": "a", "design": "LI", "steps": "0 to 12", "proxy gain (SE)": "+0.48 (0.03)", "gold gain (SE)": "-3.01 (0.33)",
        "SpearmanR (interval)": "-1.00 (-1.00 to -0.80)", "gold peaks at": "4", "tokens": "18 -> 66", "repetition": "0.99 -> 0.90",
        "KL last": "17.94",
    }]  # fmt: skip


@pytest.mark.parametrize(
    ("proxy", "golds", "own", "said"),
    [
        (gain(1, 0.1), [gain(2, 0.5)], True, "the proxy rises by 1.00 (10 SE) and gold rises by 2.00 (4 SE): gold follows the proxy."),
        (gain(1, 0.1), [gain(-2, 0.5)], False, "the proxy rises by 1.00 (10 SE) and gold falls by 2.00 (4 SE)."),  # it was not trained on it
        (gain(1, 0.51), [gain(-2, 0.5)], True, "the proxy does not move (+1.00, 1.9 SE) and gold falls by 2.00 (4 SE): these prompts do not "
         "show that PPO raised its reward."),
        (gain(0.012, 0.0), [gain(0.0, 0.0)], True, "the proxy rises by 0.012 (the same on every prompt) and gold does not move (+0.00, the "
         "same on every prompt): these prompts do not show that gold follows."),
        (gain(1, 0.1), [gain(-2, None)], True, "the proxy rises by 1.00 (10 SE) and gold changes by -2.00 (its standard error is not known)."),
        (gain(1, 0.1), [gain(-2, 0.5), gain(0.5, 0.5)], True, "the proxy rises by 1.00 (10 SE), gold rm0 falls by 2.00 (4 SE) and gold rm1 "
         "does not move (+0.50, 1.0 SE): the golds do not agree."),
    ],
)  # fmt: skip
def test_no_more_is_said_than_the_numbers_say(proxy, golds, own, said):
    assert sentences({"runs": [entry("a", "LI", proxy, *golds, own=own)], "pairs": [], "unpaired": []})[0] == f"LI: {said}"


def test_what_is_said_of_pairs():
    runs = [entry("a", "LI", gain(1, 0.1), gain(1, 0.1)), entry("b", "LI", gain(1, 0.1), gain(1, 0.1)),
            entry("c", "LI * RP", gain(1, 0.1), gain(1, 0.1), steps=(0, 18))]  # fmt: skip
    pairs = [{"runs": list(names), "golds": {"owner/rm0": gain(-0.5, 0.3)}} for names in ("ab", "ac")]
    said = sentences({"runs": runs, "pairs": pairs, "unpaired": [["b", "c"]]})
    assert said[3:-1] == [  # nothing of two seeds of a design
        "Gold does not tell a (LI) from LI * RP (-0.50, 1.6 SE), paired by prompt.",
        "a (LI) and LI * RP were compared over different steps, 0 to 12 and 0 to 18.",
        "b (LI) and LI * RP answered different prompts, so their gains are not paired.",
    ]


def test_the_comparison_on_the_console(capsys):
    print_comparison(compare(two_designs()))
    out = capsys.readouterr().out
    assert "run          design          steps    proxy gain (SE)  gold gain (SE)" in out
    # gold moves by -6.15 under LI and, 9 + 3.15 more, by 6.00 under the other
    assert "\nLI: the proxy rises by 6.15 (14 SE) and gold falls by 6.15 (14 SE): the policy over-optimises the proxy.\n" in out
    assert "and gold rises by 6.00 (the same on every prompt): gold follows the proxy." in out
    assert "Gold differs between the two by 12.15 (29 SE), paired by prompt, in favour of LI * <b>RP</b> over LI." in out


def test_the_figure_of_designs(tmp_path, monkeypatch):
    runs = two_designs()
    runs[1].kl[1] = None
    figure = figure_of(monkeypatch, tmp_path / "monotonicity.png", runs, draw_comparison)
    with Image.open(tmp_path / "monotonicity.png") as image:
        assert image.width == 2040 and json.loads(image.text["Description"]) == RECORD
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "", "", "PPO step", "√KL from the start (KL in nats)\nKL unknown or below 0: full <i>run at step 5",
    ]  # fmt: skip
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "proxy gain (standard deviations)", "proxy gain (standard deviations)", "mean gold reward", "gold gain since the first checkpoint",
    ]  # fmt: skip
    assert [len(axis.lines) for axis in figure.axes] == [len(axis.collections) for axis in figure.axes] == [2, 2, 2, 2]
    assert figure.axes[3].lines[1].get_xdata() == pytest.approx([0, 1.25**0.5, 2])
    assert figure.axes[3].lines[0].get_ydata() == pytest.approx([0, -2.05, -4.1, -6.15])
    spread = np.arange(ROWS).std(ddof=1)
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx(np.array([0, 2.05, 4.1, 6.15]) / spread)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["li: LI", "full <i>run: LI * <b>RP</b>"]
    assert len({line.get_color() for line in figure.axes[2].lines}) == 2


def five_checkpoints(name: str, bend: float, shift: float = 0.0, design: str = "LI") -> ScoredRun:
    """Gold gains d (1 - bend * log d) on every prompt, d = 0, 0.5, 1, 2 and 3; the proxy starts at the prompt's number and gains d."""
    run, d = scored_run(name), np.array([[0.0], [0.5], [1.0], [2.0], [3.0]])
    gained = d * (1 + shift - bend * np.log(np.where(d == 0, 1, d)))
    more = {"steps": [0, 5, 10, 15, 20], "responses": [run.responses[0]] * 5, "tokens": run.tokens[[0] * 5], "components": {}}
    return replace(run, proxy=np.arange(ROWS) + d, gold={"owner/gold": np.arange(ROWS) + gained}, kl=(d[:, 0] ** 2).tolist(),
                   design=design, **more)  # fmt: skip


def best_of_n() -> BestOfN:
    """Gold gains d (1 - d / 3), d = 0, 0.5, 1, 1.5 and 2: highest at d = 1.5."""
    d = np.array([[0.0], [0.5], [1.0], [1.5], [2.0]])
    return BestOfN(
        "LI", (d[:, 0] ** 2).tolist(), np.arange(ROWS) / 2 + d, {"owner/gold": np.ones(ROWS) + d * (1 - d / 3)}, [1, 2, 4, 8, 16]
    )


def test_the_lines_of_seeds_and_of_best_of_n():
    seeds = [five_checkpoints("one", 0.5), five_checkpoints("two", 0.5, 0.2)]
    seeds[1].steps[:] = [0, 5, 10, 15, 25]  # the last checkpoint is another
    lines = lines_of([*seeds, five_checkpoints("alone", 0.0, design="RP")], [best_of_n(), replace(best_of_n(), design="QR")])
    assert [(line.kind, line.label, line.color) for line in lines] == [
        ("seed", None, 0), ("seed", None, 0), ("mean", "mean of 2 seeds: LI", 0), ("best-of-n", "best of n: LI", 0), ("run", "alone: RP", 1),
    ]  # fmt: skip
    assert [line.has_band for line in lines] == [False, False, False, True, True]
    mean, choice, alone = lines[2:]
    assert mean.steps == [0, 5, 10, 15] and mean.kl == [0, 0.25, 1, 4]
    np.testing.assert_allclose((mean.gold["owner/gold"] - np.arange(ROWS))[:, 0], [0, 0.55 + 0.25 * np.log(2), 1.1, 2.2 - np.log(2)])
    assert mean.fits["owner/gold"]["reason"].startswith("3 points of a KL above 0")
    spread = np.arange(ROWS).std(ddof=1)  # of the run's proxy: best-of-n's own start is half as wide
    np.testing.assert_allclose(choice.proxy[:, 3] * spread, [0, 0.5, 1, 1.5, 2])
    assert choice.fits["owner/gold"]["peak"] == pytest.approx(1.5) and not alone.fits["owner/gold"]["better"]
    seeds[1].instructions[0] = "Another question"
    assert lines_of(seeds)[2].gold["owner/gold"].shape == (4, 1)  # other prompts: the mean of their means
    seeds[1].steps[:] = [30, 35, 40, 45, 50]
    assert [line.label for line in lines_of(seeds)] == ["one: LI", "two: LI"]


def test_the_figure_of_seeds_beside_best_of_n(tmp_path, monkeypatch):
    runs = [five_checkpoints("one", 0.5), five_checkpoints("two", 0.5, 0.2)]
    figure = figure_of(monkeypatch, tmp_path / "monotonicity.png", runs, lambda *words: draw_comparison(*words, [best_of_n()]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "mean of 2 seeds: LI", "best of n: LI",
        "fit d (α − β log d), where better than a straight line", "fit d (α − β d), where better than a straight line",
    ]  # fmt: skip
    assert [len(axis.lines) for axis in figure.axes] == [3, 4, 3, 6]  # best-of-n has no step; by KL two fits of gold
    by_kl = figure.axes[3].lines
    assert [line.get_linewidth() for line in by_kl] == [0.5, 0.5, 1.2, 0.9, 1.2, 0.9]
    assert by_kl[2].get_ydata() == pytest.approx([0, 0.55 + 0.25 * np.log(2), 1.1, 2.2 - np.log(2), 3.3 - 1.5 * np.log(3)])
    peak = np.exp(1.1 / 0.5 - 1)  # 3.32: beyond d = 3, but near it
    assert by_kl[3].get_xdata()[[0, -1]] == pytest.approx([0, peak]) and by_kl[3].get_ydata()[-1] == pytest.approx(0.5 * peak)


def test_the_fits_in_the_files_and_on_the_console(tmp_path, capsys):
    runs = [five_checkpoints("one", 0.5), five_checkpoints("two", 0.5, 0.2), five_checkpoints("alone", 0.75, design="RP")]
    write_run(tmp_path / "alone", runs[2], RECORD)
    fit = read_json(tmp_path / "alone" / "monotonicity.json")["scaling"]["owner/gold"]
    assert (fit["form"], fit["alpha"], fit["beta"]) == ("RL", pytest.approx(1), pytest.approx(0.75))
    assert fit["peak"] == pytest.approx(np.exp(1 / 0.75 - 1)) and fit["better"] is True
    print_run(replace(runs[2], found={"owner/gold": {"spearman": None}}))
    assert "alpha 1.000 (SE 0.000), beta 0.750 (SE 0.000), 4 points; better than a straight line by AICc" in capsys.readouterr().out
    write_together(tmp_path / "seeds", runs[:2], {}, RECORD)
    assert list(read_json(tmp_path / "seeds" / "monotonicity.json")["scaling"]) == ["mean of 2 seeds: LI"]
    write_comparison(tmp_path / "designs", runs, compare(runs), {}, RECORD, [best_of_n()])
    fits = read_json(tmp_path / "designs" / "monotonicity.json")["scaling"]
    assert list(fits) == ["mean of 2 seeds: LI", "best of n: LI", "alone: RP"]
    assert fits["best of n: LI"]["owner/gold"]["peak"] == pytest.approx(1.5)
    assert (tmp_path / "seeds" / "monotonicity.png").is_file() and (tmp_path / "designs" / "monotonicity.png").is_file()


@needs_chromium
def test_the_fits_on_the_page(tmp_path):
    runs = [five_checkpoints("one", 0.5), five_checkpoints("two", 0.5, 0.2), five_checkpoints("alone", 0.75, design="RP")]
    path = tmp_path / "report.html"
    write_report(path, runs, None, RECORD, compare(runs), [best_of_n()])
    page = look(path, "along=kl&x=kl&run=alone")
    assert texts(page, "//#legend/li") == ["mean of 2 seeds: LI", "best of n: LI", "alone: RP"]
    assert texts(page, "//#beside//figcaption") == ["Proxy gain, in standard deviations", "Gold, gain since the first checkpoint"]
    proxy, gold = find(page, "//#beside//*[name()='svg']")
    assert len(find(proxy, "//.fit")) == 0 and len(find(gold, "//.fit")) == 3 and len(find(gold, "//.line")) == 5
    assert "best of n: √KL 0.00 0.00, √KL 0.50 0.42, √KL 1.00 0.67, √KL 1.50 0.75" in gold.get("aria-label")
    assert "Seeds of a design are thin lines about their mean." in texts(page, "//#beside-note")[0]
    assert "gold is predicted to peak at d = 1.40" in texts(page, "//#answers//.note")[0]
    assert len(find(page, "//#panels//.fit")) == 1 and "Dotted is the form" in texts(page, "//#curves-note")[0]
    page = look(path)
    assert len(find(page, "//.fit")) == 0 and [len(find(each, "//.line")) for each in find(page, "//#beside//*[name()='svg']")] == [4, 4]


@needs_chromium
def test_the_page_without_the_kl_of_a_step(tmp_path):
    runs = two_designs()
    runs[0].kl[1] = -0.1
    path = tmp_path / "report.html"
    write_report(path, runs, None, RECORD, compare(runs))
    page = look(path, "along=kl&x=kl")
    assert texts(page, "//#axis//button") == ["PPO step", "proxy"]
    assert "The KL at step 5 is unknown or below 0" in texts(page, "//#curves-note")[0]
    assert "The KL of li at step 5 is unknown or below 0." in texts(page, "//#beside-note")[0]
    assert len(find(page, "//#beside//.dot")) == 14  # three of li and four of the other, twice


@needs_chromium
def test_the_page_of_designs(tmp_path):
    runs = two_designs()
    path = tmp_path / "report.html"
    write_report(path, runs, None, RECORD, compare(runs))
    assert "https://" not in path.read_text(encoding="utf-8")
    page = look(path, "along=kl")
    assert texts(page, "//h1") == ["What did each reward do to gold?"]
    rows = [[*texts(row, "/*")] for row in find(page, "//#designs//tr")]
    assert rows[0] == ["run", "design", "steps", "proxy gain (SE)", "gold gain (SE)", "SpearmanR (interval)", "gold peaks at", "tokens",
                       "repetition", "KL last"]  # fmt: skip
    assert rows[1] == ["li", "LI", "0 to 15", "+6.15 (0.42)", "−6.15 (0.42)", "−1.00 (−1.00 to −0.50)", "0", "5 → 5", "– → –", "4.00"]
    assert rows[2][:3] == ["full <i>run", "LI * <b>RP</b>", "0 to 20"]
    assert texts(page, "//#said/li")[0] == (
        "LI: the proxy rises by 6.15 (14 SE) and gold falls by 6.15 (14 SE): the policy over-optimises the proxy."
    )
    assert texts(page, "//#along/button[@aria-pressed='true']") == ["√KL"]
    assert texts(page, "//#legend/li") == ["li: LI", "full <i>run: LI * <b>RP</b>"]
    assert texts(page, "//#beside//figcaption") == ["Proxy gain, in standard deviations", "Gold, gain since the first checkpoint"]
    gold = find(page, "//#beside//*[name()='svg']")[1]
    assert len(find(gold, "//.line")) == len(find(gold, "//.band")) == 2
    assert "li: step 0 0.00, step 5 −2.05" in gold.get("aria-label") and "against square root of KL" in gold.get("aria-label")
    # The rollouts: both runs at the last step that they share.
    first = find(page, "//article[@data-row='1']")[0]
    assert texts(first, "//.response/header/h4") == ["liLI", "full <i>runLI * <b>RP</b>"]
    assert texts(first, "//.response//.words") == ["answer 0 of step 10", "the full design's answer"]
    assert texts(first, "//.response/header/span") == ["proxy 2.00", "gold −2.00", "proxy 2.00", "gold 4.00"]
    assert texts(first, "//.parts/div[last()]") == ["tokens5", "tokens5"]
    hostile = find(page, "//article[@data-row='4']")[0]
    assert [part.text_content() for part in find(hostile, "//.response//.words")] == [HOSTILE] * 2
    page = look(path, "sort=apart&order=asc")
    assert texts(page, "//#prompts//h3")[:2] == ["Prompt 1", "Prompt 2"]  # at step 10 gold is 2 * (3 + row / 10) higher
    assert texts(page, "//article[@data-row='1']/header/span") == ["OPENENDED", "gold of full <i>run less that of li +6.00"]
    assert "by gold of full <i>run less that of li at step 10, lowest first" in texts(page, "//#status")[0]
    assert len(find(page, "//#panels//.other")) == 1  # the other run's gold: its proxy has another scale
    page = look(path, "show=15&q=step+15")
    assert texts(page, "//article[@data-row='1']//.response")[1].endswith("No rollouts of step 15.")
    assert texts(page, "//#status")[0].startswith("21 prompts of 22")  # all but the hostile one
    page = look(path, "run=full+%3Ci%3Erun&side=checkpoints")
    assert texts(page, "//article[@data-row='1']//.response//h4") == ["step 0", "step 5", "step 20"]
    assert texts(page, "//#side/button[@aria-pressed='true']") == ["checkpoints of full <i>run"]


@needs_chromium
def test_the_buttons_of_designs(tmp_path):
    runs = two_designs()
    runs[1].instructions.reverse()  # other prompts row by row: they are found by their text
    path = tmp_path / "report.html"
    write_report(path, runs, None, RECORD, compare(runs))
    clicks = """<script>addEventListener("DOMContentLoaded", () => {
      const press = (selector) => document.querySelector(selector).click();
      press("#along button:nth-of-type(2)");
      press("#designs tbody tr:nth-child(2) button");
      press("#side [data-side='checkpoints']");
      press("#side [data-side='runs']");
      press("#show [data-step='5']");
      root.dataset.hash = location.hash;
    });</script>"""
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", clicks + "</body>"), encoding="utf-8")
    page = look(path)
    state = dict(pair.split("=") for pair in page.get("data-hash").removeprefix("#").split("&"))
    assert state == {"along": "kl", "run": "full+%3Ci%3Erun", "show": "5"}
    assert "answered different prompts" in texts(page, "//#said")[0]
    first = find(page, "//article[@data-row='1']")[0]
    assert texts(first, "//.response//.words") == ["answer 21 of step 5", "answer 0 of step 5"]
