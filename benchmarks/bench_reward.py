"""The reward's speed: the full proxy in one call against one row at a time, LI * RP alone, memory against rows, an ensemble.

    python benchmarks/bench_reward.py                                    # our evaluation rows, their references as responses
    RER_REAL_DATA=/path/to/data python benchmarks/bench_reward.py --every 5    # real systems' outputs, every fifth row of each file

Ratios are of two things timed in turn in this process, on the same rows and with the same encoder: "cold" computes queries and
references too, "cached" finds them in the store. One row at a time keeps nothing. What matrix products would take alone is
measured on the models' own layers (`benchmarks/products.py`).
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.products import Products
from parts.files import REPOSITORY
from parts.learned_reward import LearnedReward
from parts.relevance import EmbeddingStore
from parts.rewards import reward_batch
from parts.rows import match_rows, read_rows
from reward_model import ReversedEngineeredRewardForInference

FIELDS = {"instruction": None, "output": None}


def read_batch(every: int) -> tuple[dict[str, list], int]:
    """The rows to score, and the number of files that they come from."""
    folder = os.environ.get("RER_REAL_DATA")
    if folder:
        data, files = Path(folder) / "data" / "alpaca_eval.json", sorted((Path(folder) / "data" / "alpaca_eval_outputs").glob("*.json"))
    else:
        data = REPOSITORY / "data" / "eval.json"
        files = [data]
    rows = [row for file in files for row in read_rows(file, FIELDS)[::every]]
    instructions = [row["instruction"] for row in rows]
    references = match_rows(data, instructions, {**FIELDS, "qtype": None}, "the rollouts")
    return reward_batch(instructions, [row["output"] for row in rows], references), len(files)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every n-th row of each file")
    parser.add_argument("--turns", type=int, default=3)
    words = parser.parse_args()
    batch, files = read_batch(words.every)
    count = len(batch["response"])

    # 1. LI * RP, one core.
    threads = torch.get_num_threads()
    simple = ReversedEngineeredRewardForInference("alpaca", repetition_penalty=True)
    unit = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "near", "12", "old", "river", "banks,", "twice", "a",
            "day."]  # fmt: skip
    responses = [" ".join(unit[(row + place) % len(unit)] for place in range(185)) for row in range(5000)]
    tokens = statistics.fmean(simple.score({"response": responses})["length"]) * 100
    rate = statistics.median(len(responses) / seconds(lambda: simple.get_reward({"response": responses})) * 60 for _ in range(words.turns))
    print(f"LI * RP: {rate:,.0f} responses of {tokens:.0f} tokens a minute on one core")

    # 2. The full design.
    reward = ReversedEngineeredRewardForInference(
        "alpaca",
        repetition_penalty=True,
        relevance_scaling=True,
        reward_branching=True,
        relevance_model_name=str(REPOSITORY / "models" / "all-MiniLM-L6-v2"),
    )
    model = reward.relevance_model
    part = {name: values[::10] for name, values in batch.items()}
    reward.get_reward(part)
    before = peak_megabytes()
    keep, model.embed_once = model.embed_once, model.embed  # nothing is kept

    def one_by_one() -> None:
        for row in range(count):
            reward.get_reward({name: [values[row]] for name, values in batch.items()})

    cold, cached = [], []
    for _ in range(words.turns):
        model.embed_once, model.store = keep, EmbeddingStore("", "")
        first, second = seconds(lambda: reward.get_reward(batch)), seconds(lambda: reward.get_reward(batch))
        model.embed_once = model.embed
        alone = seconds(one_by_one)
        cold.append(alone / first)
        cached.append(alone / second)
        print(f"  {count} rows of {files} files: cold {first:.1f} s, cached {second:.1f} s, one by one {alone:.1f} s", flush=True)
    for name, ratios in (("cold", cold), ("cached", cached)):
        print(f"{name}: {statistics.median(ratios):.2f} times as fast as one row at a time ({min(ratios):.2f} to {max(ratios):.2f})")
    model.embed_once, model.store = keep, EmbeddingStore("", "")
    with Products() as products:
        reward.get_reward(batch)
    print(f"the full design, cold: {products}")
    print(f"device {model.encoder.device}, {threads} threads, at most {model.batch_size} texts a batch")
    print(f"peak memory: {before:.0f} MB after {len(part['response'])} rows, {peak_megabytes():.0f} MB after {count}")

    # 3. An ensemble of reward models beside one of them.
    with tempfile.TemporaryDirectory() as folder:
        members = [shutil.copytree(REPOSITORY / "assets" / "demo_gold_rm", Path(folder) / str(number)) for number in range(3)]
        one, three = LearnedReward(members[:1], None, 32), LearnedReward(members, None, 32, "uwo", 0.1)
        some = {name: values[:64] for name, values in batch.items()}
        ratios = []
        for _ in range(words.turns):
            alone = seconds(lambda: one.get_reward(some))
            ratios.append(seconds(lambda: three.get_reward(some)) / alone)
        with Products() as products:
            one.get_reward(some)
    print(f"a reward model, 64 rows: {products}")
    print(f"three reward models: {statistics.median(ratios):.2f} times one's time ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
