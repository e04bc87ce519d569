"""What `amfm bench` measures of the machine available: kernels, the whole job, and the speed that a plan needs to
know.
"""
