#include "kernels/cpu/simd/make_table.h"
#include "kernels/cpu/simd/tables.h"

namespace headstart::simd {

constinit const KernelTable kAvx512F32 = MakeTable<FloatMath>();

}  // namespace headstart::simd
