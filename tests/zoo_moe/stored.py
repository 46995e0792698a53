"""Every format with three forms."""

from zoo_moe.base import BF16, case
from zoo_moe.formats import COMPRESSED_TENSORS, FORMATS
from zoo_moe.gathered import columns, columns_of_packed
from zoo_moe.grouped import transformers

for format in FORMATS:
    if format is not COMPRESSED_TENSORS:
        case(f"grouped_mm, {format.name}", transformers, format=format, dtypes=BF16)
        case(f"gather, bmm, {format.name}", columns, format=format)
        case(f"gather packed, bmm, {format.name}", columns_of_packed, format=format, group=16)
