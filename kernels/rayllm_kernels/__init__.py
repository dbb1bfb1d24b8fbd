"""Kernels of RayLLM. Each folder holds `reference.py`: plain torch, short enough to be believed, and the CPU path."""
