"""How reports name where a model ran: the provider, the GPU, and why if te_runtime was left to decide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from te_runtime.providers import ProviderChoice

if TYPE_CHECKING:
    from te_runtime.describe import Json

__all__ = ["choice_lines", "provider_json", "shown_provider"]


def shown_provider(choice: ProviderChoice) -> str:
    """`cpu`, or `cuda (NVIDIA H200)`."""
    return f"{choice.provider} ({choice.device})" if choice.device else choice.provider


def choice_lines(choice: ProviderChoice) -> Iterator[str]:
    """A line on why, where the choice was te_runtime's."""
    if choice.asked == "auto":
        yield f"provider auto took {choice.provider}: {choice.reason}"


def provider_json(choice: ProviderChoice) -> dict[str, Json]:
    """The keys that `verify --json` and `run --json` share."""
    return {
        "provider": choice.provider,
        "gpu": choice.device,
        "provider_asked": choice.asked,
        "provider_reason": choice.reason,
    }
