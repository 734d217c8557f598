"""Tiny real models for the tests: a byte-pair tokenizer and a two-layer random Llama, made on the spot in a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs behind it, and as all that starts here would be
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "data")]  # the scripts, the data commands

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [
    {"input": "Name the capital of France.", "output": "Paris", "qtype": "CONSTRAINED"},
    {"input": "Write a line about rain.", "output": "Rain drums softly on the tin roof all night.", "qtype": "OPENENDED"},
    {"input": "What is 2 + 3?", "output": "5", "qtype": "CONSTRAINED"},
    {"input": "Suggest a name for a cat.", "output": "Call her Marmalade, for her orange coat.", "qtype": "OPENENDED"},
    {"input": "Give the plural.\n\n### Input:\ngoose", "output": "geese", "qtype": "CONSTRAINED"},
    {"input": "Tell me something kind.", "output": "You have come further than you think.", "qtype": "OPENENDED"},
]


def save_tiny_model(folder: Path) -> Path:
    """A random two-layer Llama (grouped-query attention, tied embeddings) and a trained tokenizer, in a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([row["input"] + row["output"] for row in ROWS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=2, pad_token_id=2, bos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_gold(tiny_model: Path, folder: Path) -> Path:
    """A random one-label sequence classification model on the tiny trunk, in a folder."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def environment_as_it_was():
    """What a test's code sets for its own process, as launchers do, is not there for the next test."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_gold(tiny_model, tmp_path_factory) -> Path:
    return save_tiny_gold(tiny_model, tmp_path_factory.mktemp("gold") / "model")


@pytest.fixture
def fixed_passes(monkeypatch):
    """Tokens are read on a CPU as on a GPU, in passes of fixed shapes, each of them kernel by kernel."""
    from parts import cuda_graphs

    for name, value in {"DEVICES": ("cpu",), "ROOM": 4, "FEW_ROWS": 2, "ALIGNED": 4, "capture": not_captured}.items():
        monkeypatch.setattr(cuda_graphs, name, value)


def not_captured(step, device):
    """`step` itself in a graph's place: what it gives lies in one place, which the next call overwrites."""
    places: list = []

    def replay():
        found = step()
        if not places:
            places.append(found.clone())
        return places[0].copy_(found)

    return replay


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


@pytest.fixture
def eval_file(tmp_path) -> Path:
    path = tmp_path / "eval.json"
    rows = [
        {"dataset": "tiny", "instruction": row["input"], "output": row["output"], "generator": "reference", "qtype": row["qtype"]}
        for row in ROWS
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def run_script(*words: object, launcher: tuple[str, ...] = (sys.executable,), gpus: str = "") -> subprocess.CompletedProcess:
    """Run a command line of this project as a user would, offline, on the CPU, or on the GPUs of these numbers."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": gpus, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([*launcher, *map(str, words)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
