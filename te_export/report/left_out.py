"""The variants that were asked for and are not in the bundle; every report says the same of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from te_export.options import FailedVariant

__all__ = ["left_out_rows"]


def left_out_rows(left_out: Sequence[FailedVariant]) -> Iterator[tuple[str, str]]:
    """Each precision, and why; without the precision at the beginning, which stands beside it."""
    for failed in left_out:
        reason = failed.reason
        for beginning in (f"{failed.precision} is left out: ", f"{failed.precision}: "):
            reason = reason.removeprefix(beginning)
        yield failed.precision, reason
