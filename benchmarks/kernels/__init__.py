"""Operations on a CPU, counted in the interpreter, and compiled ahead of time: `python -m benchmarks.kernels`."""
