"""The figure and the page. What the page's own script does is read from Chromium, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from lxml import html
from PIL import Image

from parts.rank_statistics import ScoredRun
from parts.report import draw, embedded_json, write_report

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
        "−1.00 to −0.50over prompts drawn anew",
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
    assert texts(page, "//#axis//button") == ["PPO step", "KL", "proxy"]
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
    assert find(page, "//#axis//button[@aria-pressed='true']")[0].text_content() == "KL"
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


def figure_of(monkeypatch, path: Path, run: ScoredRun):
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
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "PPO step", "KL from the start (nats)"]
    assert [axis.get_title(loc="left") for axis in figure.axes][::2] == ["mean proxy reward", "mean gold reward, its peak dotted"]
    proxy_by_kl = figure.axes[1].lines[0]
    assert proxy_by_kl.get_xdata().tolist() == [0, 1.25, 1.5, 4] and proxy_by_kl.get_ydata() == pytest.approx([0, 4.1, 2.05, 6.15])
    assert figure.axes[2].lines[0].get_color() == "#c2570c" and all(len(axis.collections) == 1 for axis in figure.axes)


def test_the_figure_of_two_golds_without_kl(tmp_path, monkeypatch):
    run = scored_run(golds=("owner/one", "owner/two"), means_only=True)
    run.kl[2] = None
    run.found["owner/two"].update(spearman=None, turning_point=None)
    figure = figure_of(monkeypatch, tmp_path / "monotonicity.png", run)
    assert figure.get_suptitle() == "tiny, SpearmanR over 4 checkpoints\none −1.00, two undefined"
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "mean proxy reward", "mean gold reward, one, its peak dotted", "mean gold reward, two",
    ]  # fmt: skip
    assert [len(axis.collections) for axis in figure.axes] == [1, 0, 0]  # no band without scores by row
    assert len({axis.lines[0].get_color() for axis in figure.axes}) == 3
