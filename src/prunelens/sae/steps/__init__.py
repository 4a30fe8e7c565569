"""A training step's arithmetic: PyTorch's own, and our loops and kernels for a CPU and for CUDA.

`engine` chooses; `descent` is the reference.
"""
