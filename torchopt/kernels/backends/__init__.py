"""What runs kernels: the C library on the CPU, Triton on GPUs."""
