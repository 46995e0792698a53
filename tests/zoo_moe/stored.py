"""Every format with two forms, and those that are far from [E, N, K] with grouped_mm as well."""

from zoo_moe.base import BF16, case
from zoo_moe.formats import COMPRESSED_TENSORS, FORMATS, HQQ
from zoo_moe.gathered import columns, columns_of_packed
from zoo_moe.grouped import transformers

for format in FORMATS:
    if format is not COMPRESSED_TENSORS:
        if format.kn or format is HQQ:
            case(f"grouped_mm, {format.name}", transformers, format=format, dtypes=BF16)
        case(f"gather, bmm, {format.name}", columns, format=format)
        case(f"gather packed, bmm, {format.name}", columns_of_packed, format=format, group=16)
