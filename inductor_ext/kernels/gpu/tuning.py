"""Which variant of a kernel runs a shape: by rules with few numbers, per architecture.

Measured on sm_90 (bench/RESULTS.md). Elsewhere the rules are the same and the numbers reasoned, not measured: matrix
instructions of AMD have at least 16 columns, 64 KB of shared memory leave room for fewer stages, and where the compiler
spilled registers a step is half a tile, or a block has fewer rows (``tests/test_offline_dense.py`` and ``_moe.py``).
"""

from __future__ import annotations

import dataclasses

_ROOMY = ("sm_90", "sm_100")
"""Where the codes of a whole tile and 64 rows of x are held without spilling registers, and shared memory is 227 KB."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch parameters of the dense kernel; see ``mainloop.accumulate``."""

    BN: int
    BM: int
    WIDTH: int
    WIDE: bool
    SPLITS: int
    ROUNDED: bool
    STAGES: int
    num_warps: int


def is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def why_not_on(arch: str) -> str | None:
    """Why the kernels do not run on an architecture, as a sentence; None if they do."""
    if arch.startswith("sm_") and int(arch[3:]) < 80:
        return f"The kernels need sm_80 or newer, for its bfloat16 instructions; this is {arch}."
    if is_amd(arch) and not arch.startswith(("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")):
        return f"The kernels need matrix instructions that {arch} does not have: CDNA 2, RDNA 3 or newer."
    return None


def dense_from(by_sums: bool) -> int:
    """From how many rows on dequantising once and a dense matmul is faster: sooner where zeros are applied ``by_sums``
    of x, which costs the fused kernel another matmul."""
    return 65 if by_sums else 448


def dense(M: int, N: int, K: int, arch: str, processors: int, plain: bool) -> Config:
    """For M rows of N results; ``processors`` are the device's SMs or CUs. A ``plain`` weight has no zeros, and no more
    than two groups in a step."""
    amd, steps = is_amd(arch), -(-K // 256) or 1
    if M <= 8 and not amd:
        # Many small programs: what counts is how many bytes are under way.
        splits = _splits(-(-N // 32), steps, 3 * processors)
        stages = 4 if splits > 1 and steps >= 8 * splits else 3
        return Config(BN=32, BM=8, WIDTH=64, WIDE=False, SPLITS=splits, ROUNDED=False, STAGES=stages, num_warps=2)
    if arch.startswith("gfx1"):
        # Vector registers hold half a tile's codes and 32 rows of x.
        BM = 16 if M <= 16 else 32
        splits = _splits(-(-N // 64) * -(-M // BM), steps, 3 * processors)
        return Config(64, BM, 32, WIDE=True, SPLITS=splits, ROUNDED=False, STAGES=2, num_warps=BM // 4)
    if M <= 64 or amd:
        BM = 16 if M <= 16 else 32 if M <= 32 else 64
        width = 64 if BM < 64 or amd or arch in _ROOMY else 32
        wanted = {16: 3, 32: 2.2, 64: 2}[BM]
        if BM == 64 and arch in _ROOMY and _short(N, steps, processors):
            width, wanted = 32, 4  # halves of steps: then four programs share a processor
        if BM == 32 and plain and arch in _ROOMY and (large := _large(N, steps, processors)) is not None:
            return large
        splits = _splits(-(-N // 64) * -(-M // BM), steps, wanted * processors)
        return Config(64, BM, width, WIDE=True, SPLITS=splits, ROUNDED=False, STAGES=2 if amd else 3, num_warps=4)
    tiles = -(-N // 64) * -(-M // 128)
    if (tiles >= 2 * processors or arch not in _ROOMY) and -(-N // 64) % 2 == 0:
        return Config(128, 128, 32, WIDE=True, SPLITS=1, ROUNDED=True, STAGES=3, num_warps=8)
    splits = _splits(tiles, steps, 2.25 * processors)
    # A short run of steps does without the third stage, and three programs share a processor.
    stages = 2 if steps <= 8 * splits else 3
    return Config(64, 128, 32, WIDE=True, SPLITS=splits, ROUNDED=True, STAGES=stages, num_warps=4)


_PER_STEP = {
    (128, 32): 0.4, (256, 32): 0.75,
    (128, 64): 0.54, (192, 64): 0.73, (256, 64): 0.92,
    (128, 128): 0.71, (192, 128): 1.04, (256, 128): 1.37,
}  # fmt: skip
"""Of the kernels in ``hopper``: us of a step, by BN and BM, on an H200 whose processors are all at work."""
_MUCH = 200_000
"""Rows of W times tiles of K."""


def _short(N: int, steps: int, processors: int) -> bool:
    """Whether there are few tiles of 64 rows, each of a short run of steps."""
    tiles = -(-N // 64)
    return steps <= 16 and 4 * tiles <= 3 * processors


def _large(N: int, steps: int, processors: int) -> Config | None:
    """For 17 to 32 rows and a large plain weight: tiles twice as tall, if there are just under two of them a processor.
    With zeros, or more groups, shared memory has room for only one of them."""
    tiles = -(-N // 128)
    splits = _splits(tiles, steps, 2 * processors)
    fits = 1.6 * processors <= tiles * splits <= 2 * processors
    if N * steps < _MUCH or not fits or -(-N // 64) % 2:
        return None
    return Config(128, 32, 64, WIDE=True, SPLITS=splits, ROUNDED=False, STAGES=3, num_warps=8)


def hopper(M: int, N: int, K: int, processors: int, plain: bool) -> Hopper | None:
    """For M rows of N results by the kernel for Hoppers; None where another is faster.

    By an estimate in us: how often the device is filled, times what a tile takes, and with splits what it takes to
    write a part, and the last program to read them all. Tiles of three sizes leave few processors idle in most shapes.
    """
    steps = -(-K // 256)
    across = -(-N // 256)
    few = across < 0.09 * processors
    if M <= 16 or (M <= 32 and (plain or N * steps < _MUCH)) or (M <= 64 and few):
        return None
    if M >= 8192:  # dequantising is little beside so large a product
        return None
    found = []
    for (BN, BM), step in _PER_STEP.items():
        tiles = -(-N // BN) * -(-M // BM)
        for splits in (1, 2, 3, 4):
            share = -(-steps // splits)
            if not min(M, 64) <= BM < max(2 * M, 65):
                continue
            rounds = -(-tiles * splits // processors)
            parts = 2.4 + splits * BN * BM / 12.5e3 if splits > 1 else 0
            stages = 6 if BM == 32 else 4
            found.append((rounds * (2 * share * step + 2.2 + parts), Hopper(BN, BM, splits, stages)))
    return min(found, key=lambda each: each[0])[1]


@dataclasses.dataclass(frozen=True)
class Decode:
    """Launch parameters of a kernel in ``decode``."""

    PROGRAMS: int
    WARPS: int
    STAGES: int


def decode(units: int, tiles: int, processors: int) -> Decode:
    """For one row of x, and so many times 16 rows of W with so many tiles each. Within 4 % of the fastest of 9 to 45
    in each of six shapes on an H200."""
    WARPS = 4
    return Decode(min(units, 4 * processors), WARPS, 4 if tiles > 8 * WARPS else 3)


def _splits(tiles: int, steps: int, wanted: float) -> int:
    """How many programs share a tile, so that there are about as many as wanted; about three steps each at least, or
    two where programs are few."""
    splits = 1
    while 1.5 * tiles * splits < wanted and splits < 16:
        if steps < (4 if 4 * tiles * splits <= wanted else 6) * splits:
            break
        splits *= 2
    return -(-steps // -(-steps // splits))  # fewer, where shares are rounded up so that the last ones had none


@dataclasses.dataclass(frozen=True)
class Hopper:
    """Launch parameters of a kernel in ``hopper``."""

    BN: int
    BM: int
    SPLITS: int
    STAGES: int


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Launch parameters of one projection's kernel for routed experts."""

    PAIRWISE: bool
    """Every (token, choice) pair is a block of its own; nothing is sorted."""
    BN: int
    BM: int
    WIDTH: int
    STAGES: int
    num_warps: int

    @property
    def ROUNDED(self) -> bool:
        return self.BM >= 128


def moe(pairs: int, E: int, H: int, I: int, arch: str) -> tuple[MoeConfig, MoeConfig]:  # noqa: E741
    """For the first and the second projection. Both have the same blocks of pairs."""
    each = pairs / E
    pairwise = 4 * pairs <= E or pairs <= 8
    if is_amd(arch):
        BM = 16 if pairwise or each <= 8 else 32 if each <= 48 or arch.startswith("gfx1") else 64
        config = MoeConfig(pairwise, 64, BM, 32, 2, BM // 4 if arch.startswith("gfx1") else 4)
        return config, config
    if pairwise or each <= 6:
        # Long rows, or few pairs: smaller tiles are more programs.
        narrow = I >= 4096 or pairs <= 8
        down = MoeConfig(pairwise, 32 if narrow else 64, 8, 64, 4 if I >= 4096 else 3, 2)
        return MoeConfig(pairwise, 64, 8, 64, 3, 2), down
    if each <= 96:
        return MoeConfig(False, 128, 32, 64, 3, 8), MoeConfig(False, 64, 32, 64, 3, 4)
    if arch not in _ROOMY:
        config = MoeConfig(False, 128, 64, 32, 3, 8)
        return config, config
    return MoeConfig(False, 128, 128, 32, 3, 8), MoeConfig(False, 64, 128, 32, 3, 4)


def early(arch: str, H: int, I: int) -> bool:  # noqa: E741
    """Whether a layer's kernels start while those before them end (see ``early.py``). Long programs should not: those
    that start first all land on the processors that are free first, and stay (Mixtral's sizes took 28 % longer)."""
    return arch.startswith("sm_") and int(arch[3:]) >= 90 and max(H, I) <= 2048


def hopper_moe(pairs: int, E: int) -> tuple[Hopper, Hopper] | None:
    """For the first and the second projection by the kernels for Hoppers; None where others are faster."""
    each = pairs / E
    if each < 8:
        return None
    # Most experts should have one block: their weights are then unpacked once.
    BM = 16 if each <= 10 else 32 if each <= 24 else 64 if each <= 48 else 128
    config = Hopper(256, BM, 1, 4 if BM == 128 else 6)
    return config, config


def mxfp4(pairs: int, E: int, arch: str) -> tuple[MoeConfig, MoeConfig]:
    """As ``moe``, for ``fp4_mainloop``. A step is 128 columns."""
    each = pairs / E
    pairwise = 4 * pairs <= E or pairs <= 8
    if is_amd(arch):
        BM = 16 if pairwise or each <= 8 else 32 if each <= 48 or arch.startswith("gfx1") else 64
        config = MoeConfig(pairwise, 64, BM, 32, 2, BM // 4 if arch.startswith("gfx1") else 4)
        return config, config
    if pairwise or each <= 6:
        return MoeConfig(pairwise, 64, 8, 32, 4, 2), MoeConfig(pairwise, 32 if pairwise else 64, 8, 32, 4, 2)
    if each <= 12:
        config = MoeConfig(False, 64, 16, 32, 4, 4)
        return config, config
    if each <= 48:
        return MoeConfig(False, 128, 32, 32, 3, 8), MoeConfig(False, 64, 32, 32, 3, 4)
    if each <= 96 or arch not in _ROOMY:
        config = MoeConfig(False, 64, 64, 32, 3, 4)
    else:
        config = MoeConfig(False, 128, 128, 32, 3, 8)
    return config, config


def mxfp4_scaled(pairs: int, E: int, arch: str) -> tuple[MoeConfig, MoeConfig]:
    """As ``moe``, for ``fp4_scaled``; WIDTH is the columns of a step."""
    each = pairs / E
    BM = 16 if each <= 16 else 32 if each <= 48 else 64 if each <= 96 or is_amd(arch) else 128
    pairwise = 4 * pairs <= E or pairs <= 8
    BN = 64 if BM == 16 else 128
    if is_amd(arch):
        config = MoeConfig(pairwise, BN, BM, 256, 2, 4)
    else:
        config = MoeConfig(pairwise, BN, BM, 64 if BM == 64 else 128, 3, 8 if BM == 128 else 4)
    return config, config
