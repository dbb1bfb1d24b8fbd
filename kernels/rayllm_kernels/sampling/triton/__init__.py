"""`reference` in Triton."""

from rayllm_kernels.sampling.triton.draw import sample

__all__ = ["sample"]
