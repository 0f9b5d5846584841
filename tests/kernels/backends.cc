#include "tests/kernels/backends.h"

#include <cstdlib>
#include <ostream>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace headstart::testing {

std::vector<BackendCase> BackendsUnderTest() {
  const BackendOptions bf16{.device = "cpu", .dtype = ComputeDType::kBF16};
  const BackendOptions f32{.device = "cpu", .dtype = ComputeDType::kF32};
  return {{"CpuBf16", bf16, ""},
          {"CpuF32", f32, ""},
          {"CpuF32Avx2", f32, "avx2"},
          {"CpuF32Generic", f32, "generic"},
          {"Cuda", {.device = "cuda"}, ""}};
}

void PrintTo(const BackendCase& backend, std::ostream* os) { *os << backend.name; }

absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(const BackendCase& backend) {
  if (backend.cpu_isa.empty()) {
    unsetenv("HEADSTART_CPU_ISA");  // NOLINT(concurrency-mt-unsafe)
  } else {
    setenv("HEADSTART_CPU_ISA", backend.cpu_isa.c_str(), 1);  // NOLINT(concurrency-mt-unsafe)
  }
  return MakeBackend(backend.options);
}

absl::StatusOr<std::unique_ptr<Backend>> OpenBackend(absl::string_view name) {
  for (const BackendCase& backend : BackendsUnderTest()) {
    if (backend.name == name) return OpenBackend(backend);
  }
  return absl::NotFoundError(absl::StrCat("no backend is called \"", name, "\""));
}

bool IsMissingHere(const absl::Status& status) { return absl::IsInvalidArgument(status); }

}  // namespace headstart::testing
