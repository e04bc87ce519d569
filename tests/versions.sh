#!/usr/bin/env bash
# One set of versions: the kernels in Triton's interpreter, their ahead-of-time table, and a short training run.
# usage: tests/versions.sh FOLDER PYTHON REQUIREMENT...   (`make test-versions` has the sets)
# FOLDER becomes a virtual environment of this PYTHON with amfm and these requirements; an old one is used as it is.
set -euo pipefail
folder=${1:?folder} python=${2:?python}; shift 2
cd "$(dirname "$0")/.."
command -v "$python" >/dev/null || { echo "$python is not installed: this set of versions needs it" >&2; exit 2; }
if [ ! -e "$folder/.installed" ]; then
  "$python" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --editable '.[dev]' "$@"
  touch "$folder/.installed"
fi
run=$folder/run; rm -rf "$run"
export PYTHONPATH=$PWD/src:$PWD:$PWD/examples/synthetic:$PWD/tests/helpers/installed
"$folder/bin/python" -c '
import importlib.metadata as found, platform
names = ("torch", "triton", "numpy", "megatron-core", "deepspeed")
print("Python", platform.python_version(), *(f"{name} {found.version(name)}" for name in names))'
failed=0
TRITON_INTERPRET=1 "$folder/bin/python" -m pytest -p no:cacheprovider tests/kernels/interpreter || failed=1
"$folder/bin/python" -m pytest -p no:cacheprovider -m "slow or not slow" --timeout 900 tests/kernels/proof tests/benchmarks/kernels/test_presets.py || failed=1
"$folder/bin/python" -m amfm.launch train configs/probes/mqar.yaml run.dir="$run" train.steps=20 train.validate_every_steps=null \
  train.log_every_steps=10 || failed=1
exit $failed
