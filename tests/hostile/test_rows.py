"""The table of rows names tests that are there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.hostile.rows import ROWS

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_tests(row: int) -> None:
    _, _, tests = ROWS[row]
    for test in tests:
        file, _, beginning = test.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert any(name.startswith(beginning) for name in names), test


def test_every_test_of_a_row_is_in_the_table() -> None:
    told = {file for _, _, tests in ROWS.values() for file in (test.partition("::")[0] for test in tests)}
    for path in (TESTS / "hostile").glob("test_hub_*.py"):
        assert f"hostile/{path.name}" in told
