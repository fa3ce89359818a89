"""What PyTorch has no fast operators for on a CPU, compiled by Numba: the reference's formulas as loops."""
