"""A small run under random faults for minutes or hours, held against the same run undisturbed (`python -m tests.soak`)."""
