"""The full proxy reward in one batch against one row at a time, in turn in one process: the ratio of the two times.

python benchmarks/bench_reward.py            # our 128 development and evaluation rows, their references as responses
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from records import REPOSITORY, read_rows
from reward_model import ReversedEngineeredRewardForInference

TURNS = 3


def main() -> None:
    rows = read_rows(REPOSITORY / "data" / "dev.json", {"input": None})
    rows += [{**row, "input": row["instruction"]} for row in read_rows(REPOSITORY / "data" / "eval.json", {"instruction": None})]
    columns = {"query": "input", "response": "output", "qtype": "qtype", "reference": "output"}
    batch = {name: [row[source] for row in rows] for name, source in columns.items()}
    reward = ReversedEngineeredRewardForInference(
        "alpaca",
        repetition_penalty=True,
        relevance_scaling=True,
        reward_branching=True,
        relevance_model_name=str(REPOSITORY / "models" / "all-MiniLM-L6-v2"),
    )

    def together() -> list[float]:
        return reward.get_reward(batch)

    def one_by_one() -> list[float]:
        return [reward.get_reward({name: [values[row]] for name, values in batch.items()})[0] for row in range(len(rows))]

    together()  # warm-up
    ratios = []
    for _ in range(TURNS):
        times = []
        for score in (together, one_by_one):
            start = time.perf_counter()
            score()
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    print(f"{len(rows)} rows, batch of {reward.batch_size}: {statistics.median(ratios):.2f} times as fast as one row at a time")
    print(f"({TURNS} turns: {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
