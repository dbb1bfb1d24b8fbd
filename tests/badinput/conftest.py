"""Two markers of this folder, which run only where `-m` names them:

pytest -m catalogue tests/badinput      every bad request against one running server, two minutes; CI runs it
pytest -m slow tests/badinput           what takes a minute or much memory, and a round under PYTHONOPTIMIZE
"""

from __future__ import annotations

import pytest

_MARKERS = ("catalogue", "slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "catalogue: bad requests against a running server; runs where -m names it")
    config.addinivalue_line("markers", "slow: takes a minute or much memory; runs where -m names it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = str(config.getoption("markexpr"))
    for item in items:
        name = next((name for name in reversed(_MARKERS) if item.get_closest_marker(name)), None)
        if name is not None and name not in asked:
            item.add_marker(pytest.mark.skip(reason=f"{name}: run it with -m {name}"))
