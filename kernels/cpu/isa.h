// Which instruction set the CPU kernels run on: what the machine has, lowered by HEADSTART_CPU_ISA.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headstart {

// Each level has all that the ones before it have. kGeneric is what the compiler targets: SSE2 on
// x86-64, NEON on AArch64.
enum class CpuIsa : uint8_t { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// "generic", "avx2", "avx512", "avx512_bf16".
absl::string_view CpuIsaName(CpuIsa isa);

// The machine's best level, or the lower one that the environment variable HEADSTART_CPU_ISA names.
// INVALID_ARGUMENT when it names something else, or more than the machine has.
absl::StatusOr<CpuIsa> ChooseCpuIsa();

// As the kernel reports it; "unknown CPU" where it does not.
std::string CpuModelName();

}  // namespace headstart
