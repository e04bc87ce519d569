"""How long a test waits for another process, thread or rank: so long that only one that hangs is given up.

On a machine that does much else, a start of Python takes a minute and a first compilation several. No test is red by that: what
may take its time is waited for this long, and what should be late is late by a clock that the test gives, or by a limit that
`tests/limits.py` lets stand for the reason next to it.
"""

PATIENCE_SECONDS = 900.0
