#include "tests/kernels/backend_test.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <ostream>
#include <random>

#include "kernels/base/check.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

// Elements from the end of a row to the start of the next.
constexpr int64_t kPadding = 8;

// Bytes of 0xff are NaN in f32 and in bf16.
std::vector<std::byte> NanBytes(int64_t count) {
  return std::vector<std::byte>(count, std::byte{0xff});
}

int64_t BytesOf(const Matrix& m) { return m.rows * m.row_stride * DTypeBytes(m.dtype); }

// The parameters of `view` on host memory.
Matrix HostView(const Matrix& view, std::vector<std::byte>& memory) {
  Matrix host = view;
  host.data = memory.data();
  return host;
}

KvPages HostView(const DeviceKv& kv, std::vector<std::byte>& memory) {
  KvPages host = kv.view;
  host.pages = memory.data();
  host.page_table = kv.host_page_table.data();
  return host;
}

}  // namespace

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

HostMatrix RandomMatrix(int64_t rows, int64_t cols, uint32_t seed, DType dtype, float scale) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  HostMatrix x(rows, cols);
  for (float& value : x.values) value = reference::RoundTo(normal(random), dtype);
  return x;
}

HostMatrix AbsoluteValues(HostMatrix x) {
  for (float& value : x.values) value = std::abs(value);
  return x;
}

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

Buffer BackendTest::Allocate(int64_t bytes) {
  auto buffer = backend_->Allocate(bytes);
  HEADSTART_CHECK(buffer.ok());
  return *std::move(buffer);
}

Buffer BackendTest::Upload(const void* data, int64_t bytes) {
  Buffer buffer = Allocate(bytes);
  HEADSTART_CHECK(backend_->Upload(data, bytes, buffer.data()).ok());
  return buffer;
}

DeviceMatrix BackendTest::NewMatrix(int64_t rows, int64_t cols, DType dtype) {
  DeviceMatrix matrix;
  matrix.view = {nullptr, dtype, rows, cols, cols + kPadding};
  matrix.memory = Upload(NanBytes(BytesOf(matrix.view)).data(), BytesOf(matrix.view));
  matrix.view.data = matrix.memory.data();
  return matrix;
}

DeviceMatrix BackendTest::Put(const HostMatrix& values, DType dtype) {
  DeviceMatrix matrix = NewMatrix(values.rows, values.cols, dtype);
  std::vector<std::byte> host = NanBytes(BytesOf(matrix.view));
  reference::Store(values, HostView(matrix.view, host));
  HEADSTART_CHECK(backend_->Upload(host.data(), host.size(), matrix.memory.data()).ok());
  return matrix;
}

HostMatrix BackendTest::Get(const Matrix& matrix) {
  // The last row may end with its last column: what follows is not the matrix's.
  const int64_t elements = (matrix.rows - 1) * matrix.row_stride + matrix.cols;
  std::vector<std::byte> host(elements * DTypeBytes(matrix.dtype));
  HEADSTART_CHECK(backend_->Download(matrix.data, host.size(), host.data()).ok());
  return reference::Load(HostView(matrix, host));
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

DeviceKv BackendTest::PutKv(const KvRows& kv, const HeadShape& shape, int64_t capacity_tokens) {
  HEADSTART_CHECK(capacity_tokens >= kv.k.rows);
  DeviceKv device;
  const int64_t blocks = NumBlocks(capacity_tokens);
  device.pool_pages = blocks + 2;
  std::vector<int32_t> pages(device.pool_pages);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(static_cast<uint32_t>(blocks)));
  device.host_page_table.assign(pages.begin(), pages.begin() + blocks);
  device.view.dtype = dtype();
  device.view.shape = shape;

  std::vector<std::byte> host =
      NanBytes(device.pool_pages * device.view.page_elements() * DTypeBytes(dtype()));
  reference::StoreKv(kv, 0, HostView(device, host));
  device.pages = Upload(host.data(), static_cast<int64_t>(host.size()));
  device.page_table = Upload(device.host_page_table.data(), blocks * int64_t{sizeof(int32_t)});
  device.view.pages = device.pages.data();
  device.view.page_table = static_cast<const int32_t*>(device.page_table.data());
  return device;
}

KvRows BackendTest::GetKv(const DeviceKv& kv, int64_t num_tokens) {
  std::vector<std::byte> host(kv.pages.bytes());
  HEADSTART_CHECK(backend_->Download(kv.pages.data(), host.size(), host.data()).ok());
  return reference::LoadKv(HostView(kv, host), num_tokens);
}

}  // namespace headstart::testing
