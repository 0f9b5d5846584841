// Embed, RmsNorm and SwiGlu of every backend against the reference.
#include <cmath>
#include <tuple>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"

namespace headstart::testing {
namespace {

constexpr double kF32Roundoff = UnitRoundoff(DType::kF32);

struct Shape {
  int64_t rows;
  int64_t cols;
};
void PrintTo(const Shape& shape, std::ostream* os) { *os << shape.rows << "x" << shape.cols; }

class ElementwiseTest : public BackendTest,
                        public ::testing::WithParamInterface<std::tuple<BackendCase, Shape>> {
 protected:
  void SetUp() override { Open(std::get<0>(GetParam())); }
  Shape shape() const { return std::get<1>(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(
    All, ElementwiseTest,
    ::testing::Combine(::testing::ValuesIn(BackendsUnderTest()),
                       ::testing::Values(Shape{1, 64}, Shape{1, 576}, Shape{5, 640}, Shape{16, 576},
                                         Shape{17, 1536}, Shape{129, 896}, Shape{3, 4864})),
    [](const auto& info) {
      const Shape shape = std::get<1>(info.param);
      return NameOf(std::get<0>(info.param)) + "_" + std::to_string(shape.rows) + "x" +
             std::to_string(shape.cols);
    });

TEST_P(ElementwiseTest, EmbedCopiesRows) {
  const HostMatrix values = RandomMatrix(50, shape().cols, 1, dtype());
  std::vector<BFloat16> bf16;
  for (const float value : values.values) bf16.emplace_back(value);
  const bool is_bf16 = dtype() == DType::kBF16;
  const void* data = is_bf16 ? static_cast<const void*>(bf16.data()) : values.values.data();
  auto table = backend_->PrepareTable({data, dtype(), values.rows, values.cols});
  ASSERT_OK(table);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < shape().rows; ++i) ids.push_back(static_cast<int32_t>((49 + i * 7) % 50));

  const DeviceMatrix out = NewMatrix(shape().rows, shape().cols, backend_->residual_dtype());
  ASSERT_OK(backend_->Embed(ids, *table, out.view));
  // Exact: the residual type holds every value of the table's.
  EXPECT_EQ(Get(out.view).values, reference::Embed(ids, values).values);
  ExpectPaddingUntouched(out);
}

TEST_P(ElementwiseTest, RmsNormMatchesTheReference) {
  constexpr float kEps = 1e-5f;
  HostMatrix x = RandomMatrix(shape().rows, shape().cols, 2, backend_->residual_dtype());
  // One large and one tiny row: eps matters for the second only.
  for (int64_t c = 0; c < x.cols; ++c) x.Row(0)[c] *= 0x1p10f;
  for (int64_t c = 0; c < x.cols && x.rows > 1; ++c) x.Row(1)[c] *= 0x1p-10f;
  const HostMatrix weight = RandomMatrix(1, shape().cols, 3, DType::kF32);
  auto device_weight =
      backend_->PrepareVector({weight.values.data(), DType::kF32, 1, shape().cols});
  ASSERT_OK(device_weight);

  const DeviceMatrix in = Put(x, backend_->residual_dtype());
  const DeviceMatrix out = NewMatrix(x.rows, x.cols, dtype());
  ASSERT_OK(backend_->RmsNorm(in.view, *device_weight, kEps, out.view));
  // One rounding of the result; fp32 sums of n squares err by about sqrt(n) roundings.
  const double rel =
      UnitRoundoff(dtype()) + (8 + std::sqrt(static_cast<double>(x.cols))) * kF32Roundoff;
  EXPECT_TRUE(TensorsMatch(Get(out.view).values, reference::RmsNorm(x, weight.values, kEps).values,
                           {.rel = rel}));
  ExpectPaddingUntouched(out);
}

TEST_P(ElementwiseTest, SwiGluMatchesTheReference) {
  // Up to about 40: silu runs into 0 on one side and into the identity on the other.
  const HostMatrix gate_up = RandomMatrix(shape().rows, 2 * shape().cols, 4, dtype(), 10);
  const DeviceMatrix in = Put(gate_up, dtype());
  const DeviceMatrix out = NewMatrix(shape().rows, shape().cols, dtype());
  ASSERT_OK(backend_->SwiGlu(in.view, out.view));
  // exp(-x) errs by |x| roundings, and a few more.
  const double rel = UnitRoundoff(dtype()) + 64 * kF32Roundoff;
  EXPECT_TRUE(TensorsMatch(Get(out.view).values, reference::SwiGlu(gate_up).values, {.rel = rel}));
  ExpectPaddingUntouched(out);
}

class SwiGluTest : public BackendTest, public ::testing::WithParamInterface<BackendCase> {
 protected:
  void SetUp() override { Open(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(All, SwiGluTest, ::testing::ValuesIn(BackendsUnderTest()),
                         [](const auto& info) { return NameOf(info.param); });

TEST_P(SwiGluTest, IsFiniteForExtremeGates) {
  constexpr int64_t kCols = 64;
  HostMatrix gate_up(1, 2 * kCols);
  for (int64_t c = 0; c < kCols; ++c) {
    gate_up.Row(0)[c] = (c % 2 == 0 ? 1.0f : -1.0f) * std::exp2(static_cast<float>(c));
    gate_up.Row(0)[c + kCols] = 1;
  }
  const DeviceMatrix in = Put(gate_up, dtype());
  const DeviceMatrix out = NewMatrix(1, kCols, dtype());
  ASSERT_OK(backend_->SwiGlu(in.view, out.view));
  // The sigmoid may stop near the least normal float instead of 0. exp(-x) errs by |x| roundings,
  // and |x| <= 128 where the sigmoid is greater than that.
  HostMatrix scale = AbsoluteValues(gate_up);
  scale.values.resize(kCols);
  const double rel = UnitRoundoff(dtype()) + 0x1p-17;
  EXPECT_TRUE(TensorsMatch(Get(out.view).values, reference::SwiGlu(gate_up).values,
                           {.abs = 0x1p-125, .rel = rel, .scale = scale.values}));
}

}  // namespace
}  // namespace headstart::testing
