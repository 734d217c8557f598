"""What the scripts share: one flat folder. A module imports only from floors below its own, and never a script.

floor 0, ground
    errors            InputError, and how a script says it in one line
    files             text, JSON, CSV in; atomic writes out; digests
    cli               command lines and YAML files into dataclasses of settings
    cpu_speed         faster linear layers on some CPUs
floor 1, rows, runs and models
    rows              files of rows: reading, checking, matching
    runs              a run's layout on disk; what every output records
    models            models by name: which can be loaded, where they run, their tokenizers
    chat_templates    prompts
    overlap           ROUGE-L and BLEU
floor 2, what the stages are made of
    data_checks       all that is wrong with a file of rows, in one pass
    generation        prompts in, responses out
    relevance         the sentence encoder of the relevances
    gold_models       gold reward models
    qtype_classifier  query types told by a model
    superni           Super-NaturalInstructions
    bundled_models    models from packages, for machines without a hub
    ppo_trainer       TRL's PPOTrainer, faster
    ppo_state         saving and resuming PPO
    rank_statistics   SpearmanR and what surrounds it
    scores            scores kept by row
    designs           proxy designs against a leaderboard
    report            the figure and the page of a scored run
floor 3, made of these
    annotators        what annotates rows: an API, a local model, a classifier
"""
