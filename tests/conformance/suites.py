"""Which clients are tried, what each needs, and against which model."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_tests.source import BUILD_PACKAGES, TEST_PACKAGES, VERSION


@dataclass(frozen=True)
class Suite:
    """One client. `packages` go into an environment of its own; `file` stands in `clients/`.

    Python files are run by pytest, `.mjs` files by node's own test runner. `quick`: small enough for every CI run.
    `vllm_tests` is no file but a folder, whose tests start servers of their own; `version` is of what they come from.
    """

    name: str
    file: str
    packages: tuple[str, ...]
    model: str = "closer"
    quick: bool = False
    version: str = ""
    """Where it is not that of the first package."""

    @property
    def starts_servers(self) -> bool:
        return self.model == "its own"

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
    Suite("vllm", "vllm_tests", (*TEST_PACKAGES, *BUILD_PACKAGES), model="its own", version=VERSION),
    Suite("langchain", "langchain_python.py", ("langchain-openai", "langchain-tests"), model="memoriser"),
)
