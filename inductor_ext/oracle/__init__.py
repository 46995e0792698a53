"""The oracle: which kernel computes a problem on a device, and why the others do not.

select.py   the choice among the kernels of the table (``kernels/table.py``)
wna16.py    the same by the names and signatures of the field's WNA16 oracle, for experts
linear.py   and for dense layers
checkpoint.py, convert.py, quant_config.py    its conversions: a checkpoint's tensors in a kernel's layout
"""

from typing import Any

from inductor_ext.oracle.quant_config import make_wna16_moe_quant_config
from inductor_ext.oracle.select import (
    MOE_HIP,
    Choice,
    NoKernel,
    Required,
    choose,
    choose_backend,
    moe_hip,
    verdicts,
    why_not,
)
from inductor_ext.oracle.wna16 import (
    MoEConfig,
    WeightKey,
    WNA16MoEBackend,
    backend_to_kernel_cls,
    get_priority_backends,
    map_wna16_backend,
    select_wna16_moe_backend,
)

__all__ = [
    "MOE_HIP",
    "Choice",
    "MoEConfig",
    "NoKernel",
    "Required",
    "WNA16MoEBackend",
    "WeightKey",
    "backend_to_kernel_cls",
    "choose",
    "choose_backend",
    "convert_to_wna16_moe_kernel_format",
    "get_priority_backends",
    "make_wna16_moe_quant_config",
    "map_wna16_backend",
    "moe_hip",
    "select_wna16_moe_backend",
    "verdicts",
    "why_not",
]


def __getattr__(name: str) -> Any:
    """Every layout is behind it, which nobody waits for who only chooses."""
    if name == "convert_to_wna16_moe_kernel_format":
        from inductor_ext.oracle.convert import convert_to_wna16_moe_kernel_format

        return convert_to_wna16_moe_kernel_format
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
