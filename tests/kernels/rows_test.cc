// What a row of a product comes to does not depend on how many others there are, nor which: the
// bits are those that it gets alone. (Of attention: sequences_test.cc and
// cuda_attention_batch_test.cc.)
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

struct Product {
  const char* name;
  int64_t in_features, out_features;
  LinearOutput mode;
  bool f32_output, bias;
  int64_t max_rows;
};
void PrintTo(const Product& product, std::ostream* os) { *os << product.name; }

class ProductRowsTest : public BackendTest,
                        public ::testing::WithParamInterface<std::tuple<BackendCase, Product>> {
 protected:
  void SetUp() override {
    Open(std::get<0>(GetParam()));
    if (IsSkipped()) return;
    const auto scale = 1.0f / std::sqrt(static_cast<float>(product().in_features));
    const HostMatrix w =
        RandomMatrix(product().out_features, product().in_features, 1, dtype(), scale);
    const HostMatrix b = RandomMatrix(1, product().out_features, 2, dtype());
    const HostTensor weight{w.values.data(), DType::kF32, w.rows, w.cols};
    const HostTensor bias{b.values.data(), DType::kF32, 1, b.cols};
    auto prepared =
        backend_->PrepareLinear({&weight, 1}, absl::MakeConstSpan(&bias, product().bias ? 1 : 0));
    ASSERT_OK(prepared);
    weight_ = *std::move(prepared);
    x_ = Put(RandomMatrix(product().max_rows, product().in_features, 3, dtype()), dtype());
    before_ = RandomMatrix(product().max_rows, product().out_features, 4, OutType());
  }
  const Product& product() const { return std::get<1>(GetParam()); }
  DType OutType() const {
    if (product().mode == LinearOutput::kAdd) return backend_->residual_dtype();
    return product().f32_output ? DType::kF32 : dtype();
  }

  // Rows [first, first + count) in one product: their values, row by row.
  std::vector<float> Run(int64_t first, int64_t count) {
    HostMatrix start(count, before_.cols);
    std::copy_n(before_.Row(first), count * before_.cols, start.values.begin());
    const DeviceMatrix out = Put(start, OutType());
    EXPECT_OK(backend_->Linear(*weight_, x_.view.Rows(first, count), out.view, product().mode));
    return Get(out.view).values;
  }

  std::unique_ptr<LinearWeight> weight_;
  DeviceMatrix x_;
  HostMatrix before_;
};

std::vector<Product> Products() {
  return {
      {"Stored", 576, 960, LinearOutput::kStore, false, false, 600},
      {"Added", 1536, 576, LinearOutput::kAdd, false, false, 1026},
      {"WithBias", 896, 1152, LinearOutput::kStore, false, true, 300},
      {"Logits", 576, 8192, LinearOutput::kStore, true, false, 64},
      {"Odd", 96, 80, LinearOutput::kStore, false, false, 300},
  };
}

INSTANTIATE_TEST_SUITE_P(All, ProductRowsTest,
                         ::testing::Combine(::testing::ValuesIn(BackendsUnderTest()),
                                            ::testing::ValuesIn(Products())),
                         [](const auto& info) {
                           return NameOf(std::get<0>(info.param)) + "_" +
                                  std::get<1>(info.param).name;
                         });

// Those of Llama-3.1-8B: long sums, for which libraries like to share the work of a sum.
INSTANTIATE_TEST_SUITE_P(
    Large, ProductRowsTest,
    ::testing::Combine(
        ::testing::Values(BackendCase{"Cuda", {.device = "cuda"}, ""}),
        ::testing::Values(Product{"Qkv", 4096, 6144, LinearOutput::kStore, false, false, 8192},
                          Product{"Output", 4096, 4096, LinearOutput::kAdd, false, false, 8192},
                          Product{"GateUp", 4096, 28672, LinearOutput::kStore, false, false, 2048},
                          Product{"Down", 14336, 4096, LinearOutput::kAdd, false, false, 2048},
                          Product{"Vocabulary", 4096, 32064, LinearOutput::kStore, true, false,
                                  64})),
    [](const auto& info) { return std::string("Cuda_") + std::get<1>(info.param).name; });

float LargestDifference(const std::vector<float>& a, const float* b) {
  float largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

// Of fp32 sums of some 1500 products that come to about 1.
constexpr float kMostRounding = 1e-5f;

// oneDNN takes sums in another order for some numbers of rows in two places (seen: 2.6.3): f32
// without AVX-512, for few rows, and bf16 that adds to its output with AMX, for 33 rows.
// DNNL_MAX_CPU_ISA=AVX512_CORE_BF16 lifts the latter. README says so.
bool MayDependOnRows(const BackendCase& backend, LinearOutput mode) {
  const bool is_limited = backend.cpu_isa == "avx2" || backend.cpu_isa == "generic";
  if (is_limited || !__builtin_cpu_supports("avx512f")) return backend.options.device == "cpu";
  return backend.name == "CpuBf16" && mode == LinearOutput::kAdd &&
         std::getenv("DNNL_MAX_CPU_ISA") == nullptr && __builtin_cpu_supports("amx-bf16");
}

TEST_P(ProductRowsTest, DoNotDependOnEachOther) {
  const int64_t max_rows = product().max_rows, cols = product().out_features;
  const bool may_depend = MayDependOnRows(std::get<0>(GetParam()), product().mode);
  const std::vector<float> all = Run(0, max_rows);
  for (const int64_t count : {1,   2,   3,   5,   8,    16,   17,   33,   64,   100, 128,
                              129, 256, 300, 512, 1000, 1024, 1025, 2048, 3000, 5000}) {
    if (count > max_rows) break;
    for (const int64_t first : {int64_t{0}, (max_rows - count) / 2}) {
      const std::vector<float> some = Run(first, count);
      if (may_depend) {
        ASSERT_LE(LargestDifference(some, &all[first * cols]), kMostRounding) << count << " rows";
        continue;
      }
      ASSERT_EQ(std::memcmp(some.data(), &all[first * cols], some.size() * sizeof(float)), 0)
          << count << " rows from " << first << " on";
    }
  }
}

}  // namespace
}  // namespace headstart::testing
