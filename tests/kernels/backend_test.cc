#include "tests/kernels/backend_test.h"

#include <cmath>
#include <utility>

#include "tests/testing/status_matchers.h"

namespace headstart::testing {

void BackendTest::Open(const BackendCase& backend) {
  auto opened = OpenBackend(backend);
  if (!opened.ok() && IsMissingHere(opened.status())) {
    GTEST_SKIP() << backend.name << " is not on this machine: " << opened.status().message();
  }
  ASSERT_OK(opened);
  backend_ = *std::move(opened);
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
