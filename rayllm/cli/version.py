"""`rayllm version`."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.cli.flags import Parser


def parser() -> Parser:
    made = Parser(prog="rayllm version", description="Print the version.")
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """Prints RayLLM's version and those of the libraries that decide what it can do."""
    given = parser().parse(argv)
    versions = library_versions()
    if given.get("json"):
        import json

        print(json.dumps(versions))
    else:
        print("\n".join(f"{name} {version or 'not installed'}" for name, version in versions.items()))
    return 0


def library_versions() -> dict[str, str | None]:
    """Names and versions, read from the installed metadata: nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    from rayllm import __version__

    versions: dict[str, str | None] = {"rayllm": __version__}
    for name in ("ray", "torch", "transformers", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions
