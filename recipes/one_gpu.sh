#!/usr/bin/env bash
# One GPU: from a text to a model that transformers loads. Page: recipes/README.md.
#
#   recipes/one_gpu.sh WORK TEXT                   WORK: a new folder for everything; TEXT: a file, folder, glob or URL
#   recipes/one_gpu.sh WORK 20m|150m|1b     FineWeb-Edu by name, as much of it as a 20M, 150M or 1B model trains on
#   recipes/one_gpu.sh WORK --toy                  the same steps on a CPU in minutes, with a text that needs no network
#
# From the environment: SIZE (150m; of a budget its own), STYLE (nemotron), HARDWARE (1xh100), AMFM_OVERRIDES (KEY=VALUE ...) for training.
# Stopped at any point, the same command continues with the missing steps.
set -euo pipefail

work=${1:?usage: recipes/one_gpu.sh WORK TEXT|20m|150m|1b|--toy}
text=${2:?usage: recipes/one_gpu.sh WORK TEXT|20m|150m|1b|--toy}
size=${SIZE:-150m} style=${STYLE:-nemotron} hardware=${HARDWARE:-1xh100}
read -r -a overrides <<< "${AMFM_OVERRIDES:-}"

fineweb=hub:HuggingFaceFW/fineweb-edu # ODC-By
case $text in
    20m) size=20m text=$fineweb/sample-10BT ;;
    150m) size=150m text=$fineweb/sample-10BT ;;
    1b) size=1b text=$fineweb/sample-100BT ;;
esac
if [ "$text" = --toy ]; then
    text=$work/text size=20m hardware=cpu
    amfm sample-data python-sources "$text" --megabytes 1
    # Of so little text a fiftieth may be no document at all.
    overrides=(data.validation_fraction=0.1 train.steps=4 train.global_batch_size=4 train.sequence_length=128 train.checkpoint_every_steps=2
        train.validate_every_steps=4 train.validation_batches=1 schedule.warmup_steps=1 schedule.decay_steps=1 "${overrides[@]}")
fi

amfm doctor
if [ ! -e "$work/run.yaml" ]; then
    amfm init "$work" --size "$size" --style "$style" --data "$text" --hardware "$hardware"
fi
run=$work/runs/${style}_$size
amfm prepare "$work/run.yaml" "${overrides[@]}"
amfm train "$work/run.yaml" "${overrides[@]}"
amfm evaluate "$run"
amfm report "$run" --picture "$run/curves.svg"
if [ ! -e "$work/export" ]; then
    amfm export "$run" "$work/export"
fi
amfm generate "$run" --prompt "The" --max-new-tokens 20
echo "one_gpu: run $run, report $run/report.html, transformers checkpoint $work/export"
