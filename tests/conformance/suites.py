"""Which clients are tried, what each needs, and against which model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """One client. `packages` go into an environment of its own; `file` stands in `clients/`.

    Python files are run by pytest, `.mjs` files by node's own test runner. `quick`: small enough for every CI run.
    """

    name: str
    file: str
    packages: tuple[str, ...]
    model: str = "closer"
    quick: bool = False

    @property
    def is_node(self) -> bool:
        return self.file.endswith(".mjs")


SUITES = (
    Suite("openai", "openai_python.py", ("openai", "pydantic"), quick=True),
    Suite("anthropic", "anthropic_python.py", ("anthropic",), quick=True),
    Suite("openai-node", "openai_node.mjs", ("openai", "zod"), quick=True),
    Suite("vercel-ai", "vercel_ai.mjs", ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod")),
    Suite("instructor", "instructor_python.py", ("instructor", "openai")),
    Suite("litellm", "litellm_python.py", ("litellm[mcp]",)),
    Suite("cohere", "cohere_python.py", ("cohere",)),
    Suite("langchain", "langchain_python.py", ("langchain-openai", "langchain-tests"), model="memoriser"),
)
