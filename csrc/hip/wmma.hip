// x W^T for many rows: kernels wmma_<f16|bf16>_<rows of a block>_<stage>, and of routed experts in the field's layout
// wmma_by_row_<f16|bf16>_<stage>. On gfx12, whose WMMA has other operands, there are none.
#include "wmma.h"

#if !defined(__gfx1200__) && !defined(__gfx1201__)

// Registers for four waves a SIMD where it has 1024 of them, six where it has 1536.
#define WMMA(type, rows, stage)                                                                \
    KERNEL(wmma_##type##_##rows##_##stage, WmmaArgs, rows * 4, 4) {                            \
        multiply_and_store<type, rows / 16, stage, ByWord<type, columns_of(rows / 16)>>(args); \
    }
#define ROUTED(type, stage)                                                                    \
    KERNEL(wmma_by_row_##type##_##stage, WmmaArgs, 128, 4) {                                   \
        multiply_and_store<type, 2, stage, ByRow<type, columns_of(2)>>(args);                  \
    }

WMMA(f16, 16, 32)
WMMA(f16, 16, 64)
WMMA(f16, 16, 128)
WMMA(f16, 32, 32)
WMMA(f16, 32, 64)
WMMA(f16, 32, 128)
WMMA(f16, 64, 32)
WMMA(f16, 64, 64)
WMMA(f16, 64, 128)
WMMA(bf16, 16, 32)
WMMA(bf16, 16, 64)
WMMA(bf16, 16, 128)
WMMA(bf16, 32, 32)
WMMA(bf16, 32, 64)
WMMA(bf16, 32, 128)
WMMA(bf16, 64, 32)
WMMA(bf16, 64, 64)
WMMA(bf16, 64, 128)
ROUTED(f16, 32)
ROUTED(f16, 64)
ROUTED(f16, 128)
ROUTED(bf16, 32)
ROUTED(bf16, 64)
ROUTED(bf16, 128)

#endif
