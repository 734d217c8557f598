#!/usr/bin/env bash
# The whole method on the embedded models: PPO, rollouts of every checkpoint, gold scores, SpearmanR.
# Run by `make demo`; needs nothing but what `make setup` installs and unpacks.
set -euo pipefail
model=models/SmolLM2-135M-Instruct
output=outputs/demo

accelerate launch --config_file configs/cpu.yaml run_ppo.py --config configs/demo.yaml --overwrite=true

python evaluation.py --base_model_name="$model" --peft_model_name "${output}_step_*" --data_path=data/eval.json \
  --max_new_tokens=48 --batch_size=64 --evaluations alpaca --overwrite=true

python eval_monotonicity.py --output_dir=outputs --model_prefix=demo --include_start=true --gold_model=assets/demo_gold_rm --batch_size=32
