"""RayLLM under the module names of vLLM, so that a script changes one word."""
