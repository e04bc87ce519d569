"""`python -m amfm.kernels.acceptance`: are the kernels right on this GPU, and how fast?"""
