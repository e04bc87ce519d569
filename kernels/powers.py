"""Decays as powers of 2.

On a CPU PyTorch's `exp` is the vendor library's, which takes 1 ns a number, twice that for minus infinity and forty times
where the result is subnormal, as decays over many tokens are. Its `exp2` takes half a nanosecond whatever the exponent.
"""

import math

LOG2_E = math.log2(math.e)
