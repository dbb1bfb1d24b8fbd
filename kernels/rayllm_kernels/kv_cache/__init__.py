"""Writing keys and values into pages."""

from rayllm_kernels.kv_cache.reference import page_rows, write_kv, write_latent

__all__ = ["page_rows", "write_kv", "write_latent"]
