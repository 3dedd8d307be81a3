"""Where a loaded model runs, and which variant it takes there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import te_runtime
from te_runtime import CudaOptions, InputError
from te_runtime.bundle import open_bundle
from te_runtime.predictor import choose_variant


def test_auto_says_what_it_chose_and_why(pristine: Path) -> None:
    with te_runtime.load(pristine, provider="auto") as model:
        assert model.provider_choice.asked == "auto"
        assert model.provider_choice.provider == model.provider
        assert model.provider_choice.reason


def test_cuda_options_without_cuda_are_refused(pristine: Path) -> None:
    with pytest.raises(InputError, match="expected CudaOptions, and provider 'cuda' or 'auto'"):
        te_runtime.load(pristine, provider="cpu", cuda=CudaOptions())


def test_fp16_is_preferred_on_cuda_only_where_no_precision_is_asked_for(pristine: Path) -> None:
    manifest = open_bundle(pristine).manifest
    (full,) = manifest.variants
    both = SimpleNamespace(variants=(full, full._replace(precision="fp16")))
    assert choose_variant(both, None, "cuda").precision == "fp16"
    assert choose_variant(both, None, "cpu").precision == "fp32"
    assert choose_variant(both, "fp32", "cuda").precision == "fp32"
    assert choose_variant(manifest, None, "cuda").precision == "fp32"
