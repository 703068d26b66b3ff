"""What a continual run refuses, each cause its own class with a stable `reason`."""

from __future__ import annotations

from training.errors import TrainingError


class ContinualPlanInvalid(TrainingError):
    """A plan is not YAML, or asks for something that is not there; the message names the place."""

    reason = "CONTINUAL_PLAN_INVALID"


class RunMismatch(TrainingError):
    """The run directory belongs to another plan, or to files that have changed since."""

    reason = "CONTINUAL_RUN_MISMATCH"


class RunMissing(TrainingError):
    """The directory holds no continual run, or none with a finished stage."""

    reason = "CONTINUAL_RUN_MISSING"


class AliasTaken(TrainingError):
    """The alias that a new run is to promote to is set already, by somebody else."""

    reason = "CONTINUAL_ALIAS_TAKEN"


class BoundMismatch(TrainingError):
    """A run cannot be the bound of another: it has another strategy, base or data, or lacks tasks."""

    reason = "CONTINUAL_BOUND_MISMATCH"


class WorkTaken(TrainingError):
    """Another comparison is running in the same work directory."""

    reason = "COMPARISON_WORK_TAKEN"


class RunTaken(TrainingError):
    """Another process runs a plan in the same directory."""

    reason = "CONTINUAL_RUN_TAKEN"


class FactorsUnsupported(TrainingError):
    """An adapter has parts that are no plain low-rank deltas, or adapters do not fit each other."""

    reason = "FACTORS_UNSUPPORTED"


class PlotsUnavailable(TrainingError):
    """A plot was asked for, and matplotlib is not installed."""

    reason = "PLOTS_UNAVAILABLE"
