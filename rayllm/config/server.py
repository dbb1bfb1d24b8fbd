"""How a server listens and whom it lets in."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from rayllm.config.base import BaseConfig
from rayllm.errors import ConfigError

HttpProxy = Literal["auto", "haproxy", "python"]


class ServerConfig(BaseConfig):
    """How the HTTP endpoint listens and guards itself."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: tuple[str, ...] = Field(
        (),
        description="Key that clients must send, or @FILE with one key per line; repeatable. Default: no key needed.",
    )
    allowed_origins: tuple[str, ...] = Field(
        (),
        description="Web origin whose pages may call this server (CORS), or *; repeatable. Default: only its own.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Name that clients call this server by, *.DOMAIN or * (any); repeatable. Checked only without an "
        "API key, where IP addresses, localhost and --host are known.",
    )
    http_proxy: HttpProxy = Field(
        "auto",
        description="Proxy in front of the ingress: HAProxy (Linux) or Serve's Python proxy. auto: HAProxy "
        "where Ray brings it.",
    )
    enable_fault_injection: bool = Field(
        False, description="Let clients kill workers, to see the engine recover: POST /admin/kill_worker, dashboard."
    )
    num_ingress_replicas: int = Field(1, ge=1, le=64, description="Number of ingress processes.")
    read_timeout_s: float = Field(
        60.0, gt=0, description="Seconds a client may not read its stream before it counts as disconnected."
    )
    shutdown_timeout_s: float = Field(30.0, ge=0, description="Seconds that open requests have to finish at shutdown.")

    @field_validator("api_key", "allowed_origins", "allowed_hosts", mode="before")
    @classmethod
    def _one_value_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    def read_api_keys(self) -> tuple[str, ...]:
        """The keys themselves, with each `@FILE` replaced by its lines. `ConfigError` where a file gives none."""
        keys: list[str] = []
        for entry in self.api_key:
            keys += _keys_of_file(entry[1:]) if entry.startswith("@") else [entry]
        if not all(keys):
            raise ConfigError("api_key is empty: give a key, @FILE, or leave it out to ask for none")
        return tuple(keys)


def _keys_of_file(path: str) -> list[str]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"api_key file {path!r} cannot be read: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"api_key file {path!r} holds no key: write one key per line")
    return keys
