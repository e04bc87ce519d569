#!/usr/bin/env bash
# One node of eight GPUs: FineWeb-Edu by name, at three budgets, to a model that transformers loads. Page: recipes/README.md.
#
#   recipes/one_node_8gpu.sh WORK 150m|1b|8b     WORK: a new folder for everything
#   recipes/one_node_8gpu.sh WORK --toy                  the same steps on two CPU ranks, with a text that needs no network
#
# From the environment: STYLE (nemotron), HARDWARE (8xh100), RANKS (8), AMFM_OVERRIDES (KEY=VALUE ...) for training.
# Stopped at any point, the same command continues with the missing steps. Text: hub:HuggingFaceFW/fineweb-edu (ODC-By), as much of
# it as the budget trains on, at the commit of the first call. HF_ENDPOINT names a mirror.
set -euo pipefail

work=${1:?usage: recipes/one_node_8gpu.sh WORK 150m|1b|8b|--toy}
budget=${2:?usage: recipes/one_node_8gpu.sh WORK 150m|1b|8b|--toy}
style=${STYLE:-nemotron} hardware=${HARDWARE:-8xh100} ranks=${RANKS:-8} text=$work/text
read -r -a overrides <<< "${AMFM_OVERRIDES:-}"

case $budget in
    150m) size=150m sample=sample-10BT ;;
    1b) size=1b sample=sample-100BT ;;
    8b) size=8b sample=sample-350BT ;;
    --toy) size=20m hardware=cpu ranks=2 ;;
    *) echo "one_node_8gpu: the budget is $budget and must be 150m, 1b, 8b or --toy" >&2; exit 2 ;;
esac

if [ "$budget" = --toy ]; then
    amfm sample-data python-sources "$text" --megabytes 1
    # Of so little text a fiftieth may be no document at all.
    overrides=(data.validation_fraction=0.1 train.steps=4 train.global_batch_size=8 train.sequence_length=128 train.checkpoint_every_steps=2
        train.validate_every_steps=4 train.validation_batches=1 schedule.warmup_steps=1 schedule.decay_steps=1 train.num_threads=1 "${overrides[@]}")
else
    text=hub:HuggingFaceFW/fineweb-edu/$sample
fi

amfm doctor
if [ ! -e "$work/run.yaml" ]; then
    amfm init "$work" --size "$size" --style "$style" --data "$text" --hardware "$hardware"
fi
run=$work/runs/${style}_$size
amfm prepare "$work/run.yaml" "${overrides[@]}"
amfm train "$work/run.yaml" "${overrides[@]}" --nproc "$ranks"
amfm evaluate "$run"
amfm report "$run" --picture "$run/curves.svg"
if [ ! -e "$work/export" ]; then
    amfm export "$run" "$work/export"
fi
amfm generate "$run" --prompt "The" --max-new-tokens 20
echo "one_node_8gpu: run $run, report $run/report.html, transformers checkpoint $work/export"
