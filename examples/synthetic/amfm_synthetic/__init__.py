"""Synthetic tasks that isolate one ability of a sequence mixer: recall, overwriting, copying, state tracking.

A task (`tasks.py`) turns a stream of random numbers into a row of tokens with labels at some places.
`rows.py` serves such rows by global sample number, as `samples/` serves rows of text: any rank, any reading process and
any resumed run gets the same row for the same number. Only numpy is imported, because reading processes start with it.
"""
