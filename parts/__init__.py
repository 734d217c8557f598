"""What the scripts share: one flat folder. A module imports only from floors below its own, and never a script.

floor 0, what needs nothing of ours
    errors            InputError, and how a script says it in one line
    batching          rows of unequal length: which go together, and their padding
    overlap           ROUGE-L and BLEU
    processes         the processes of a run: they come together, stop and part
    cpu_speed         what is faster on a CPU, and nothing else
floor 1, files
    files             text, JSON, CSV in; atomic writes out; digests
    rows              files of rows: reading, checking, matching
    locks             one process at a time in one place
    bradley_terry     the loss of a gold model's training, over rankings
floor 2, words, names, numbers
    cli               command lines and YAML files into dataclasses of settings
    runs              a run's layout on disk, its checkpoints; what every output records
    models            models by name: which can be loaded, where they run, their tokenizers
    chat_templates    prompts
    preferences       preference pairs to train a gold model on
    rank_statistics   SpearmanR and what surrounds it
    scaling_fits      gold against the square root of KL, as Gao et al. fit it
    ppo_metrics       the numbers that PPO logs
    cuda_graphs       a pass over one token as a CUDA graph
floor 3, on models and runs
    packing           rows as one sequence, without padding
    kv_batches        what a model has read of several rows: keys and values, rows that leave and enter
    logprobs          hidden states in, log-probabilities out, in the model's own way
    weight_samples    whether two names mean the same model
    adapters          PEFT adapters on a model that is used again after them
floor 4, what the stages are made of
    ppo_checkpoints   a PPO run's checkpoints: which one it resumes from, what is in its way
    conversations     a question and its answer as a gold reward model reads them
    features          what a white-box feature is
    relevance         the sentence encoder of the relevances
    gold_settings     how gold reward models are loaded and run
    sampling          batched sampling with a causal LM
    ppo_policy        a policy's log-probabilities, entropies and values where PPO needs them
    data_checks       all that is wrong with a file of rows, in one pass
    superni           Super-NaturalInstructions: its prompts, scores and summary
    scores            scores kept by row
    baseline          rollouts beside another model's outputs
    samples           several responses to each prompt: reading, and the best of them
    best_of_n         which of n samples a proxy ranks first, and what gold makes of it
    designs           proxy designs against a leaderboard
    comparison        runs of several designs in words
    bundled_models    models from packages, for machines without a hub
floor 5, made of these
    figures           the figures of scored runs
    rewards           what any reward takes and gives; a user's function, a learned model
    ppo_data          PPO's prompts in batches
    ppo_trainer       TRL's PPOTrainer, faster
    generation        prompts in, responses out: rollouts by transformers
    vllm_engines      the same by vLLM, and rollouts of a policy in training
    sft_data          rows for supervised fine-tuning
    qtype_classifier  query types told by a model
    run_checks        whether runs were trained and rolled out alike
floor 6, the largest
    ppo_setup         a run's settings into the trainer, its policy and optimizer
    ppo_state         saving and resuming PPO
    counting          memory and operations of PPO, from shapes alone
    rollouts          rollouts as jobs: finished, resumed, written
    report            the lines, the files and the pages of scored runs
    score_files       the scoring command
    gold_models       gold reward models, which PPO may train against too
    annotators        what annotates rows: an API, a local model, a classifier
floor 7, on all of these
    learned_reward    reward models in the proxy's place
    best_of_n_command  the best-of-n command
"""

import _signal as signal  # what `signal` is made of, and at hand: that one takes some milliseconds
import os
import sys


def _stop(number: int, frame: object) -> None:
    os.write(2, b"\ninterrupted: nothing was begun\n")
    os._exit(128 + number)


# A script of this project that is stopped while it still imports: `parts.errors.run_main` takes over from here. Scripts import this
# module before any other, and it imports only what Python has at hand.
_home = os.path.realpath(f"{__file__}/../..")
_main = os.path.realpath(getattr(sys.modules.get("__main__"), "__file__", None) or "-")
if _main.endswith(".py") and os.path.split(_main)[0] in (_home, f"{_home}/data", f"{_home}/examples"):
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) is not signal.SIG_IGN:  # as a shell starts what runs behind it
            signal.signal(_number, _stop)
