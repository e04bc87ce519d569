#!/usr/bin/env bash
# Which mixer, and how much attention? Grids of models of 1M parameters on two CPU cores. Page: recipes/README.md.
#
#   recipes/ablate_mixers.sh WORK [KEY=VALUE ...]    WORK: a folder for text and study; KEY=VALUE: of the study's file
#   recipes/ablate_mixers.sh WORK --toy              two cells of four steps, on a task that needs no text
#
# `amfm study` and the tasks are packages: pip install ./examples/study ./examples/synthetic. One seed takes about 35 minutes on two quiet cores. Stopped at any point, the same command continues.
set -euo pipefail

work=${1:?usage: recipes/ablate_mixers.sh WORK [--toy | KEY=VALUE ...]}
configs=$(cd "$(dirname "$0")/../configs/studies" && pwd)
mkdir -p "$work"
cd "$work"
shift

if [ "${1:-}" = --toy ]; then
    short='train.steps=4, train.validate_every_steps=4, train.checkpoint_every_steps=4, train.validation_batches=1'
    set -- 'tasks=[{name: recall, config: hybrid_1m_recall.yaml, between: ""}]' "mixers=[{mixer: M, overrides: [$short]}]" \
        'ratios=[none, 1:1]' num_mixers=2
else
    amfm sample-data shakespeare data/corpus/shakespeare
    amfm prepare "$configs/hybrid_1m_text.yaml"
fi

amfm study mixers "$configs/hybrid_ratio_1m.yaml" dir=study 'seeds=[0]' "$@"
echo "ablate_mixers: table $work/study/study.md, picture $work/study/study.png"
