"""`from rayllm.entrypoints.llm import LLM`, as scripts for vLLM write it."""

from rayllm.llm import LLM

__all__ = ["LLM"]
