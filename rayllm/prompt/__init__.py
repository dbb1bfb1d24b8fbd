"""A prompt or messages to a `Request`, in one way for Python programs and every endpoint. Knows no HTTP."""
