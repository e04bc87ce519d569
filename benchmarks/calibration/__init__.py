"""This machine as a file for `amfm plan --gpu`: `python -m benchmarks.calibration OUT.yaml`."""
