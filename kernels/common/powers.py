"""Decays as powers of 2.

On a CPU PyTorch's `exp` is the vendor library's, which takes 1 ns a number, twice that for minus infinity and
forty times where the result is subnormal, as decays over many tokens are. Its `exp2` takes half a nanosecond
whatever the exponent. So sums of gates are scaled by log2(e) once and every decay is an `exp2`.
"""

import math

LOG2_E = math.log2(math.e)
