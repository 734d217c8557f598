#!/usr/bin/env bash
# One question on the embedded models: does gold follow a proxy that rewards length alone, and does it follow the full design?
# Run by `make demo`, which sets all up. SEED=7 make demo is another run.
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT  # what trains beside this would hold its folder
trap 'exit 130' INT  # run_ppo.py ends with 0 when it is stopped, and the next stage is not to begin then
seed=${SEED:-42}
output=outputs/demo
backbone=outputs/demo_backbone
half=false dtype=float32
if grep -qs avx512_bf16 /proc/cpuinfo; then half=true dtype=bfloat16; fi  # twice as fast where the CPU has it, slower elsewhere

# Best-of-n: the proxy tried on the backbone itself. Each design picks one of n responses, and gold judges the pick.
python evaluation.py --base_model_name="$backbone" --output_dir="$output" --data_path=data/eval.json --num_samples=8 --temperature=1 \
  --max_new_tokens=96 --batch_size=96 --dtype=$dtype --overwrite=true
best_of_n=("$output/$(basename "$backbone")/samples-$(basename "$backbone").jsonl" --gold_model=assets/demo_gold_rm --gold_dtype=$dtype
  --relevance_model_name=models/all-MiniLM-L6-v2 --output_max_length=96 --batch_size=32 --output_dir="$output"
  --designs LI "LI * RP" "LI * RP * relevance" "LI * RP * relevance, branching")

# PPO from it, twice: the same prompts, seed and settings, another reward. Each run has half of the cores.
export OMP_NUM_THREADS=$(( ($(nproc) + 1) / 2 ))
train() {
  accelerate launch --config_file configs/cpu.yaml run_ppo.py --config configs/demo.yaml --overwrite=true --seed="$seed" --bf16=$half \
    --exp_name="$1" --output_dir="$output/$1" "${@:2}"
}
mkdir -p "$output"
train length --repetition_penalty=false --relevance_scaling=false --reward_branching=false > "$output/length.log" 2>&1 &
length=$!
echo "length alone trains beside the full design; its console is $output/length.log"
train full
python eval_monotonicity.py --best_of_n "${best_of_n[@]}"  # now, while length alone trains on: its responses are longer
wait "$length" || { tail -n 20 "$output/length.log"; exit 1; }
unset OMP_NUM_THREADS

# Responses of every checkpoint to prompts that no setting was chosen on, with the same draws for all of them.
python evaluation.py --base_model_name="$backbone" --peft_model_name "$output/length_step_*" "$output/full_step_*" \
  --data_path=data/eval.json --max_new_tokens=96 --batch_size=96 --evaluations alpaca --common_draws=true --dtype=$dtype --overwrite=true

# What each reward did to gold under PPO, beside best-of-n.
python eval_monotonicity.py --model_prefix length full --include_start=true --best_of_n "${best_of_n[@]}"
