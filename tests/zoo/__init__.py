"""The zoo: "dequantise int4, then matmul" as people and libraries write it, and the near misses.

What libraries compute is written anew from their graphs; test_libraries.py runs the libraries themselves.
"""

from importlib import import_module

from zoo.base import ZOO, Idiom

FAMILIES = ("ct", "gptq", "awq", "bits", "hqq", "unpacked", "affine", "matmuls", "near_misses", "refusals")
for family in FAMILIES:
    import_module(f"zoo.{family}")

POSITIVES = [idiom for idiom in ZOO if idiom.positive]
NEGATIVES = [idiom for idiom in ZOO if idiom.positive is False]
EITHER = [idiom for idiom in ZOO if idiom.positive is None]

__all__ = ["EITHER", "NEGATIVES", "POSITIVES", "ZOO", "Idiom"]
