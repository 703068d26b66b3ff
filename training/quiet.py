"""Keeping the libraries under us from writing over what we show."""

from __future__ import annotations

import logging
import os
import warnings

_LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def quiet_libraries() -> None:
    """Only errors of the libraries reach the terminal. Call it before they are imported; it imports none of them."""
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", module=rf"(torch|{'|'.join(_LIBRARIES)})\b")
