"""Measurements side by side in one run, of a clone: `python -m benchmarks.NAME --help`.

| name | what is timed or compared |
| --- | --- |
| step | a training step, vs. transformers' |
| checkouts | that step here and in another clone |
| models, length | models side by side; mixers by sequence length |
| kernels | operations on a CPU, counted in the interpreter, compiled ahead of time |
| data | reading and preparing, vs. megatron-core, MosaicML streaming and a memmap |
| checkpoint, export | what saves, exports and imports cost |
| restart | the parts of the time to recover from a killed rank |
| pipeline | zero-bubble vs. 1F1B |
| published, traced | the plan vs. published speeds, and vs. ranks on simulated GPUs |
| clients | other programs on our exports |
| state_check | a step whose state is checked for silent corruption, vs. one that is not |

They import amfm and packages that amfm does not need; amfm imports nothing of them. What a machine with GPUs needs on the
spot is in the command itself: `amfm bench`.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
