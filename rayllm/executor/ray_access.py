"""Whether a Ray cluster lets this program in, asked of its head before Ray itself is: Ray repeats its question for up
to a minute and then says nothing of tokens."""

from __future__ import annotations

from enum import Enum

from rayllm.config import Environment
from rayllm.errors import ConfigError, EngineUnreachableError
from rayllm.machine.ray_token import token_file

_ASK_TIMEOUT_S = 5.0
"""A head answers in milliseconds; one that is far too busy for a program's start takes seconds."""
_GET_IT = "copy ~/.ray/auth_token from the cluster's head node, or set RAY_AUTH_TOKEN to what 'ray get-auth-token' says"


class Answer(Enum):
    """Of a cluster's head to a question with a token, or without one."""

    WELCOME = "welcome"
    REFUSED = "refused"
    NONE = "none"


def ask_head(address: str, token: str = "", timeout_s: float = _ASK_TIMEOUT_S) -> Answer:
    """Asks the head at `host:port` for the cluster's id."""
    import grpc

    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            refusals = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
            return Answer.REFUSED if error.code() in refusals else Answer.NONE
        return Answer.WELCOME


def check_access(address: str, *, has_mode: bool = True) -> bool:
    """Whether the cluster at `host:port` asks for a token; this program then has the right one. Raises `ConfigError`,
    which names the file or variable, where it has none or another, and `EngineUnreachableError` where the
    process that listens there does not answer as a Ray head does. Without `has_mode`, RAY_AUTH_MODE does not bind this
    program."""
    mode = Environment.ray_auth_mode() if has_mode else None
    if mode not in (None, "token", "disabled"):
        return True  # Ray gets its tokens elsewhere
    answer = ask_head(address)
    if answer is Answer.NONE:
        raise EngineUnreachableError(
            f"the process at RAY_ADDRESS={address!r} does not answer as the head of a Ray cluster: give the address "
            "that 'ray start --head' printed there"
        )
    if answer is Answer.WELCOME:
        if mode == "token":
            raise ConfigError(
                f"RAY_AUTH_MODE=token, and the Ray cluster at RAY_ADDRESS={address!r} runs without tokens: "
                "unset RAY_AUTH_MODE"
            )
        return False
    if mode == "disabled":
        raise ConfigError(
            f"RAY_AUTH_MODE=disabled, and the Ray cluster at RAY_ADDRESS={address!r} requires a token: "
            "unset RAY_AUTH_MODE"
        )
    token, source = read_token()
    if ask_head(address, token) is not Answer.WELCOME:
        raise ConfigError(
            f"the Ray cluster at RAY_ADDRESS={address!r} does not accept the token in {source}: it is another "
            f"cluster's; {_GET_IT}"
        )
    return True


def read_token() -> tuple[str, str]:
    """The token that Ray will show, and the variable or file that it is in. Raises `ConfigError` where there is
    none."""
    if token := Environment.ray_token():
        return token.strip(), "RAY_AUTH_TOKEN"
    path, is_named = token_file(), bool(Environment.ray_token_path())
    if path is None:
        raise ConfigError(f"the Ray cluster requires a token, but there is no home folder to look for it: {_GET_IT}")
    source = f"RAY_AUTH_TOKEN_PATH={path}" if is_named else f"{path}"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        unset = "" if is_named else " (RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH are not set)"
        raise ConfigError(
            f"the Ray cluster requires a token, but {source} cannot be read: {error.strerror}{unset}; {_GET_IT}"
        ) from None
    if not token:
        raise ConfigError(f"the Ray cluster requires a token, but {source} is empty: {_GET_IT}")
    return token, source
