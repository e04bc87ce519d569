"""A small run under random faults for minutes or hours, compared with the same run undisturbed (`python -m
tests.soak`).
"""
