"""`reference` in Triton."""

from rayllm_kernels.sampling.triton.draw import sample
from rayllm_kernels.sampling.triton.mask import mask
from rayllm_kernels.sampling.triton.penalties import append_to_histories, begin_histories, penalise

__all__ = ["append_to_histories", "begin_histories", "mask", "penalise", "sample"]
