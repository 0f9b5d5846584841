#include "kernels/cpu/simd/kernel_table.h"

#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/tables.h"

namespace headstart::simd {

const KernelTable* GetKernelTable(CpuIsa isa, DType compute_dtype) {
  if (compute_dtype == DType::kF32 && isa == CpuIsa::kGeneric) return &kGenericF32;
#if defined(__x86_64__)
  if (compute_dtype == DType::kF32) return isa == CpuIsa::kAvx2 ? &kAvx2F32 : &kAvx512F32;
  if (compute_dtype == DType::kBF16 && isa == CpuIsa::kAvx512Bf16) return &kAvx512Bf16;
#endif
  return nullptr;
}

}  // namespace headstart::simd
