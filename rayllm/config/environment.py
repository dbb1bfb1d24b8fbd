"""The environment variables that RayLLM reads. They are read in this file alone."""

from __future__ import annotations

import os


class Environment:
    """The environment variables that RayLLM reads; `RLLM_*`, because `RAYLLM_*` is read by another product."""

    NAMES = (
        "CUDA_VISIBLE_DEVICES",
        "MODELSCOPE_ENDPOINT",
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RLLM_API_KEY",
        "RLLM_LOG_DIR",
        "RLLM_USE_MODELSCOPE",
        "VLLM_USE_MODELSCOPE",
        "XDG_RUNTIME_DIR",
    )

    @classmethod
    def given(cls) -> dict[str, str]:
        """Those that are set, with their values; secrets hidden."""
        secret = ("RAY_AUTH_TOKEN", "RLLM_API_KEY")
        return {name: "(hidden)" if name in secret else os.environ[name] for name in cls.NAMES if name in os.environ}

    @staticmethod
    def cuda_visible_devices() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    @staticmethod
    def ha_proxy() -> bool | None:
        """Whether Serve shall put HAProxy before the ingress (`RAY_SERVE_ENABLE_HA_PROXY`); None: not said."""
        value = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY")
        return None if value is None else value.lower() in ("1", "true")

    @staticmethod
    def log_dir() -> str | None:
        return os.environ.get("RLLM_LOG_DIR")

    @staticmethod
    def runtime_dir() -> str | None:
        """The user's folder for what runs now (`XDG_RUNTIME_DIR`); None where there is none."""
        folder = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
        return folder if os.path.isdir(folder) and os.access(folder, os.W_OK) else None

    @staticmethod
    def use_modelscope() -> bool:
        """Whether names of models without a prefix are ModelScope's (`RLLM_USE_MODELSCOPE`, or vLLM's
        `VLLM_USE_MODELSCOPE`)."""
        value = os.environ.get("RLLM_USE_MODELSCOPE", os.environ.get("VLLM_USE_MODELSCOPE", ""))
        return value.lower() in ("1", "true")

    @staticmethod
    def modelscope_endpoint() -> str:
        return os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn").rstrip("/")

    @staticmethod
    def terminal_is_dumb() -> bool:
        """Whether the terminal cannot rewrite a line."""
        return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")

    @staticmethod
    def ray_is_loopback_only() -> bool:
        """Whether Ray was told to listen on loopback alone, as a cluster of our own is."""
        return os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == "0"

    @staticmethod
    def ray_address() -> str | None:
        """The Ray cluster to join (`RAY_ADDRESS`). None where there is none to join: not set, empty, or `local`, by
        which Ray too means one of the program's own."""
        address = os.environ.get("RAY_ADDRESS", "").strip()
        return None if address in ("", "local") else address

    @staticmethod
    def ray_token() -> str:
        """Ray's token itself (`RAY_AUTH_TOKEN`); empty where it is in a file."""
        return os.environ.get("RAY_AUTH_TOKEN", "")

    @staticmethod
    def ray_token_path() -> str:
        """The file of Ray's token (`RAY_AUTH_TOKEN_PATH`); empty: the one in the home folder."""
        return os.environ.get("RAY_AUTH_TOKEN_PATH", "")

    @staticmethod
    def has_home() -> bool:
        """Whether `HOME` is set; without it, the user's home folder is looked up."""
        return bool("HOME" in os.environ)

    @staticmethod
    def ray_auth_mode() -> str | None:
        """`token`, `disabled` or another way by which Ray lets programs in; None where nothing is said."""
        return os.environ.get("RAY_AUTH_MODE") or None

    @staticmethod
    def api_key() -> str | None:
        """The key that `rayllm chat` and `rayllm complete` send."""
        return os.environ.get("RLLM_API_KEY")
