#include "kernels/cpu/simd/make_table.h"
#include "kernels/cpu/simd/tables.h"

namespace headstart::simd {

constinit const KernelTable kGenericF32 = MakeTable<FloatMath>();

}  // namespace headstart::simd
