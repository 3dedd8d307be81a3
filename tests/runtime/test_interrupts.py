from __future__ import annotations

import pytest

from te_runtime.interrupts import was_interrupted


def caught(first: BaseException, *, explicit: bool) -> BaseException:
    try:
        try:
            raise first
        except BaseException as error:
            if explicit:
                raise RuntimeError("while a class was made") from error
            raise RuntimeError("while a class was made")  # noqa: B904 - the case where it is only the context
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("explicit", [True, False])
def test_an_interrupt_behind_another_error_is_found(explicit: bool) -> None:
    assert was_interrupted(caught(KeyboardInterrupt(), explicit=explicit))
    assert not was_interrupted(caught(ValueError("no"), explicit=explicit))


def test_an_interrupt_itself_and_no_error() -> None:
    assert was_interrupted(KeyboardInterrupt())
    assert not was_interrupted(None)
