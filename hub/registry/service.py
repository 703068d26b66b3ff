"""The servicer: messages → nouns, is the caller allowed to, the hub's own verb, nouns → messages.

Every method first asks who calls, then what they may in the namespace they name, and only then looks at the hub: what
is refused says nothing of what exists. Where no namespace is named, what the caller may not read is left out.
"""

from __future__ import annotations

from hub.registry.access import Observer, ServiceLimits
from hub.registry.adopt_call import AdoptCall
from hub.registry.changing import ChangingCalls
from hub.registry.evaluation_calls import EvaluationCalls
from hub.registry.following import FollowingCalls
from hub.registry.pushing import PushingCalls
from hub.registry.reading import ReadingCalls
from hub.registry.signature_calls import SignatureCalls
from hub.registry.token_calls import TokenCalls

__all__ = ["Observer", "RegistryService", "ServiceLimits"]


class RegistryService(
    SignatureCalls, EvaluationCalls, AdoptCall, ReadingCalls, PushingCalls, ChangingCalls, FollowingCalls, TokenCalls
):
    """One hub for many callers: every call of `loraplex.v1.Registry`; see `Access`."""
