"""Ray Serve is imported here once: its own deprecation warnings would be errors inside a test."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
