"""What watches kernels while they are interpreted."""
