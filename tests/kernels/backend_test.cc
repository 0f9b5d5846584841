#include "tests/kernels/backend_test.h"

#include <cmath>
#include <cstdlib>
#include <ostream>

#include "tests/testing/status_matchers.h"

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

void BackendTest::Open(const BackendCase& backend) {
  if (backend.cpu_isa.empty()) {
    unsetenv("HEADSTART_CPU_ISA");  // NOLINT(concurrency-mt-unsafe)
  } else {
    setenv("HEADSTART_CPU_ISA", backend.cpu_isa.c_str(), 1);  // NOLINT(concurrency-mt-unsafe)
  }
  auto made = MakeBackend(backend.options);
  if (!made.ok() && absl::IsInvalidArgument(made.status())) {
    GTEST_SKIP() << backend.name << " is not on this machine: " << made.status().message();
  }
  ASSERT_OK(made);
  backend_ = *std::move(made);
}

void BackendTest::ExpectPaddingUntouched(const DeviceMatrix& matrix) {
  Matrix wide = matrix.view;
  wide.cols = wide.row_stride;
  const HostMatrix all = Get(wide);
  for (int64_t r = 0; r < all.rows; ++r) {
    for (int64_t c = matrix.view.cols; c < all.cols; ++c) {
      ASSERT_TRUE(std::isnan(all.Row(r)[c])) << "column " << c << " of row " << r << " was written";
    }
  }
}

}  // namespace headstart::testing
