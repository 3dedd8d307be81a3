"""Modules whose parameters hold nothing yet are refused, and stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from te_export.errors import UsageError
from te_export.modules.exportable_module import make_exportable

ROWS = torch.zeros(3, 4)


def test_a_module_on_the_meta_device_is_refused_with_what_loads_it() -> None:
    with pytest.raises(
        UsageError, match=r"weight is on the meta device.*load_state_dict\(state, assign=True\)"
    ):
        make_exportable(nn.Linear(4, 2, device="meta"), ROWS)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_module_that_was_never_called_is_not_given_random_weights() -> None:
    module = nn.LazyLinear(2)

    with pytest.raises(UsageError, match=r"weight has no shape yet.*call the module once"):
        make_exportable(module, ROWS)

    assert is_lazy(module.weight)
