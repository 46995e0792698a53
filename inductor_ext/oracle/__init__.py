"""The oracle: which kernel computes a problem on a device, and why the others do not.

select.py   the choice among the kernels of the table (``kernels/table.py``)
wna16.py    the same by the names and signatures of the field's WNA16 oracle
"""

from inductor_ext.oracle.select import MOE_HIP, Choice, NoKernel, Required, choose, moe_hip, verdicts, why_not

__all__ = ["MOE_HIP", "Choice", "NoKernel", "Required", "choose", "moe_hip", "verdicts", "why_not"]
