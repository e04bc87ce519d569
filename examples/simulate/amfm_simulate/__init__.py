"""The simulated cluster: one rank of any layout takes its real step on fake CUDA tensors, without a GPU."""
