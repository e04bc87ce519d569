#!/usr/bin/env bash
# Continue a released hybrid: its checkpoint in, more training on your text, a checkpoint of the same class out. Page: recipes/README.md.
#
#   recipes/continue_released.sh WORK MODEL TEXT     MODEL: a folder with config.json, safetensors and tokenizer.json, such as
#                                                    hf download ibm-granite/granite-4.0-h-tiny --local-dir MODEL
#                                                    TEXT: a file, folder, glob, URL or hub:OWNER/NAME
#   recipes/continue_released.sh WORK --toy FAMILY   the same with a random model of a family (granite4, nemotron3), on a CPU,
#                                                    without a network
#
# From the environment: STEPS (20), LENGTH (4096), BATCH (64), MICRO_BATCH (1), RANKS (1), MAX_TOKENS (what the steps read),
# PYTHON (python), AMFM_OVERRIDES (KEY=VALUE ...) for training. Stopped at any point, the same command continues.
set -euo pipefail

usage="usage: recipes/continue_released.sh WORK MODEL TEXT, or WORK --toy granite4|nemotron3"
work=${1:?$usage}
model=${2:?$usage}
text=${3:?$usage}
steps=${STEPS:-20} length=${LENGTH:-4096} batch=${BATCH:-64} micro_batch=${MICRO_BATCH:-1} ranks=${RANKS:-1}
precision=bf16 held_out=0.01
read -r -a overrides <<< "${AMFM_OVERRIDES:-}"

if [ "$model" = --toy ]; then
    family=$text
    model=$work/model text=$work/text length=64 batch=4 micro_batch=2 precision=float32 held_out=0.3 MAX_TOKENS=${MAX_TOKENS:-300000}
    amfm sample-data python-sources "$text" --megabytes 1
    [ -e "$model/config.json" ] || "${PYTHON:-python}" "$(dirname "$0")/toy_released.py" "$family" "$model" "$text"
fi
max_tokens=${MAX_TOKENS:-$((steps * length * batch * 11 / 10 + 100000))}

mkdir -p "$work"
[ -e "$work/weights" ] || amfm import "$model" "$work/weights"
# Our export targets are named as transformers names model types.
target=$("${PYTHON:-python}" -c 'import json, sys; print(json.load(open(sys.argv[1]))["model_type"])' "$model/config.json")
if [ ! -e "$work/run.yaml" ]; then
    cat > "$work/run.yaml" <<YAML
# Continues $model. The model is as it was imported; a tenth of a pretraining rate, and the same tokenizer.
extends: weights/model.yaml
run: {dir: $work/run, initial_weights: $work/weights}
data:
  store: $work/store
  sources: [{name: text, paths: ["$text"], max_tokens: $max_tokens}]
  tokenizer: {model: $model/tokenizer.json}
  validation_fraction: $held_out
train:
  steps: $steps
  sequence_length: $length
  micro_batch_size: $micro_batch
  global_batch_size: $batch
  precision: $precision
  checkpoint_every_steps: 500
  validation_batches: 2
optimizer: {learning_rate: 3.0e-5}
schedule: {kind: cosine, warmup_steps: $((steps / 10))}
export: {target: $target}
YAML
fi
amfm prepare "$work/run.yaml"
amfm train "$work/run.yaml" "${overrides[@]}" --nproc "$ranks"
amfm evaluate "$work/run" --max-tokens 20000
if [ ! -e "$work/export" ]; then
    amfm export "$work/run" "$work/export"
fi
amfm generate "$work/run" --prompt "The" --max-new-tokens 20
echo "continue_released: run $work/run, transformers checkpoint $work/export, logits verified against ours"
