"""The operations on a CPU: numba, or PyTorch in a better order than the reference's."""
