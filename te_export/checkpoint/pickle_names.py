"""Which classes and functions a pickle may name and still be read without running code.

Nothing named here is ever imported or called. A name is allowed when what it stands for is understood
(tensors, containers, layers) or does not matter to the model (an optimizer, a date). Any other name means
that the object cannot be known without running code: the file is refused before anything is interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from te_export.checkpoint.inert import Name
from te_export.errors import UntrustedPickleError

__all__ = ["MODEL_CLASS_NAMES", "is_known", "require_known_names"]

_MAX_NAMES_SHOWN: Final = 10
_MAX_NAME_CHARACTERS: Final = 200

MODEL_CLASS_NAMES: Final = frozenset(
    {
        "TaskExpertModel",
        "TaskExpertConfig",
        "BackboneNetwork",
        "ExpertNetwork",
        "DynamicGatingNetwork",
        "TaskSpecificHead",
    }
)

_PACKAGES: Final = ("torch.nn", "torch.optim")

_STORAGES: Final = frozenset(
    f"{kind}Storage"
    for kind in (
        *("Double", "Float", "Half", "BFloat16", "ComplexDouble", "ComplexFloat"),
        *("Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped", "Typed"),
        *("QInt8", "QInt32", "QUInt8", "QUInt4x2", "QUInt2x4"),
    )
)
_DTYPES: Final = frozenset(
    {
        *("float16", "float32", "float64", "bfloat16", "complex32", "complex64", "complex128", "bool"),
        *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
        *(
            "float8_e4m3fn",
            "float8_e5m2",
            "float8_e4m3fnuz",
            "float8_e5m2fnuz",
            "float8_e8m0fnu",
            "float4_e2m1fn_x2",
        ),
    }
)
_QSCHEMES: Final = frozenset(
    {
        *("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric", "per_channel_symmetric"),
        "per_channel_affine_float_qparams",
    }
)
_NUMPY_ARRAYS: Final = frozenset({"scalar", "_reconstruct"})
_PATHS: Final = frozenset(
    {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"}
)

_BY_MODULE: Final[Mapping[str, frozenset[str]]] = {
    "torch": _STORAGES | _DTYPES | _QSCHEMES | {"Tensor", "Size", "device"},
    "torch.cuda": _STORAGES,
    "torch.storage": _STORAGES,
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.torch_version": frozenset({"TorchVersion"}),
    "torch._tensor": frozenset({"Tensor", "_rebuild_from_type_v2"}),
    "torch._utils": frozenset(
        {
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
            "_rebuild_sparse_tensor",
            "_rebuild_nested_tensor",
            "_rebuild_qtensor",
            "_rebuild_meta_tensor_no_storage",
            "_rebuild_device_tensor_from_cpu_tensor",
            "_rebuild_device_tensor_from_numpy",
        }
    ),
    "collections": frozenset({"OrderedDict", "defaultdict", "Counter", "deque"}),
    "builtins": frozenset(
        {
            *("set", "frozenset", "list", "dict", "tuple", "slice", "range", "object"),
            *("bytearray", "bytes", "complex", "int", "float", "bool", "str"),
        }
    ),
    "numpy": frozenset({"dtype", "ndarray"}),
    "numpy.core.multiarray": _NUMPY_ARRAYS,
    "numpy._core.multiarray": _NUMPY_ARRAYS,
    "numpy.core.numeric": frozenset({"_frombuffer"}),
    "numpy._core.numeric": frozenset({"_frombuffer"}),
    "_codecs": frozenset({"encode"}),
    "argparse": frozenset({"Namespace"}),
    "types": frozenset({"SimpleNamespace"}),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "datetime": frozenset({"date", "datetime", "time", "timedelta", "timezone"}),
}


def is_known(name: Name) -> bool:
    """Whether the name is understood, or can be left alone."""
    if len(name.qualname) > _MAX_NAME_CHARACTERS:
        return False
    if name.qualname.rpartition(".")[2] in MODEL_CLASS_NAMES:
        return True
    if name.qualname in _BY_MODULE.get(name.module, ()):
        return True
    in_package = any(name.module == package or name.module.startswith(f"{package}.") for package in _PACKAGES)
    return in_package and name.qualname.isidentifier()


def require_known_names(names: Sequence[Name]) -> None:
    """Refuse a pickle that names anything unknown.

    Raises:
        UntrustedPickleError: with the unknown names, sorted, and what can be done about them.
    """
    unknown = sorted({f"{ascii(str(name))[1:-1]:.100}" for name in names if not is_known(name)})
    if not unknown:
        return
    more = len(unknown) - _MAX_NAMES_SHOWN
    listed = ", ".join(unknown[:_MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
    raise UntrustedPickleError(
        f"can only be rebuilt by running code that it names: {listed}. Nothing was run. Expected tensors, "
        f"plain values, torch layers and the classes {', '.join(sorted(MODEL_CLASS_NAMES))}. Where the model "
        "can be loaded, save its weights with torch.save(model.state_dict(), 'model.pt'); if you trust "
        "whoever made this file, pass --trust-pickle, which runs its code"
    )
