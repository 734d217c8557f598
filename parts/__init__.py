"""What the scripts share: one flat folder. A module imports only from floors below its own, and never a script.

floor 0, ground
    errors            InputError, and how a script says it in one line
    files             text, JSON, CSV in; atomic writes out; digests
    cli               command lines and YAML files into dataclasses of settings
    cpu_speed         what is faster on a CPU, and nothing else
    batching          rows of unequal length: which go together, and their padding
    processes         the processes of a run: joining, stopping together
floor 1, rows, runs and models
    rows              files of rows, read one at a time, and what is wrong with each
floor 1, runs and models
    runs              a run's layout on disk, its checkpoints; what every output records
    models            models by name: which can be loaded, where they run, their tokenizers
    chat_templates    prompts
    overlap           ROUGE-L and BLEU
floor 2, what the stages are made of
    data_checks       all that is wrong with a file of rows, in one pass
    generation        prompts in, responses out
    relevance         the sentence encoder of the relevances
    gold_models       gold reward models
    preferences       preference pairs to train a gold model on
    bradley_terry     the loss of that training, over rankings
    qtype_classifier  query types told by a model
    superni           Super-NaturalInstructions: its prompts, scores and summary
    bundled_models    models from packages, for machines without a hub
    ppo_data          PPO's prompts in batches
    ppo_trainer       TRL's PPOTrainer, faster
    ppo_setup         a run's settings into that trainer, its policy and optimizer
    ppo_metrics       the numbers that PPO logs
    ppo_state         saving and resuming PPO
    rank_statistics   SpearmanR and what surrounds it
    scores            scores kept by row
floor 3, what is said of scores
    baseline          rollouts beside another model's outputs
    designs           proxy designs against a leaderboard
    report            the lines, the figure and the page of a scored run
"""
