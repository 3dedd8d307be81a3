"""Reads checkpoint files safely: nothing in them is executed unless the caller trusts them."""

from te_export.checkpoint.contents import Checkpoint
from te_export.checkpoint.reader import read_checkpoint

__all__ = ["Checkpoint", "read_checkpoint"]
