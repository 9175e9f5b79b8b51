"""The CUDA backend: kernels for Hopper. Others import `backend` alone."""
