"""Small models of LibMTL: one image batch in, a dict of one tensor per task out.

The encoders are built of LibMTL's own residual blocks; MTAN needs the channels of a ResNet-18, so it gets the
library's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType, ModuleType

import torch
from library_model import LibraryModel, as_if_trained
from torch import Tensor, nn

__all__ = ["LIBMTL_MODELS", "build_cgc"]


@contextmanager
def _torchvision_as_it_was() -> Iterator[None]:
    """LibMTL 1.1.5 imports a downloader of pretrained weights from a module that torchvision has since dropped.
    Nothing here downloads weights, so the name alone stands there during the import."""
    parts = {
        name: ModuleType(name) for name in ("torchvision", "torchvision.models", "torchvision.models.utils")
    }
    vars(parts["torchvision.models.utils"])["load_state_dict_from_url"] = None
    before = {name: sys.modules.get(name) for name in parts}
    sys.modules.update(parts)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


with _torchvision_as_it_was():
    from LibMTL.architecture import CGC, HPS, MTAN, PLE, Cross_stitch, DSelect_k, MMoE
    from LibMTL.model.resnet import BasicBlock, resnet18

TASKS = ("segment", "depth", "normal")
WIDTHS = {"segment": 7, "depth": 1, "normal": 3}
SIDE = 16
CHANNELS = (4, 4, 8, 8, 8)


class SmallResNet(nn.Module):
    """An encoder with the parts that LibMTL's architectures take from a ResNet, and few channels."""

    feature_dim = CHANNELS[-1]

    def __init__(self) -> None:
        super().__init__()
        stem, *widths = CHANNELS
        self.conv1 = nn.Conv2d(3, stem, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _block(stem, widths[0], 1)
        self.layer2 = _block(widths[0], widths[1], 2)
        self.layer3 = _block(widths[1], widths[2], 1)
        self.layer4 = _block(widths[2], widths[3], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # (B, C, 4, 4)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, C, 2, 2)


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or channels_in != channels_out:
        downsample = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(channels_out),
        )
    return nn.Sequential(BasicBlock(channels_in, channels_out, stride, downsample))


def _decoders(features: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            task: nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, width), *_activation(task)
            )
            for task, width in WIDTHS.items()
        }
    )


def _activation(task: str) -> list[nn.Module]:
    return [nn.Softplus()] if task == "depth" else []


def _model(
    architecture: type[nn.Module],
    encoder: Callable[[], nn.Module],
    features: int,
    seed: int,
    *,
    gates: str = "",
    options: Mapping[str, object] = MappingProxyType({}),
    side: int = SIDE,
) -> LibraryModel:
    torch.manual_seed(seed)
    module = architecture(
        list(TASKS),
        encoder,
        _decoders(features),
        rep_grad=False,
        multi_input=False,
        device=torch.device("cpu"),
        **options,
    )

    def images(rows: int, seed: int) -> Tensor:
        return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))

    found = {task: gates.format(task) for task in TASKS} if gates else {}
    return LibraryModel(as_if_trained(module, seed), images, TASKS, found)


def _image_options(**more: object) -> dict[str, object]:
    return {"img_size": [3, SIDE, SIDE], **more}


def _small(
    architecture: type[nn.Module], seed: int, *, gates: str = "", options: Mapping[str, object] | None = None
) -> LibraryModel:
    return _model(
        architecture, SmallResNet, SmallResNet.feature_dim, seed, gates=gates, options=options or {}
    )


def _hps() -> LibraryModel:
    return _small(HPS, 11)


def _mmoe() -> LibraryModel:
    return _small(MMoE, 12, gates="gate_specific.{}", options=_image_options(num_experts=[3]))


def _cgc() -> LibraryModel:
    """A gate weighs the two shared experts, then the task's own: one, two and one."""
    return _small(CGC, 13, gates="gate_specific.{}", options=_image_options(num_experts=[2, 1, 2, 1]))


def _ple() -> LibraryModel:
    """Five levels of gates, each task with its own chain; the shared experts are weighed first."""
    options = _image_options(num_experts=[2, 1, 1, 1])
    return _small(PLE, 14, gates="encoder.gate_specific.{}.4", options=options)


def _cross_stitch() -> LibraryModel:
    """Its sums read single elements of one parameter."""
    return _small(Cross_stitch, 15)


def _mtan() -> LibraryModel:
    return _model(MTAN, resnet18, 512, 16, side=32)


def _dselect_k() -> LibraryModel:
    """Gates that are no softmax: products of smooth steps, weighed by a softmax over selectors."""
    model = _small(DSelect_k, 17, options=_image_options(num_experts=[4], num_nonzeros=2, kgamma=1.0))
    return replace(model, optional_gates=dict.fromkeys(TASKS, 4), spare_numbers=2)


def build_cgc() -> nn.Module:
    """A CGC with other weights than the one in LIBMTL_MODELS."""
    module = _cgc().module
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.reset_parameters()
    return module


LIBMTL_MODELS: Mapping[str, Callable[[], LibraryModel]] = MappingProxyType(
    {
        "libmtl-hps": _hps,
        "libmtl-mmoe": _mmoe,
        "libmtl-cgc": _cgc,
        "libmtl-ple": _ple,
        "libmtl-cross-stitch": _cross_stitch,
        "libmtl-mtan": _mtan,
        "libmtl-dselect-k": _dselect_k,
    }
)
