"""The zoo of routed experts: top-k experts in int4 as people and libraries write them, and the near misses."""

from importlib import import_module

from zoo_moe.base import ZOO, Case

FAMILIES = (
    "grouped",
    "gathered",
    "dense",
    "loops",
    "mlps",
    "stored",
    "routers",
    "near_misses",
    "near_mlps",
    "near_loops",
    "disguised",
    "maybe",
)
for family in FAMILIES:
    import_module(f"zoo_moe.{family}")

POSITIVES = [case for case in ZOO if case.positive]
NEGATIVES = [case for case in ZOO if case.positive is False]
EITHER = [case for case in ZOO if case.positive is None]

__all__ = ["EITHER", "NEGATIVES", "POSITIVES", "ZOO", "Case"]
