"""`reference` in Triton."""

from rayllm_kernels.sampling.triton.draw import sample
from rayllm_kernels.sampling.triton.mask import mask

__all__ = ["mask", "sample"]
