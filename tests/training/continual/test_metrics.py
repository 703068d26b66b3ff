"""The matrix's numbers against ones computed by hand from their definitions."""

from __future__ import annotations

import pytest

from training.continual.metrics import Matrix, TaskChange, drift

TASKS = ("a", "b", "c")
BASE = (0.1, 0.2, 0.3)
ROWS = ((0.9, 0.25, 0.2), (0.6, 0.8, 0.5), (0.7, 0.5, 1.0))


def test_three_tasks_by_hand() -> None:
    matrix = Matrix(TASKS, BASE, ROWS)
    assert matrix.accuracy == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert matrix.backward_transfer == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert matrix.forward_transfer == pytest.approx(((0.25 - 0.2) + (0.5 - 0.3)) / 2)
    assert matrix.forgetting == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert matrix.worst == TaskChange("b", pytest.approx(-0.3))
    assert matrix.below((0.9, 0.8, 0.7)) == pytest.approx((2.2 - 2.4) / 3)


def test_forgetting_counts_from_the_best_and_not_from_the_own_stage() -> None:
    risen = Matrix(TASKS, BASE, ((0.5, 0, 0), (0.9, 0.5, 0), (0.6, 0.5, 0.5)))
    assert risen.backward_transfer == pytest.approx((0.1 + 0) / 2)
    assert risen.forgetting == pytest.approx((0.3 + 0) / 2)


def test_a_run_half_done() -> None:
    matrix = Matrix(TASKS, BASE, ROWS[:2])
    assert matrix.accuracy == pytest.approx(0.7) and matrix.backward_transfer == pytest.approx(-0.3)
    assert matrix.forward_transfer == pytest.approx(0.05) and matrix.forgetting == pytest.approx(0.3)
    assert matrix.below((0.9, 0.9, 0.0)) == pytest.approx(-0.2)
    first = Matrix(TASKS, BASE, ROWS[:1])
    assert first.accuracy == 0.9 and first.worst is None
    assert first.backward_transfer is first.forward_transfer is first.forgetting is None


@pytest.mark.parametrize("rows", [(), ROWS + ROWS, ((0.1, 0.2),)])
def test_shapes_are_checked(rows: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ValueError, match="a matrix over 3 tasks"):
        Matrix(TASKS, BASE, rows)
    with pytest.raises(ValueError, match="the bound has 1"):
        Matrix(TASKS, BASE, ROWS).below((0.5,))


def test_drift_is_positive_where_text_is_predicted_worse() -> None:
    assert drift(2.5, 2.6) == pytest.approx(0.1)
