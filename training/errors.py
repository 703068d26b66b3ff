"""What training and evaluation refuse, each cause its own class with a stable `reason`."""

from __future__ import annotations


class TrainingError(Exception):
    """Base of everything this package raises on purpose; the message says what to do about it."""

    reason = "TRAINING_ERROR"


class DataInvalid(TrainingError):
    """A data file is not the chat JSONL that training reads; the message names the file and line."""

    reason = "DATA_INVALID"


class DataTooSmall(TrainingError):
    """Too few examples are left to train on."""

    reason = "DATA_TOO_SMALL"


class SourceUnavailable(TrainingError):
    """A package that carries a task's data is missing, cannot be fetched or is not the pinned one."""

    reason = "SOURCE_UNAVAILABLE"


class UnknownTask(TrainingError):
    """No task has this name."""

    reason = "UNKNOWN_TASK"


class UnknownRecipe(TrainingError):
    """No recipe has this name."""

    reason = "UNKNOWN_RECIPE"


class RecipeInvalid(TrainingError):
    """A value of the recipe is outside what it may be."""

    reason = "RECIPE_INVALID"


class TemplateUnsupported(TrainingError):
    """The base's chat template refuses a conversation, or has no known counterpart that marks the answers."""

    reason = "CHAT_TEMPLATE_UNSUPPORTED"


class TemplateMismatch(TrainingError):
    """The training template renders a conversation otherwise than the base's own."""

    reason = "CHAT_TEMPLATE_MISMATCH"


class MaskEmpty(TrainingError):
    """The assistant mask of an example selects nothing, so it would train nothing."""

    reason = "MASK_EMPTY"


class StopTokenUntrained(TrainingError):
    """The assistant mask leaves out the token that ends an answer, so the model would never learn to stop."""

    reason = "STOP_TOKEN_UNTRAINED"


class MethodUnsupported(TrainingError):
    """The base cannot be trained in the way asked for."""

    reason = "METHOD_UNSUPPORTED"


class OutputExists(TrainingError):
    """The output directory, or the checkpoints beside it, are there already."""

    reason = "OUTPUT_EXISTS"


class OutputUnwritable(TrainingError):
    """An output cannot be written: its directory is not there, or the disk is full."""

    reason = "OUTPUT_UNWRITABLE"


class OutputTaken(TrainingError):
    """Another process is training into the same output."""

    reason = "OUTPUT_TAKEN"


class ResumeMismatch(TrainingError):
    """The checkpoints belong to a run with other data, base or settings, or there are none."""

    reason = "RESUME_MISMATCH"


class TrainingDiverged(TrainingError):
    """The loss stopped being a finite number."""

    reason = "TRAINING_DIVERGED"


class GenerationFailed(TrainingError):
    """The engine refused or failed a prompt of an evaluation."""

    reason = "GENERATION_FAILED"


class DemoFailed(TrainingError):
    """A step of `hub demo` did not show what it is there to show; the message says which."""

    reason = "DEMO_FAILED"


class ExtractionImpossible(TrainingError):
    """Two models from which no LoRA can be made: of different shapes, equal, or too small for the rank."""

    reason = "EXTRACTION_IMPOSSIBLE"


class PlanInvalid(TrainingError):
    """A sweep's plan is not YAML, or asks for something that is not there; the message names the place."""

    reason = "PLAN_INVALID"


class CellFailed(TrainingError):
    """One cell of a sweep could not be run; the message ends with what its process said last."""

    reason = "CELL_FAILED"


class CellTaken(TrainingError):
    """Another sweep is at the same cell."""

    reason = "CELL_TAKEN"


class LogUnavailable(TrainingError):
    """A plot or a TensorBoard log was asked for, and the package that writes it is not installed."""

    reason = "LOG_UNAVAILABLE"


class NothingToRecord(TrainingError):
    """Scores were to be kept beside versions, and none of the models scored is a version in a hub."""

    reason = "NOTHING_TO_RECORD"


class WeightsMissing(TrainingError):
    """The base's files have no matrix of the name that an adapter adapts."""

    reason = "BASE_WEIGHTS_MISSING"
