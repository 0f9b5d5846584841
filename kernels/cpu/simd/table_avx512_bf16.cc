#include "kernels/cpu/simd/make_table.h"
#include "kernels/cpu/simd/tables.h"

namespace headstart::simd {

constinit const KernelTable kAvx512Bf16 = MakeTable<BFloat16Math>();

}  // namespace headstart::simd
