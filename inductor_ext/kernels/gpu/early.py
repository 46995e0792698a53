"""Launching a layer's kernel while the one before it still runs (NVIDIA's programmatic dependent launch): its programs
start as room comes free, and wait for what the other wrote. Otherwise the device idles from the one's last program to
the other's first.

Only a kernel launched right after another one of ours starts early. A layer's first does not: everything before a layer
has ended when the layer begins, and with it what a kernel that starts early does not wait for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin(EARLY: tl.constexpr):
    """To be done before a program reads or writes anything: waits until the kernel before is through, and lets the next
    one start."""
    if EARLY:  # by full name, since a Triton built for AMD alone may lack it
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
