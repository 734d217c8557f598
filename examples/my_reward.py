"""A reward of your own, without touching `reward_model.py`.

    python run_ppo.py ... --reward_function examples/my_reward.py:hedging
    python reward_model.py outputs/*/alpaca-eval-*.json --data_path data/eval.json --reward_function examples/my_reward.py:hedging

A reward function is called with the raw instructions (`prompts`), the responses (`completions`) and every column of the dataset by
name: `qtype`, `reference` (a row's `output`), and whatever else your rows carry. It returns one finite float a row, or named columns
with "total" among them: then each is logged by its name.
"""

from parts.chat_templates import load_template
from reward_model import ReversedEngineeredRewardForInference

HEDGES = ("i think", "perhaps", "maybe", "it depends", "as an ai")

# The house's own features are there to be used. This one loads no model, so that it can be made once, here.
LENGTH_AND_REPETITION = ReversedEngineeredRewardForInference(load_template("alpaca"), repetition_penalty=True)


def plainness(response: str) -> float:
    """1 / (1 + hedging phrases). Range (0, 1]; 1.0 where there are none."""
    text = response.lower()
    return 1 / (1 + sum(text.count(hedge) for hedge in HEDGES))


def hedging(prompts, completions, qtype, **columns):
    """LI * RP, and for questions with one right answer also times `plainness`."""
    table = LENGTH_AND_REPETITION.score({"response": completions})
    plain = [plainness(response) for response in completions]
    total = [reward * factor if kind == "CONSTRAINED" else reward for reward, factor, kind in zip(table["total"], plain, qtype)]
    return {"length": table["length"], "repetition": table["repetition"], "plainness": plain, "total": total}
