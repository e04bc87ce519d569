"""Published training speeds vs. the plan's, and what fitting the efficiencies would change: `python -m
benchmarks.published`.
"""
