"""Kernels as operators of torch.library, for torch.compile and other tracers."""
