#!/usr/bin/env bash
# Prune a trained model and distil it back, next to pruning alone and to training its size from scratch at the same tokens. Page: docs/distillation.md.
#
#   recipes/prune_and_distil.sh WORK         three seeds of a model of 0.9M parameters, on a CPU; WORK: a folder for text and runs
#   recipes/prune_and_distil.sh WORK --toy   the same in a few steps, on Python's own sources
#
# From the environment: SEEDS (1 2 3), TEACHER_STEPS (400), STEPS (150), WEIGHT (0.9), PYTHON (python). Stopped at any point, the
# same command continues. `amfm compact` is a package: pip install ./examples/compact.
set -euo pipefail

work=${1:?usage: recipes/prune_and_distil.sh WORK [--toy]}
read -r -a seeds <<< "${SEEDS:-1 2 3}"
teacher_steps=${TEACHER_STEPS:-400} steps=${STEPS:-150} weight=${WEIGHT:-0.9} tokens=100000 store=data/shakespeare length=128
config=$(cd "$(dirname "$0")/../configs" && pwd)/tiny_cpu.yaml
mkdir -p "$work/small" "$work/losses"
cd "$work"

# The shape of tiny_cpu in half of its width, 1,024 tokens per step.
same=(data.tokenizer.vocab_size=512 model.vocab_size=512 model.hidden_size=96 model.mamba.num_heads=3 model.attention.num_heads=3
    model.attention.num_kv_heads=1 model.feed_forward.hidden_size=256 model.moe.expert_hidden_size=64
    model.moe.shared_expert_hidden_size=128 train.sequence_length=128 train.micro_batch_size=8 train.global_batch_size=8
    train.num_threads=1 train.validate_every_steps=100)
if [ "${2:-}" = --toy ]; then
    amfm sample-data python-sources data/corpus/python --megabytes 1
    same+=(data.store=data/python 'data.sources=[{name: python, paths: [data/corpus/python]}]' train.sequence_length=64
        train.validate_every_steps=4 train.validation_batches=1)
    store=data/python seeds=(1) teacher_steps=8 steps=8 tokens=2000 length=64
else
    amfm sample-data shakespeare data/corpus/shakespeare
fi

amfm prepare "$config" "${same[@]}"
amfm train "$config" "${same[@]}" run.dir=runs/teacher train.steps="$teacher_steps"

# Half of the routed experts go in the first third of the steps; the rest of them repairs.
pruning="{groups: experts, keep: 0.5, start_step: 1, every_steps: $((steps / 8)), end_step: $((steps / 3))}"
for seed in "${seeds[@]}"; do
    of_seed=("${same[@]}" train.steps="$steps" train.seed="$seed" train.checkpoint_every_steps=null)
    from_teacher=(run.initial_weights=runs/teacher optimizer.learning_rate=1.0e-3 "prune=$pruning")
    amfm train "$config" "${of_seed[@]}" "${from_teacher[@]}" run.dir="runs/pruned-$seed"
    amfm train "$config" "${of_seed[@]}" "${from_teacher[@]}" run.dir="runs/distilled-$seed" \
        distill.teacher=runs/teacher distill.weight="$weight"
    amfm train "$config" "${of_seed[@]}" run.dir="runs/scratch-$seed" model.moe.num_experts=4
    for kind in pruned distilled; do
        [ -e "small/$kind-$seed" ] || amfm compact "runs/$kind-$seed" "small/$kind-$seed"
    done
done

measure() {
    [ -e "losses/$1.json" ] && return
    amfm evaluate "$2" --data "$store" --length "$length" --max-tokens "$tokens" --json > "losses/$1.part"
    mv "losses/$1.part" "losses/$1.json"
}
measure teacher runs/teacher
for seed in "${seeds[@]}"; do
    measure "scratch-$seed" "runs/scratch-$seed"
    measure "pruned-$seed" "small/pruned-$seed"
    measure "distilled-$seed" "small/distilled-$seed"
done
"${PYTHON:-python}" - <<'PYTHON'
"""A line per kind: the loss in nats per token of each seed, and their mean."""
import json
from pathlib import Path

found = {path.stem: json.loads(path.read_text())["loss"] for path in sorted(Path("losses").glob("*.json"))}
print(f"{'teacher':<10} {found.pop('teacher'):.4f}")
for kind in ("scratch", "pruned", "distilled"):
    losses = [loss for name, loss in found.items() if name.partition("-")[0] == kind]
    print(f"{kind:<10} {sum(losses) / len(losses):.4f}  ({', '.join(f'{loss:.4f}' for loss in losses)})")
PYTHON
