"""`python -m amfm.kernels.acceptance`: are the kernels right on this card, and how fast?"""
