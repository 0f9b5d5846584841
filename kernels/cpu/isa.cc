#include "kernels/cpu/isa.h"

#include <cstdlib>
#include <fstream>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace headstart {
namespace {

constexpr CpuIsa kLevels[] = {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512,
                              CpuIsa::kAvx512Bf16};

CpuIsa MachineIsa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2) return CpuIsa::kGeneric;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return CpuIsa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512;
#else
  return CpuIsa::kGeneric;
#endif
}

}  // namespace

absl::string_view CpuIsaName(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kGeneric:
      return "generic";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "?";
}

absl::StatusOr<CpuIsa> ChooseCpuIsa() {
  const CpuIsa machine = MachineIsa();
  // Read once at start-up, before threads that could change the environment.
  const char* wanted = std::getenv("HEADSTART_CPU_ISA");  // NOLINT(concurrency-mt-unsafe)
  if (wanted == nullptr || *wanted == '\0') return machine;
  for (CpuIsa level : kLevels) {
    if (CpuIsaName(level) != wanted) continue;
    if (level <= machine) return level;
    return absl::InvalidArgumentError(absl::StrCat(
        "HEADSTART_CPU_ISA=", wanted, " is more than this CPU has: ", CpuIsaName(machine)));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "HEADSTART_CPU_ISA=", wanted, " is not one of generic, avx2, avx512, avx512_bf16"));
}

std::string CpuModelName() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    absl::string_view view = line;
    const size_t colon = view.find(": ");
    if (absl::ConsumePrefix(&view, "model name") && colon != absl::string_view::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown CPU";
}

}  // namespace headstart
