"""The adapters of `examples/` against the real packages, in an environment of their own: `make test-adapters`."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import json
import logging
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
from conftest import REPOSITORY, ROWS

from reward_model import ReversedEngineeredRewardForInference

MINILM = str(REPOSITORY / "models" / "all-MiniLM-L6-v2")
QUESTION, ESSAY = ROWS[0], ROWS[1]
RESPONSES = ["The capital is Paris.", "Rain, rain, rain on the roof all night long."]


def source(package: str, path: str) -> Path:
    """A file of an installed package, without importing the package."""
    return Path(metadata.distribution(package).locate_file(path))


def load_file(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected() -> dict[str, list]:
    reward = ReversedEngineeredRewardForInference(
        "alpaca", repetition_penalty=True, relevance_scaling=True, reward_branching=True, relevance_model_name=MINILM
    )
    batch = {"query": [QUESTION["input"], ESSAY["input"]], "response": RESPONSES, "qtype": [QUESTION["qtype"], ESSAY["qtype"]]}
    return reward.score({**batch, "reference": [QUESTION["output"], ESSAY["output"]]})


def test_trl_grpo_trains_for_two_steps(tiny_model, tmp_path):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(ROWS), encoding="utf-8")
    words = ["--model", tiny_model, "--data", data, "--relevance_model", MINILM, "--output_dir", tmp_path / "grpo",
             "--max_completion_length", 12]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "examples/trl_grpo.py", *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "grpo" / "log_history.json").read_text(encoding="utf-8"))
    steps = [row for row in log if "rewards/proxy_reward/mean" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["proxy/total"] == pytest.approx(row["rewards/proxy_reward/mean"], rel=1e-4, abs=1e-5)
        assert 0 <= row["proxy/length"] <= 0.5
    assert (tmp_path / "grpo" / "model.safetensors").is_file()


def test_trl_reward_function_reads_messages_and_texts(expected):
    sys.path.insert(0, str(REPOSITORY / "examples"))
    from trl_grpo import ProxyReward

    reward = ProxyReward(
        template="alpaca", repetition_penalty=True, relevance_scaling=True, reward_branching=True, relevance_model_name=MINILM
    )
    columns = {"qtype": [QUESTION["qtype"], ESSAY["qtype"]], "reference": [QUESTION["output"], ESSAY["output"]]}
    texts = [QUESTION["input"], ESSAY["input"]]
    assert reward(prompts=texts, completions=RESPONSES, completion_ids=[[1], [2]], trainer_state=None, **columns) == pytest.approx(
        expected["total"], rel=1e-5
    )
    messages = [[{"role": "user", "content": text}] for text in texts]
    answers = [[{"role": "assistant", "content": text}] for text in RESPONSES]
    logged = {}
    assert reward(prompts=messages, completions=answers, log_metric=logged.__setitem__, **columns) == pytest.approx(
        expected["total"], rel=1e-5
    )
    assert logged["proxy/repetition"] == pytest.approx(sum(expected["repetition"]) / 2)


def test_verl_calls_compute_score_as_we_declare_it(expected):
    """verl's own loader loads the file, and the keywords with which its reward managers call a score fit our signature."""
    loader = load_file(source("verl", "verl/utils/import_utils.py"), "verl_import_utils")
    compute_score = loader.load_extern_object(str(REPOSITORY / "examples" / "verl_reward.py"), "compute_score")
    managers = ["naive", "dapo"]
    found = 0
    for manager in managers:
        tree = ast.parse(source("verl", f"verl/experimental/reward_loop/reward_manager/{manager}.py").read_text(encoding="utf-8"))
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "compute_score":
                assert not call.args
                inspect.signature(compute_score).bind(**{keyword.arg: None for keyword in call.keywords if keyword.arg})
                assert {"solution_str", "ground_truth", "extra_info"} <= {keyword.arg for keyword in call.keywords}
                found += 1
    assert found >= 4
    for row, data in enumerate((QUESTION, ESSAY)):
        answer = compute_score(
            data_source="ours",
            solution_str=RESPONSES[row],
            ground_truth=data["output"],
            extra_info={"query": data["input"], "qtype": data["qtype"], "num_turns": 1},
            relevance_model_name=MINILM,
        )
        assert answer["score"] == pytest.approx(expected["total"][row], rel=1e-5)
        assert set(answer) == {"score", "length", "repetition", "query_relevance", "reference_relevance"}
        assert answer["query_relevance"] and answer["reference_relevance"]  # of every row, whatever its branch reads
        assert all(type(value) is float for value in answer.values())


def test_openrlhf_loads_and_calls_reward_func(expected, monkeypatch):
    """OpenRLHF's own executor loads the file and calls it from its threads; only its logger is replaced."""
    monkeypatch.setenv("RELEVANCE_MODEL", MINILM)
    for name in ("openrlhf", "openrlhf.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    stub = types.ModuleType("openrlhf.utils.logging_utils")
    stub.init_logger = logging.getLogger
    monkeypatch.setitem(sys.modules, "openrlhf.utils.logging_utils", stub)
    agent = load_file(source("openrlhf", "openrlhf/utils/agent.py"), "openrlhf_agent")
    executor = agent.SingleTurnAgentExecutor(str(REPOSITORY / "examples" / "openrlhf_reward.py"))
    prompts = [f"<|im_start|>user\n{row['input']}<|im_end|>\n<|im_start|>assistant\n" for row in (QUESTION, ESSAY)]
    queries = [f"<s>{prompt}{response}<|im_end|>\n" for prompt, response in zip(prompts, RESPONSES)]
    labels = [json.dumps({"query": row["input"], "qtype": row["qtype"], "reference": row["output"]}) for row in (QUESTION, ESSAY)]
    answers = asyncio.run(executor._fetch_rewards_via_func(queries, prompts, labels))
    assert [float(answer["rewards"][0]) for answer in answers] == pytest.approx(expected["total"], rel=1e-5)
    assert [float(answer["scores"][0]) for answer in answers] == pytest.approx(expected["total"], rel=1e-5)
    assert [float(answer["extra_logs"]["length"][0]) for answer in answers] == pytest.approx(expected["length"])


def test_openrlhf_response_is_what_follows_the_prompt():
    module = load_file(REPOSITORY / "examples" / "openrlhf_reward.py", "openrlhf_reward")
    assert module.response_of("<s>Hi there: yes</s></s>\n", "Hi there:") == " yes"
    with pytest.raises(ValueError, match="is not in the query"):
        module.response_of("other", "Hi")


def test_openrlhf_prompts_that_were_cut_are_known_by_their_end(monkeypatch):
    module = load_file(REPOSITORY / "examples" / "openrlhf_reward.py", "openrlhf_reward")
    prompt = "<user> " + "much before it. " * 40 + "And what is two plus three? <assistant>"
    assert module.response_of(f"<s>{prompt[200:]} Five</s>", prompt) == " Five"
    assert module.response_of(f"<s>{prompt.replace('much', 'MUCH')} Five. Or<end>", prompt) == " Five. Or<end>"
    monkeypatch.setenv("END_TOKEN", "<end>")
    assert module.response_of(f"<s>{prompt} Five<end>\n", prompt) == " Five"
