"""Plain PyTorch, one module an op: the ground truth of the kernels, and the path on a CPU."""
