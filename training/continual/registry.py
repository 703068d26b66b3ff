"""The strategies by the names that plans give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from training.continual.aiming import Aimed
from training.continual.contract import Strategy
from training.continual.errors import ContinualPlanInvalid
from training.continual.pacing import PacedReplay
from training.continual.strategies import Isolated, Joint, Merge, OLora, Osf, Reducing, Replay, Sequential, Slao

KINDS: Mapping[str, Callable[..., Strategy]] = {
    "isolated": Isolated,
    "sequential": Sequential,
    "replay": Replay,
    "on-policy-replay": lambda **given: Replay(**{"share": 0.05, **given, "own_answers": True,
                                                  "name": "on-policy-replay"}),
    "paced-replay": PacedReplay,
    "aimed": Aimed,
    "o-lora": OLora,
    "slao": Slao,
    "osf": Osf,
    "merge": Merge,
    "joint": Joint,
}  # fmt: skip
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "replay": ("share", "capacity"),
    "on-policy-replay": ("share", "capacity"),
    "paced-replay": ("share", "capacity", "judges"),
    "aimed": ("reads", "own_weight", "keep_weight", "judges", "again", "aim_last"),
    "o-lora": ("weight",),
    "osf": ("keep",),
    "merge": ("how", "density", "rank_factor"),
}


def strategy_named(name: str, options: Mapping[str, Any], reduce_share: float | None = None) -> Strategy:
    """The strategy of that name with its options; raises `ContinualPlanInvalid`."""
    if name not in KINDS:
        raise ContinualPlanInvalid(f"there is no strategy {name!r}; there are: {', '.join(KINDS)}")
    known = _OPTIONS.get(name, ())
    for option, value in options.items():
        if option not in known:
            raise ContinualPlanInvalid(
                f"strategy {name} has no option {option!r}; it has: {', '.join(known) or 'none'}"
            )
        if option == "aim_last":
            if not isinstance(value, bool):
                raise ContinualPlanInvalid(f"strategy {name}: {option} is true or false, not {value!r}")
        elif option != "how" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ContinualPlanInvalid(f"strategy {name}: {option} is a number, not {value!r}")
    for option in ("capacity", "judges", "reads"):
        if not isinstance(options.get(option, 0), int):
            raise ContinualPlanInvalid(f"strategy {name}: {option} is a whole number, not {options[option]!r}")
    made = KINDS[name](**options)
    return made if reduce_share is None else Reducing(made, reduce_share)
