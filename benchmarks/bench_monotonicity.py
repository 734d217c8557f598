"""Scoring ten checkpoints with MiniLM and the demo's gold, against the same models one row at a time; then one checkpoint more.

    python benchmarks/bench_monotonicity.py                                          # our evaluation rows, answered by our references
    RER_REAL_DATA=/path/to/data python benchmarks/bench_monotonicity.py --rows 805   # real systems' outputs as the checkpoints

Both sides load their models and score the same texts in turn in this process. One row at a time is plain transformers, peft and
sentence-transformers: fp32, the adapter merged, nothing kept. What matrix products would take alone is measured on the models' own
layers (`benchmarks/products.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.products import Products
from eval_monotonicity import MonotonicitySettings, read_run, score_gold, score_proxies
from parts.conversations import encode_conversation
from parts.cpu_speed import OneDNNLinear
from parts.files import REPOSITORY
from parts.gold_models import LazyGold
from parts.gold_settings import GoldSettings
from parts.models import adapter_base
from parts.rewards import reward_batch
from parts.rows import read_rows
from parts.runs import rollouts_path
from parts.scores import Proxies
from reward_model import FULL_DESIGN, RewardSettings

GOLD = str(REPOSITORY / "assets" / "demo_gold_rm")
ENCODER = str(REPOSITORY / "models" / "all-MiniLM-L6-v2")


def write_checkpoints(folder: Path, rows: int) -> Path:
    """Rollouts of eleven checkpoints, `rows` rows each, in `folder`; the file that their references are in."""
    real = os.environ.get("RER_REAL_DATA")
    if real:
        data = Path(real) / "data" / "alpaca_eval.json"
        files = sorted((Path(real) / "data" / "alpaca_eval_outputs").glob("*.json"))
        systems = [{row["instruction"]: row["output"] for row in read_rows(file, {"instruction": None, "output": None})} for file in files]
        instructions = [row["instruction"] for row in read_rows(data, {"instruction": None})]
        instructions = [text for text in instructions if all(text in system for system in systems)][:rows]
        answers = [[system[text] for text in instructions] for system in systems]
    else:
        data = REPOSITORY / "data" / "eval.json"
        instructions = [row["instruction"] for row in read_rows(data, {"instruction": None})][:rows]
        texts = [row["output"] for row in read_rows(REPOSITORY / "data" / "train.json", {"output": None})]
        answers = [[texts[(53 * step + place) % len(texts)] for place in range(len(instructions))] for step in range(11)]
    for step, outputs in enumerate(answers[:11], start=1):
        checkpoint = folder / f"run_step_{step}"
        checkpoint.mkdir()
        content = [{"instruction": query, "output": output} for query, output in zip(instructions, outputs)]
        rollouts_path(checkpoint).write_text(json.dumps(content), encoding="utf-8")
    return data


def one_row_at_a_time(run) -> list[float]:
    """What a plain script does: each row through the encoder and the gold model by itself. Seconds until each checkpoint is done."""
    start, times = time.perf_counter(), []
    reward = RewardSettings(**FULL_DESIGN, relevance_model_name=ENCODER).load_reward(run.template, 512, "cpu")
    for module in reward.relevance_model.encoder.modules():
        if type(module) is OneDNNLinear:
            module.__class__ = torch.nn.Linear
    reward.relevance_model.embed_once = reward.relevance_model.embed  # nothing is kept
    base = adapter_base(GOLD)
    tokenizer = AutoTokenizer.from_pretrained(base)
    gold = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    gold = PeftModel.from_pretrained(gold, GOLD).merge_and_unload().eval()
    for point in run.checkpoints:
        for row, reference in zip(point.rows, run.references):
            reward.get_reward(reward_batch([row["instruction"]], [row["output"]], [reference]))
            ids = torch.tensor([encode_conversation(tokenizer, row["instruction"], row["output"], 2048)])
            with torch.inference_mode():
                gold(input_ids=ids)
        times.append(time.perf_counter() - start)
    return times


def ours(settings: MonotonicitySettings, dtype: str) -> tuple[float, Products]:
    """Seconds of reading and scoring the checkpoints that `settings` names, and the products among it."""
    start = time.perf_counter()
    with Products() as products:
        runs = [read_run(settings, {"relevance_model_name": ENCODER}, "run")]
        score_proxies(runs, Proxies("cpu"))
        score_gold(LazyGold(GOLD, "cpu", settings.batch_size, GoldSettings(gold_dtype=dtype)), runs)
    return time.perf_counter() - start, products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows of each checkpoint")
    words = parser.parse_args()
    cold, added, plain = {}, {}, None
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            data = write_checkpoints(Path(folder), words.rows)
            eleven = MonotonicitySettings(output_dir=folder, model_prefix=["run"], data_path=str(data), gold_model=[GOLD], batch_size=32,
                                          device="cpu")  # fmt: skip
            cold[dtype], products = ours(replace(eleven, steps=list(range(1, 11))), dtype)
            print(f"ten checkpoints, gold in {dtype}: {products}", flush=True)
            plain = plain or one_row_at_a_time(read_run(eleven, {"relevance_model_name": ENCODER}, "run"))
            added[dtype], _ = ours(eleven, dtype)
    print(f"one row at a time, fp32: ten checkpoints of {words.rows} rows {plain[9]:.1f} s, eleven {plain[10]:.1f} s")
    for dtype in cold:
        print(f"gold in {dtype}: ten checkpoints {cold[dtype]:.1f} s, {plain[9] / cold[dtype]:.2f} times as fast; one checkpoint added "
              f"{added[dtype]:.1f} s, {plain[10] / added[dtype]:.2f} times as fast as all eleven")  # fmt: skip


if __name__ == "__main__":
    main()
