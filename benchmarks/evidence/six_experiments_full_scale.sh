#!/usr/bin/env bash
# The six experiments with the real lerobot/pi0fast-base (3 billion parameters) and your datasets.
#
# NOT RUN by us in this form: it needs GPUs, the weights and datasets. `six_experiments.py` runs the same commands on a
# small policy; epsilons, batch sizes and learning rates here are starting points, to be calibrated for your data.
#
#   NEW_TASK=you/new_task OLD_TASK=you/old_task QUESTIONS=questions.jsonl bash benchmarks/evidence/six_experiments_full_scale.sh
#
# A step whose result is there is skipped. Training that was stopped goes on: add --resume=true and
# --config_path=$OUT/<method>/checkpoints/last/pretrained_model/train_config.json to its line.
set -euo pipefail

PRETRAINED=${PRETRAINED:-lerobot/pi0fast-base}
NEW_TASK=${NEW_TASK:?a LeRobotDataset to learn, such as you/new_task}
OLD_TASK=${OLD_TASK:?a LeRobotDataset of what must be kept, such as you/old_task}
QUESTIONS=${QUESTIONS:?a JSONL file of multiple-choice questions, see craft-optim eval-mcq --help}
# Evaluation in simulation, if there is one for your tasks: "--env.type=libero --env.task=libero_spatial". Else empty.
OLD_ENV=${OLD_ENV:-}
NEW_ENV=${NEW_ENV:-}
OUT=${OUT:-outputs/six_experiments}
STEPS=${STEPS:-20000}
SEED=${SEED:-0}
GPUS=${GPUS:-4}
BATCH=${BATCH:-8}             # per GPU
HELD_OUT=${HELD_OUT:-10}      # the last so many episodes of the old task are no anchors
ANCHORS=${ANCHORS:-2048}
EPSILON_LOGITS=${EPSILON_LOGITS:-0.03}  # nats
EPSILON_HIDDEN=${EPSILON_HIDDEN:-0.01}  # share of the teacher's variance

mkdir -p "$OUT/anchors" "$OUT/measured"

# The same for all methods. craft.statistics=pretrained, below, is there for craft-optim only: plain lerobot-train takes
# the normalisation of its dataset. Where the ranges of both tasks differ much, give NEW_TASK the joint statistics first,
# as six_experiments_support/data.py does, or the baseline fails on the old task for that reason, too.
TRAINING=(
  --policy.path="$PRETRAINED" --policy.push_to_hub=false --policy.dtype=bfloat16 --policy.gradient_checkpointing=true
  --dataset.repo_id="$NEW_TASK" --seed="$SEED" --batch_size="$BATCH" --num_workers=8
  --steps="$STEPS" --save_freq="$((STEPS / 4))" --log_freq=100 --wandb.enable=false
)
LAUNCH=(accelerate launch --num_processes "$GPUS" --mixed_precision bf16)

trained() { [[ -f "$OUT/$1/checkpoints/last/pretrained_model/model.safetensors" ]]; }
checkpoint() { echo "$OUT/$1/checkpoints/last/pretrained_model"; }

# 1. Baseline: lerobot-train as it is.
trained adamw || "${LAUNCH[@]}" "$(command -v lerobot-train)" "${TRAINING[@]}" --output_dir="$OUT/adamw"

# 2. Caches of the pretrained policy: hidden states, for 4; logits, for 3; of held-out episodes, for 6. A cache that was
#    begun is finished, a finished one left as it is. Beside a cache, its name with -heldout is what training measures.
build() {  # name, what to keep, episodes, how many, more
  torchrun --nproc-per-node "$GPUS" -m craft_optim.cli build-anchors "$OUT/anchors/$1" --policy.path="$PRETRAINED" \
    --dataset.repo_id="$OLD_TASK" --keep="$2" --dataset.episodes="$3" --count="$4" --workers=4 "${@:5}"
}
build hidden prefix ":-$HELD_OUT" "$ANCHORS"
build hidden-heldout prefix "-$HELD_OUT:" 256
build logits logits ":-$HELD_OUT" "$ANCHORS" --top-k=256
build logits-heldout logits "-$HELD_OUT:" 256 --top-k=256

# Anchors of knowledge beyond the robot, if you have them: pictures and instructions, one JSON object per line.
#   craft-optim build-anchors "$OUT/anchors/pictures" --policy.path="$PRETRAINED" --keep=prefix --prompts=pictures.jsonl

# 3. Token CRaFT, 4. hidden CRaFT: the baseline's flags and the constraint.
for method in logits hidden; do
  epsilon=$([[ $method == logits ]] && echo "$EPSILON_LOGITS" || echo "$EPSILON_HIDDEN")
  trained "craft-$method" || "${LAUNCH[@]}" -m craft_optim.cli train "${TRAINING[@]}" --output_dir="$OUT/craft-$method" \
    --craft.anchors.path="$OUT/anchors/$method" --craft.epsilon="$epsilon" --craft.statistics=pretrained
done

METHODS=(adamw craft-logits craft-hidden)

# 5. What is left of the vision-language model's knowledge, against the pretrained policy.
for method in "${METHODS[@]}"; do
  result="$OUT/measured/mcq-$method.json"
  [[ -f $result ]] || craft-optim eval-mcq "$QUESTIONS" --model="$PRETRAINED" --versus="$(checkpoint "$method")" --json="$result"
done

# 6. Comparison: drift on held-out frames, rollouts, and what was forgotten; tables, JSON and plots.
for kind in logits hidden; do
  epsilon=$([[ $kind == logits ]] && echo "$EPSILON_LOGITS" || echo "$EPSILON_HIDDEN")
  craft-optim drift "$OUT/anchors/$kind-heldout" --teacher.path="$PRETRAINED" --policy.path \
    "$(checkpoint adamw)" "$(checkpoint craft-logits)" "$(checkpoint craft-hidden)" --epsilon "$kind=$epsilon" \
    --json="$OUT/measured/drift-$kind.json" --plot="$OUT/measured/drift-$kind.png"
done

if [[ -n $OLD_ENV && -n $NEW_ENV ]]; then
  roll_out() {  # name, policy
    for task in old new; do
      environment=$([[ $task == old ]] && echo "$OLD_ENV" || echo "$NEW_ENV")
      [[ -f "$OUT/measured/rollouts-$1-$task/eval_info.json" ]] || lerobot-eval --policy.path="$2" $environment \
        --eval.n_episodes=50 --eval.batch_size=10 --seed="$SEED" --output_dir="$OUT/measured/rollouts-$1-$task"
    done
  }
  roll_out pretrained "$PRETRAINED"
  for method in "${METHODS[@]}"; do
    roll_out "$method" "$(checkpoint "$method")"
    stage() { echo "$1=$OUT/measured/rollouts-$1-old,$OUT/measured/rollouts-$1-new"; }
    new=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["per_task"][0]["task_group"])' \
      "$OUT/measured/rollouts-$method-new/eval_info.json")
    python "$(dirname "$0")/forgetting.py" --stage "$(stage pretrained)" --stage "$(stage "$method")" --trained "$method=$new" \
      --json="$OUT/measured/forgetting-$method.json" --plot="$OUT/measured/forgetting-$method.png"
  done
fi
