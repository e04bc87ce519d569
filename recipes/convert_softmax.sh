#!/usr/bin/env bash
# From softmax attention to a fixed state: train a transformer of 1M parameters, then convert all of its attention but one block. Page: docs/conversion.md.
#
#   recipes/convert_softmax.sh WORK [KEY=VALUE ...]    WORK: a folder for text and runs; KEY=VALUE: of both configurations
#   recipes/convert_softmax.sh WORK --toy              the same in a few steps, on Python's own sources
#
# Stopped at any point, the same command continues.
set -euo pipefail

work=${1:?usage: recipes/convert_softmax.sh WORK [--toy | KEY=VALUE ...]}
configs=$(cd "$(dirname "$0")/../configs/conversion" && pwd)
mkdir -p "$work"
cd "$work"
shift

teacher=() conversion=()
if [ "${1:-}" = --toy ]; then
    amfm sample-data python-sources data/corpus/python --megabytes 1
    set -- data.store=data/python 'data.sources=[{name: python, paths: [data/corpus/python]}]' data.tokenizer.vocab_size=512 \
        model.vocab_size=512 train.validate_every_steps=2 train.validation_batches=1
    teacher=(train.steps=4) conversion=(convert.transfer.steps=2 convert.tune.steps=2)
else
    amfm sample-data shakespeare data/corpus/shakespeare
fi

amfm prepare "$configs/teacher.yaml" "$@"
amfm train "$configs/teacher.yaml" "$@" "${teacher[@]}"
amfm convert "$configs/convert.yaml" "$@" "${conversion[@]}"
amfm generate runs/softmax_converted/result --prompt "The" --max-new-tokens 20
echo "convert_softmax: model $work/runs/softmax_converted/result, its picture conversion.svg next to it"
