// The WMMA kernels, by dtype, rows of a block / 16, and the length of a stage. On gfx12, whose WMMA has other operands,
// there are none.
#include "wmma.h"

#if !defined(__gfx1200__) && !defined(__gfx1201__)

// Registers for four waves a SIMD where it has 1024 of them, six where it has 1536.
#define WMMA(dtype, T, rows, stage)                                                  \
    KERNEL(wmma_##dtype##_r##rows##_k##stage, WmmaArgs, rows * 64, 4) {              \
        multiply_and_store<T, rows, stage, ByWord<T, columns_of(rows)>>(args);       \
    }
#define WMMA_BY_ROW(dtype, T, stage)                                                 \
    KERNEL(wmma_##dtype##_by_row_k##stage, WmmaArgs, 128, 4) {                       \
        multiply_and_store<T, 2, stage, ByRow<T, columns_of(2)>>(args);              \
    }
#define ROWS(dtype, T, stage)    \
    WMMA(dtype, T, 1, stage)     \
    WMMA(dtype, T, 2, stage)     \
    WMMA(dtype, T, 4, stage)     \
    WMMA_BY_ROW(dtype, T, stage)
#define STAGES(dtype, T) ROWS(dtype, T, 32) ROWS(dtype, T, 64) ROWS(dtype, T, 128)

STAGES(f16, f16)
STAGES(bf16, bf16)

#endif
