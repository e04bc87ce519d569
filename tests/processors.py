"""The quick tests as on other processors: `python tests/processors.py [--row NAME | --of-today] [ARGUMENT OF PYTEST ...]`.

PyTorch, oneDNN and MKL choose their code by the processor that they find, and each adds in another order; environment variables
let them choose as on an older one. A test that passes on only one processor compares what no machine promises: say of which two
computations of this machine it expects equal bits, or give a number its tolerance. Without a row all are run, with
`make test-versions` for other releases of Python. CI runs that of the day, on the files that compute (`COMPUTE`).
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = {
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},  # SSE2: four numbers at a time
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "two-threads": {"AMFM_TEST_THREADS": "2"},  # read by conftest.py: where a test sets no number itself
    "four-threads": {"AMFM_TEST_THREADS": "4"},
}
# Where numbers come from, once for each kind of computation: a minute, so that CI has the time. Mixers and layouts, which add
# no other one, run under the whole rows.
KERNELS = (
    *(
        "attention",
        "causal_conv1d",
        "decay_carry",
        "decay_scan",
        "decay_scan_vector",
        "delta_scan",
        "delta_scan_vector",
    ),
    *(
        "embedding",
        "flash",
        "linear",
        "linear_cross_entropy",
        "mamba2",
        "moe",
        "moe_capacity",
        "moe_router",
    ),
    *("norm", "rope", "sparse_attention", "swiglu"),
)
MODELS = ("decoding", "document_isolation", "hybrid", "low_precision", "mtp", "structured")
COMPUTE = (
    *(f"tests/kernels/test_{name}.py" for name in KERNELS),
    "tests/kernels/low_precision",
    "tests/examples/mixers/test_diag_scan.py",
    *(f"tests/model/test_{name}.py" for name in MODELS),
)


def choose_row(day: int) -> str:
    """The row of a day of the month: each comes five times."""
    return list(ROWS)[day % len(ROWS)]


def run_row(name: str, arguments: list[str]) -> int:
    """Run pytest as on that processor; returns its exit code."""
    words = " ".join(f"{variable}={value}" for variable, value in ROWS[name].items())
    print(f"{name}: {words} python -m pytest {' '.join(arguments)}", flush=True)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=os.environ | ROWS[name], check=False
    ).returncode


def main() -> int:
    """Run what is asked for; returns 1 where a row is red."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", choices=ROWS, help="only this one")
    parser.add_argument("--of-today", action="store_true", help="the one of this day, on the files that compute")
    given, arguments = parser.parse_known_args()
    if given.of_today:
        day = datetime.datetime.now(datetime.UTC).day
        return run_row(choose_row(day), [*COMPUTE, *arguments])
    rows = [given.row] if given.row else list(ROWS)
    red = [name for name in rows if run_row(name, arguments) != 0]
    print(f"{len(rows)} rows, {len(red)} of them red: {', '.join(red) or 'none'}")
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
