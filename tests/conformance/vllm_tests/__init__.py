"""vLLM's own tests of its HTTP server, run unchanged from its source package against `rayllm serve`."""
