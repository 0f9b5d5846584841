// The tables that the table_*.cc files define, each compiled for its instruction set.
#pragma once

#include "kernels/cpu/simd/kernel_table.h"

namespace headstart::simd {

extern const KernelTable kGenericF32;
extern const KernelTable kAvx2F32;
extern const KernelTable kAvx512F32;
extern const KernelTable kAvx512Bf16;

}  // namespace headstart::simd
