"""Annotation: an API on the loopback that counts what it is asked, a tiny model against likelihoods by hand, a classifier kept and reread."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from annotate_data import AnnotationSettings, main
from conftest import REPOSITORY, run_script

from parts.annotators import (
    Answers,
    Question,
    answer_locally,
    api_address,
    api_request,
    ask_all,
    compare_files,
    estimate,
    label_in,
    questions_of,
    rows_and_instructions,
)
from parts.errors import InputError
from parts.qtype_classifier import (
    PROBE,
    QtypeClassifier,
    cross_validate,
    instruction_proper,
    label_logprobs,
    label_prompt,
    require_both_labels,
)

KEY = "sk-tests-4711"
ENCODER = "models/all-MiniLM-L6-v2"
ROWS = [
    {"id": 7, "input": "What is 6 times 7?", "output": "42", "note": "kept"},
    {"input": "Write a limerick about a kettle.", "qtype": "open"},
    {"input": "Name the capital of Peru.", "qtype": "CONSTRAINED", "output": ""},
    {"input": "Write a limerick about a kettle."},
]


@dataclass
class Api:
    """An API of OpenAI's form. Instructions that begin with "Write" are OPENENDED, references are the instruction in upper case."""

    url: str = ""
    troubles: list[int] = field(default_factory=list)  # HTTP statuses that each question meets before it is answered
    always: dict[str, int] = field(default_factory=dict)  # HTTP statuses for good, by instruction
    garbage: dict[str, str] = field(default_factory=dict)  # replies in place of an answer, by instruction
    answered: Counter = field(default_factory=Counter)  # by (kind, instruction)
    seen: Counter = field(default_factory=Counter)
    bodies: list[dict] = field(default_factory=list)
    hold_after: int = 10**9  # requests beyond this many wait for `release`
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def respond(self, body: dict, authorization: str) -> tuple[int, bytes]:
        content = body["messages"][0]["content"]
        kind = "qtype" if "response_format" in body else "output"
        text = re.search(r".*\nInstruction: (.*)\nType:$", content, re.S).group(1) if kind == "qtype" else content
        self.bodies.append(body)
        self.seen[kind, text] += 1
        if sum(self.seen.values()) > self.hold_after:
            self.held.set()
            self.release.wait(60)
        if authorization != f"Bearer {KEY}":
            return 401, json.dumps({"error": {"message": f"Incorrect API key {authorization}"}}).encode()
        if text in self.always:
            return self.always[text], json.dumps({"error": {"message": f"refused, {authorization}"}}).encode()
        if self.seen[kind, text] <= len(self.troubles):
            return self.troubles[self.seen[kind, text] - 1], b'{"error": {"message": "later"}}'
        self.answered[kind, text] += 1
        label = "OPENENDED" if text.startswith("Write") else "CONSTRAINED"
        reply = json.dumps({"qtype": label}) if kind == "qtype" else text.upper()
        reply = self.garbage.get(text, reply)
        if reply == "no chat completion":
            return 200, b"[1, 2"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
        usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
        return 200, json.dumps(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        ).encode()


@pytest.fixture
def api(monkeypatch):
    state, lock = Api(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if state.hold_after < 10**9:  # a request that waits must not keep the others out
                status, content = state.respond(body, self.headers["Authorization"])
            else:
                with lock:
                    status, content = state.respond(body, self.headers["Authorization"])
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", state.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield state
    state.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def api_words(data: Path, output: Path, *more: object) -> list[object]:
    return ["data/annotate_data.py", data, "--annotator", "openai", "--model", "m", "--output", output, *more]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A command line in this process, where the libraries are loaded already; what it printed."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        monkeypatch.chdir(REPOSITORY)
        main()
        return capsys.readouterr().out

    return run


# ----------------------------------------------------------------------------------------------------------------- openai


def test_an_api_that_fails_at_first_labels_and_answers(api, tmp_path):
    api.troubles = [429, 500]
    output = tmp_path / "out.json"
    run = run_script(*api_words(written(tmp_path / "in.json", ROWS), output, "--add_references=true", "--max_new_tokens=20"))
    assert run.returncode == 0, run.stderr
    rows = json.loads(output.read_text(encoding="utf-8"))
    assert rows == [
        {"id": 7, "input": "What is 6 times 7?", "output": "42", "note": "kept", "qtype": "CONSTRAINED"},
        {"input": "Write a limerick about a kettle.", "qtype": "OPENENDED", "output": "WRITE A LIMERICK ABOUT A KETTLE."},
        {"input": "Name the capital of Peru.", "qtype": "CONSTRAINED", "output": "NAME THE CAPITAL OF PERU."},
        {"input": "Write a limerick about a kettle.", "output": "WRITE A LIMERICK ABOUT A KETTLE.", "qtype": "OPENENDED"},
    ]
    assert list(rows[1]) == ["input", "qtype", "output"]
    assert api.answered == {  # a text that stands twice is asked once, a label that is valid not at all
        ("qtype", "What is 6 times 7?"): 1,
        ("qtype", "Write a limerick about a kettle."): 1,
        ("output", "Write a limerick about a kettle."): 1,
        ("output", "Name the capital of Peru."): 1,
    }
    assert "rows 4, labels kept 1, labels to give 3, labels invalid 1, references to add 3, references missing 3" in run.stdout
    meta = json.loads((tmp_path / "out.meta.json").read_text(encoding="utf-8"))
    assert meta["usage"] == {"input_tokens": 44, "output_tokens": 12, "retries": 8, "references_cut": 0}
    assert meta["counts"]["OPENENDED"] == 2 and meta["address"] == api.url
    label = next(body for body in api.bodies if "response_format" in body)
    assert label["temperature"] == 0 and label["max_tokens"] == 32
    assert label["response_format"]["json_schema"]["schema"]["properties"]["qtype"]["enum"] == ["OPENENDED", "CONSTRAINED"]
    answer = next(body for body in api.bodies if "response_format" not in body)
    assert answer["max_tokens"] == 20
    assert not (tmp_path / "out.json.partial.jsonl").exists()
    for path in tmp_path.rglob("*"):
        assert KEY not in path.read_text(encoding="utf-8")
    assert KEY not in run.stdout + run.stderr


def test_rows_without_a_usable_answer_are_named_and_asked_again(api, tmp_path, run_here):
    data = written(tmp_path / "in.json", [{"instruction": text} for text in ("Write a.", "Bad b.", "Odd c.", "Banned d.", "Fine e.")])
    api.garbage = {"Bad b.": '{"qtype": "MAYBE"}', "Odd c.": "no chat completion"}
    api.always = {"Banned d.": 400}
    words = api_words(data, tmp_path / "out.json")
    run = run_script(*words)
    assert run.returncode == 2
    assert 'row 2: no qtype: the reply is \'{"qtype": "MAYBE"}\', 3 times\n' in run.stderr
    assert "row 3: no qtype: the reply is not a chat completion, 3 times\n" in run.stderr
    assert "row 4: no qtype: HTTP 400: " in run.stderr and "refused, Bearer <key>" in run.stderr and KEY not in run.stderr
    assert "error: 3 answers are missing; the others are kept in" in run.stderr
    assert not (tmp_path / "out.json").exists()
    assert api.seen["qtype", "Bad b."] == 3 and api.seen["qtype", "Banned d."] == 1
    api.garbage, api.always = {}, {}
    assert "2 of 5 answers are known from an earlier start" in run_here(*words)
    assert api.seen["qtype", "Write a."] == api.seen["qtype", "Fine e."] == 1
    labels = [row["qtype"] for row in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))]
    assert labels == ["OPENENDED", "CONSTRAINED", "CONSTRAINED", "CONSTRAINED", "CONSTRAINED"]
    with pytest.raises(InputError, match="out.json: exists already, expected a new --output"):
        api_settings(tmp_path)


def test_interrupted_it_goes_on_and_repeats_no_request(api, tmp_path, run_here):
    texts = [f"Write number {number}." for number in range(12)]
    data = written(tmp_path / "in.json", [{"input": text} for text in texts])
    words = api_words(data, tmp_path / "out.json", "--concurrency", 2)
    api.hold_after = 4
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert api.held.wait(60)
    process.send_signal(signal.SIGTERM)  # as Ctrl-C, which a background process may be deaf to
    time.sleep(1)
    api.release.set()
    assert "interrupted: what was finished is kept" in process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert not (tmp_path / "out.json").exists()
    partial = tmp_path / "out.json.partial.jsonl"
    finished = len(partial.read_text(encoding="utf-8").splitlines())
    assert finished == sum(api.answered.values()) and 4 <= finished < 12
    with partial.open("a", encoding="utf-8") as log:
        log.write('{"key": "cut sh')
    assert f"{finished} of 12 answers are known" in run_here(*words)
    assert api.seen == {("qtype", text): 1 for text in texts}


def test_an_estimate_sends_nothing_and_needs_no_key(api, tmp_path, monkeypatch, run_here):
    monkeypatch.delenv("OPENAI_API_KEY")
    data = written(tmp_path / "in.json", ROWS)
    tokens = (len(label_prompt(ROWS[0]["input"]).encode()) + len(label_prompt(ROWS[1]["input"]).encode())) / 4
    words = api_words(data, tmp_path / "out.json", "--price_input", 0.15, "--price_output", 0.6)
    printed = run_here(*words, "--estimate_only=true")
    cost = (tokens * 0.15 + 64 * 0.6) / 1e6
    assert f"estimate: 2 requests, about {round(tokens):,} input tokens, at most 64 output tokens, at most about ${cost:.4f}\n" in printed
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        run_here(*words)
    assert not api.seen and list(tmp_path.iterdir()) == [data]


def test_the_estimate_by_hand():
    body = {"messages": [{"role": "user", "content": "é" * 2_000_000}], "max_tokens": 500_000}
    text = estimate([Question("output", {"body": body}, [0])], 3.0, 10.0)
    assert text == "estimate: 1 requests, about 1,000,000 input tokens, at most 500,000 output tokens, at most about $8.0000"


@pytest.mark.parametrize(
    ("key", "always", "error", "text"),
    [
        ("wrong", {}, InputError, "HTTP 401, expected another OPENAI_API_KEY"),
        (KEY, {"Write a.": 404}, InputError, "HTTP 404, expected another model or address"),
        (KEY, {"Write a.": 503}, ConnectionError, "HTTP 503 after 1 retries; the same command resumes"),
    ],
)
def test_what_stops_an_api_run(api, tmp_path, monkeypatch, key, always, error, text):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    api.always = always
    settings = api_settings(tmp_path, max_retries=1)
    with pytest.raises(error, match=text) as raised:
        ask_all(api_questions(settings, api, ["Write a."]), Answers(tmp_path / "partial.jsonl"), 8, settings.max_retries)
    assert key not in str(raised.value) and "\n" not in str(raised.value)
    assert sum(api.seen.values()) == (2 if error is ConnectionError else 1)


def test_an_address_where_nobody_listens(api, tmp_path):
    settings = api_settings(tmp_path, max_retries=0)
    (question,) = api_questions(settings, api, ["Write a."])
    question.request["address"] = "http://127.0.0.1:9/v1"
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9/v1: Connection error. after 0 retries"):
        ask_all([question], Answers(tmp_path / "partial.jsonl"), 8, settings.max_retries)


def api_settings(folder: Path, **more: object) -> AnnotationSettings:
    return AnnotationSettings(annotator="openai", model="m", output=str(folder / "out.json"), **more)


def api_questions(settings: AnnotationSettings, api: Api, prompts: list[str]) -> list[Question]:
    places = {"qtype": list(range(len(prompts)))}
    return questions_of(prompts, places, lambda kind, prompt: api_request(settings.model, api.url, kind, prompt, settings.max_new_tokens))


def test_answers_are_known_by_all_that_they_depend_on(api, tmp_path):
    settings = api_settings(tmp_path)
    (question,) = api_questions(settings, api, ["Write a."])
    answers = Answers(tmp_path / "partial.jsonl")
    answers.put(question, "OPENENDED", retries=2)
    known = Answers(tmp_path / "partial.jsonl").known
    assert known[question.key] == {"key": question.key, "answer": "OPENENDED", "retries": 2}
    settings.model = "another"
    assert api_questions(settings, api, ["Write a."])[0].key not in known
    settings.model = "m"
    assert api_questions(settings, api, ["Write b."])[0].key not in known
    assert api_questions(settings, api, ["Write a."])[0].key in known


@pytest.mark.parametrize("reply", ["", "OPENENDED", "[]", "{}", '{"qtype": "openended"}', '{"qtype": ["OPENENDED"]}', '"qtype"'])
def test_replies_that_are_no_label(reply):
    assert label_in(reply) == ""


def test_addresses(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert api_address("") == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    assert api_address("") == "http://127.0.0.1:8000/v1"
    assert api_address("https://other/v1") == "https://other/v1"
    for address in ("other/v1", "https://me:secret@other/v1", "https://other/v1?key=secret", "http://other:80a0/v1", "https:///v1"):
        with pytest.raises(InputError, match="--base_url") as raised:
            api_address(address)
        assert "secret" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------- rows, settings


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"output": "x"}, "row 2: found neither 'input' nor 'instruction'"),
        ({"input": " "}, "row 2: field 'input' is ' ', expected an instruction"),
        ({"instruction": 3}, "row 2: field 'instruction' is 3, expected an instruction"),
        ({"input": "a", "output": ["b"]}, "row 2: field 'output' is list, expected text"),
        ({"input": "a", "score": math.nan}, "row 2: cannot be written as JSON"),
        ({"input": "a", "note": "\ud83d"}, "row 2: cannot be written as JSON"),
    ],
)
def test_rows_that_cannot_be_annotated(tmp_path, row, text):
    with pytest.raises(InputError, match=text):
        rows_and_instructions(str(written(tmp_path / "in.json", [{"instruction": "fine"}, row])))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"annotator": "gpt"}, "--annotator is 'gpt', expected openai or local or classifier"),
        ({"model": ""}, "--model is missing"),
        ({"output": "out.jsonl"}, "--output is 'out.jsonl', expected a .json file"),
        ({"concurrency": 0}, "--concurrency is 0, expected at least 1"),
        ({"price_input": math.nan}, "--price_input is nan"),
        ({"annotator": "classifier", "add_references": True}, "the classifier writes no answers"),
        ({"annotator": "local", "estimate_only": True}, "--estimate_only is for --annotator openai alone"),
        ({"train_from": "x.json"}, "--train_from is for --annotator classifier alone"),
    ],
)
def test_settings_that_are_refused(changed, text):
    with pytest.raises(InputError, match=text):
        AnnotationSettings(**{"annotator": "openai", "model": "m", "output": "out.json", **changed})


# ------------------------------------------------------------------------------------------------------------------ local


@pytest.mark.parametrize("prompts", [[[5, 6, 7], [5, 6, 9, 10, 11], [5, 6, 7, 8]], [[5], [6, 7]], [[5, 6]]])
def test_label_likelihoods_by_hand(tiny_model, prompts):
    """Whatever the batch, with a beginning in common, with none, or with nothing else."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    labels = [[20, 21, 22], [23]]
    for batch_size in (1, 2, 8):
        found = {}
        label_logprobs(model, prompts, labels, batch_size, found.__setitem__)
        for place, prompt in enumerate(prompts):
            for which, label in enumerate(labels):
                with torch.no_grad():
                    logprobs = torch.log_softmax(model(torch.tensor([prompt + label])).logits[0], dim=-1)
                expected = sum(float(logprobs[len(prompt) - 1 + step, token]) for step, token in enumerate(label))
                assert found[place][which] == pytest.approx(expected, abs=1e-4)


def test_a_local_model_labels_and_answers(tiny_model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from parts.chat_templates import encode_prompts, load_template
    from parts.models import load_tokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    data = written(tmp_path / "in.json", ROWS)
    words = ["data/annotate_data.py", data, "--annotator", "local", "--model", folder, "--output", tmp_path / "out.json"]
    words += ["--add_references=true", "--max_new_tokens=6", "--batch_size=2"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}), encoding="utf-8")
    run = run_script(*words)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))

    tokenizer = load_tokenizer(str(folder))
    template = load_template("tokenizer", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for number in (0, 1, 3):
        (prompt,) = encode_prompts(tokenizer, [template.render(label_prompt(ROWS[number]["input"]))])
        score = {}
        for name in ("OPENENDED", "CONSTRAINED"):
            label = tokenizer(name)["input_ids"]
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([prompt + label])).logits[0, len(prompt) - 1 :], dim=-1)
            score[name] = sum(float(logprobs[step, token]) for step, token in enumerate(label))
        assert rows[number]["qtype"] == max(score, key=score.get)
    (prompt,) = encode_prompts(tokenizer, [template.render("Name the capital of Peru.")])
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=2)[0, len(prompt) :]
    assert rows[2]["output"] == template.strip_response(tokenizer.decode(greedy, skip_special_tokens=True))
    assert rows[0]["output"] == "42"


def test_a_prompt_too_long_for_the_model(tiny_model, tmp_path):
    question = Question("output", {"prompt": "Peru"}, [4])
    with pytest.raises(InputError, match=r"in.json: row 5: prompt and response take up to 5\d\d tokens, .* takes 512"):
        answer_locally([question], Answers(tmp_path / "partial.jsonl"), "in.json", str(tiny_model), "tokenizer", 512, 16)


# ------------------------------------------------------------------------------------------------------------- classifier


def separable(count: int = 10) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Instructions that their first words tell apart, with embeddings that tell nothing."""
    texts = [f"Invent a story, thing {number}" for number in range(count)] + [f"Compute the sum, thing {number}" for number in range(count)]
    return texts, np.random.default_rng(0).normal(size=(2 * count, 4)), np.array([False] * count + [True] * count)


def test_cross_validation_of_a_separable_set_and_of_one_wrong_label():
    texts, embeddings, constrained = separable()
    found = cross_validate(texts, embeddings, constrained, seed=0)
    assert found == {"accuracy": 1.0, "standard_error": 0.0, "by_fold": [1.0] * 5, "majority": 0.5}
    again = [text.upper() + " " for text in texts]  # no text is known from another fold
    assert cross_validate([*texts, *again], np.tile(embeddings, (2, 1)), np.tile(constrained, 2), seed=0) == found
    constrained[0] = True
    found = cross_validate(texts, embeddings, constrained, seed=0)
    assert found["accuracy"] == 0.95 and found["majority"] == 0.55
    assert sorted(found["by_fold"]) == [0.75, 1.0, 1.0, 1.0, 1.0]
    assert found["standard_error"] == pytest.approx(math.sqrt(0.95 * 0.05 / 20))


def test_a_classifier_reread_gives_the_same_probabilities_which_are_those_by_hand(tmp_path):
    texts, embeddings, constrained = separable()
    fitted = QtypeClassifier.fit(texts, embeddings, constrained, embeddings[0], {"seed": 1})
    fitted.save(tmp_path / "classifier.json")
    reread = QtypeClassifier.load(tmp_path / "classifier.json")
    new = ["Compute the sum of the story, the sum\n\n### Input:\nInvent", "Sing"]
    vectors = np.array([[3.0, 0, 4, 0], [0, 0, 0, 2]])
    probabilities = fitted.probabilities(new, vectors)
    assert reread.probabilities(new, vectors).tolist() == probabilities.tolist()
    assert reread.record == {"seed": 1}

    content = json.loads((tmp_path / "classifier.json").read_text(encoding="utf-8"))
    counts = {"compute": 1, "the": 3, "sum": 2, "story": 1, "compute the": 1, "the sum": 2}  # "of", "of the" ... stand in no training row
    assert {term for term in content["terms"] if term in "compute the sum of the story the sum"} == set(counts)
    weighted = {term: (1 + math.log(count)) * content["terms"][term][0] for term, count in counts.items()}
    length = math.sqrt(sum(value**2 for value in weighted.values()))
    logit = content["bias"] + sum(value / length * content["terms"][term][1] for term, value in weighted.items())
    logit += sum(weight * value for weight, value in zip(content["embedding_weights"], (0.6, 0, 0.8, 0)))
    assert probabilities[0] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-12)
    logit = content["bias"] + content["embedding_weights"][3]
    assert probabilities[1] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-12)


def test_what_a_classifier_refuses(tmp_path):
    texts, embeddings, constrained = separable()
    classifier = QtypeClassifier.fit(texts, embeddings, constrained, embeddings[0], {})
    classifier.check_encoder("same", embeddings[0] * 1.0001)
    for other in (embeddings[1], embeddings[0][:3]):
        with pytest.raises(InputError, match="--encoder other is not the encoder of this classifier"):
            classifier.check_encoder("other", other)
    with pytest.raises(InputError, match="rows.json: 4 CONSTRAINED and 10 OPENENDED rows of different texts, expected at least 5 of each"):
        require_both_labels(texts[:14], constrained[:14], "rows.json")
    with pytest.raises(InputError, match="1 CONSTRAINED and 10 OPENENDED rows of different texts"):
        require_both_labels([*texts[:10], *[" The  SAME", "the same"] * 3], constrained[:16], "rows.json")
    with pytest.raises(InputError, match="no word stands in two of 2 labelled instructions"):
        QtypeClassifier.fit(["one", "two"], embeddings[9:11], constrained[9:11], embeddings[0], {})
    with pytest.raises(InputError, match="none/classifier.json: no such file"):
        QtypeClassifier.load(tmp_path / "none" / "classifier.json")
    for content in ("{}", '{"terms": {}, "embedding_weights": [], "probe": [], "bias": 0, "record": {}}'):
        (tmp_path / "classifier.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="not a classifier of query types"):
            QtypeClassifier.load(tmp_path / "classifier.json")


def test_a_classifier_is_trained_and_used_again(tmp_path, run_here):
    texts, _, constrained = separable()
    labelled = [{"input": text, "qtype": "CONSTRAINED" if label else "OPENENDED"} for text, label in zip(texts, constrained)]
    train = written(tmp_path / "labelled.json", labelled)
    rows = [{"instruction": "Compute the sum of 3 and 4."}, {"instruction": "Invent a story about it.", "qtype": "CONSTRAINED", "x": 1}]
    data = written(tmp_path / "in.json", rows)
    words = ["data/annotate_data.py", data, "--annotator", "classifier", "--model", tmp_path / "kept", "--encoder", ENCODER]
    run = run_script(*words, "--output", tmp_path / "first.json", "--train_from", train)
    assert run.returncode == 0, run.stderr
    assert "five-fold accuracy 1.0000, standard error 0.0000 (20 rows, the commoner label 0.5000" in run.stdout
    assert json.loads((tmp_path / "first.json").read_text(encoding="utf-8")) == [{**rows[0], "qtype": "CONSTRAINED"}, rows[1]]
    run_here(*words, "--output", tmp_path / "second.json", "--overwrite_labels=true")
    found = json.loads((tmp_path / "second.json").read_text(encoding="utf-8"))
    assert found == [{**rows[0], "qtype": "CONSTRAINED"}, {**rows[1], "qtype": "OPENENDED"}]
    record = json.loads((tmp_path / "second.meta.json").read_text(encoding="utf-8"))["classifier"]
    assert record["rows"] == 20 and record["cross_validation"]["accuracy"] == 1.0 and record["encoder"] == ENCODER
    kept = (tmp_path / "kept" / "classifier.json").read_bytes()
    again = run_script(*words, "--output", tmp_path / "third.json", "--train_from", train)
    assert again.returncode == 0 and "five-fold" not in again.stdout
    other = run_script(*words, "--output", tmp_path / "fourth.json", "--train_from", written(tmp_path / "more.json", labelled[1:]))
    assert other.returncode == 2 and "classifier.json: exists already, trained on other rows or with another seed" in other.stderr
    assert (tmp_path / "kept" / "classifier.json").read_bytes() == kept


def test_the_material_is_no_part_of_the_instruction():
    assert instruction_proper("Sort these.\n\n### Input:\nb, a\n### Input:\nc") == "Sort these.\n"
    assert instruction_proper("Explain ### Input: in a prompt.") == "Explain ### Input: in a prompt."


@pytest.mark.skipif("RER_REAL_DATA" not in os.environ, reason="RER_REAL_DATA is not set")
def test_accuracy_on_real_prompts():
    """600 of AlpacaFarm's validation prompts by cross-validation; the whole file gives more."""
    from parts.qtype_classifier import embed
    from parts.relevance import RelevanceModel

    rows, texts = rows_and_instructions(f"{os.environ['RER_REAL_DATA']}/data/alpacafarm_val.json")
    constrained = np.array([row["qtype"] == "CONSTRAINED" for row in rows])[:600]
    encoder = RelevanceModel(str(REPOSITORY / ENCODER), "cpu")
    assert encoder.embed([PROBE]).shape == (1, 384)
    found = cross_validate(texts[:600], embed(encoder, texts[:600], "rows"), constrained, seed=42)
    assert found["majority"] < 0.6
    assert found["accuracy"] > 0.75


# ---------------------------------------------------------------------------------------------------------------- compare


def labelled_file(path: Path, labels: str, name: str = "input") -> Path:
    """Rows p0, p1 ... labelled by the letters O and C; a dot leaves the row out."""
    kinds = {"O": "OPENENDED", "C": "CONSTRAINED"}
    return written(path, [{name: f"p{number}", "qtype": kinds[label]} for number, label in enumerate(labels) if label in kinds])


def test_agreement_and_kappa_by_hand(tmp_path):
    first = labelled_file(tmp_path / "a.json", "CCCCCOOOOOC")
    second = labelled_file(tmp_path / "b.json", "CCCCOCOOOO.", "instruction")
    third = labelled_file(tmp_path / "c.json", "OOOOOOOOOOO")
    run = run_script("data/annotate_data.py", "--compare", first, second, third)
    assert run.returncode == 0, run.stderr
    # a and b agree on 8 of 10 rows, both half CONSTRAINED: kappa = (0.8 - 0.5) / (1 - 0.5)
    assert run.stdout.splitlines() == [
        f"{second}: 1 rows of the others are missing, left out everywhere:",
        "    'p10'",
        "n = 10 rows",
        f"[1] {first}: 0.500 CONSTRAINED",
        f"[2] {second}: 0.500 CONSTRAINED",
        f"[3] {third}: 0.000 CONSTRAINED",
        "agreement         [1]       [2]       [3]",
        "[1]             1.000     0.800     0.500",
        "[2]             0.800     1.000     0.500",
        "[3]             0.500     0.500     1.000",
        "kappa             [1]       [2]       [3]",
        "[1]             1.000     0.600     0.000",
        "[2]             0.600     1.000     0.000",
        "[3]             0.000     0.000 undefined",
    ]


def test_comparisons_that_are_refused(tmp_path):
    first = str(labelled_file(tmp_path / "a.json", "CO"))
    with pytest.raises(InputError, match="expected at least two"):
        compare_files([first])
    with pytest.raises(InputError, match="no prompt is in all of these files"):
        compare_files([first, str(labelled_file(tmp_path / "b.json", "..C"))])
    with pytest.raises(InputError, match="row 1: field 'qtype' is missing"):
        compare_files([first, str(written(tmp_path / "c.json", [{"input": "p0"}]))])
