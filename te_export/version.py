"""The version of this release, written once for code that must not read package metadata."""

from __future__ import annotations

__all__ = ["VERSION"]

VERSION = "0.1.0"
