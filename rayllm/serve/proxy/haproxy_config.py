"""The script that Serve runs as the HAProxy binary: it adjusts the configuration that Serve has written, then becomes
HAProxy.

Serve's template leaves no choice about the side ports (all interfaces), about error pages (plain text, status 500), or
about buffers towards a client that does not read. It does let us name the binary. Run as a script, by itself and
without any import of ours: it runs at each reload, and a reload should take milliseconds.

    python -IS haproxy_config.py /path/to/haproxy /folder/of/error/pages -db -f /path/to/haproxy.cfg ...
"""

from __future__ import annotations

import os
import re
import sys

PAGES = (400, 404, 408, 413, 500, 502, 503, 504)
"""The answers that HAProxy gives by itself, each a whole HTTP message in a file `<status>.http`."""

_SECTIONS = ("global", "defaults", "frontend", "backend", "listen")
_LEFT_OUT = ("frontend prometheus", "listen stats")
"""What has a port of its own; Serve asks over a Unix socket."""

_HEAD_TIMEOUT_S = 60
_MAX_REWRITE_BYTES = 1024
"""HAProxy's default, what it keeps free of a buffer."""
_SANE_ID = "{ req.hdr(x-request-id) -m reg '^[A-Za-z0-9._:/+=@-]{1,128}$' }"
_METHODS = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT"
_METHOD_REFUSED = (
    '{"error": {"message": "the method is not allowed here", "type": "invalid_request_error", "param": null, '
    '"code": "method_not_allowed"}}'
)
"""For methods that the ingress's parser of HTTP does not know, and answers with plain text."""
_ADDED = {
    # Between a client that does not read and the ingress: as little as keeps a loopback busy, so that the ingress
    # notices after kilobytes instead of megabytes.
    "global": ["tune.sndbuf.client 32768", "tune.rcvbuf.server 16384"],
    "defaults": ["timeout http-request 60s", "timeout http-keep-alive 300s"],
    "frontend http_frontend": [
        f"tcp-request inspect-delay {_HEAD_TIMEOUT_S}s",
        "tcp-request content lua.check_request",
        "tcp-request content switch-mode http proto h1 unless { var(txn.refused) -m found }",
        f"http-request del-header x-request-id unless {_SANE_ID}",
        f"http-request return status 405 content-type application/json string '{_METHOD_REFUSED}' "
        f"unless {{ method {_METHODS} }}",
    ],
}
"""What HAProxy cannot parse it answers with HTML, whatever `errorfile` says. So the first request of a connection is
looked at as bytes (`haproxy_requests.lua`)."""
_REFUSED = """backend refused_request
    mode tcp
    no option http-no-delay
    tcp-request content use-service lua.refuse
"""


def adjusted(config: str, pages: str) -> str:
    """The configuration as we want it; `pages` is the folder of error pages. Unknown lines stay as they are."""
    sections = _sections(config)
    has_app = any(line.startswith("use_backend ") for section in sections for line in section)
    lines = []
    for section in sections:
        title = section[0].strip()
        if title not in _LEFT_OUT:
            lines += [title, *(f"    {line}" for line in _body(title, section[1:], pages, has_app))]
    return "\n".join(lines) + f"\n{_REFUSED}"


def _sections(config: str) -> list[list[str]]:
    sections: list[list[str]] = []
    for line in config.splitlines():
        if line.split(" ")[0] in _SECTIONS:
            sections.append([line])
        elif line.strip() and sections:
            sections[-1].append(line.strip())
    return sections


def _body(title: str, lines: list[str], pages: str, has_app: bool) -> list[str]:
    added = list(_ADDED.get(title, ()))
    if title == "defaults":
        added += [f"errorfile {status} {pages}/{status}.http" for status in PAGES]
        lines = [line for line in lines if not line.startswith("errorfile ") and line != "option httplog"]
    elif title == "global":
        size = next((int(line.split()[1]) for line in lines if line.startswith("tune.bufsize ")), 16384)
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "haproxy_requests.lua")
        added.append(f"lua-load-per-thread {_quoted(script)} {_quoted(pages)} {size - _MAX_REWRITE_BYTES}")
    elif title == "backend default_backend":  # the request names no path, or there is no application (yet, any more)
        return [
            "http-request return status 400 default-errorfiles unless { path_beg / }",
            f"http-request return status {404 if has_app else 503} default-errorfiles",
        ]
    elif title == "frontend http_frontend":  # Serve's own paths ask for no key
        lines = ["mode tcp", *(line for line in lines if not line.startswith("log"))]  # TCP: until it is looked at
        lines = [re.sub(r"^http-request return .* if (routes|healthcheck.*)$", r"\1", line) for line in lines]
        closed = ["http-request return status 404 default-errorfiles if routes"]
        closed += ["http-request return status 404 default-errorfiles if healthcheck"]
        lines = [line for line in lines if line != "routes" and not line.startswith("healthcheck")]
        at = max((i for i, line in enumerate(lines) if line.startswith("acl ")), default=-1) + 1
        lines[at:at] = closed
        choices = [i for i, line in enumerate(lines) if line.startswith(("use_backend ", "default_backend "))]
        lines.insert(min(choices, default=len(lines)), "use_backend refused_request if { var(txn.refused) -m found }")
    elif title.startswith("backend "):
        added.append("errorfile 400 /dev/null")  # the client has closed its side: there is nobody to answer
    first = 0
    while first < len(lines) and lines[first].startswith(("mode ", "bind ")):
        first += 1
    return lines[:first] + added + lines[first:]


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def main(arguments: list[str]) -> None:
    binary, pages, *rest = arguments
    if "-f" in rest:
        path = rest[rest.index("-f") + 1]
        with open(path, encoding="utf-8") as file:
            config = adjusted(file.read(), pages)
        with open(path, "w", encoding="utf-8") as file:
            file.write(config)
    # Without -dR HAProxy shares its port with `EarlyPort`, which has it until there is an ingress.
    os.execv(binary, [binary, *(argument for argument in rest if argument != "-dR")])


if __name__ == "__main__":
    main(sys.argv[1:])
