// Linear of every backend against the reference: parts, biases, output types and modes.
#include <cmath>
#include <tuple>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"

namespace headstart::testing {
namespace {

struct LinearShape {
  int64_t rows;
  int64_t in_features;
  std::vector<int64_t> out_features;  // of each part
  bool bias;
};
std::string NameOf(const LinearShape& shape) {
  std::string name = std::to_string(shape.rows) + "x" + std::to_string(shape.in_features) + "to";
  for (const int64_t out : shape.out_features) name += "_" + std::to_string(out);
  return name + (shape.bias ? "_bias" : "");
}
void PrintTo(const LinearShape& shape, std::ostream* os) { *os << NameOf(shape); }

std::vector<LinearShape> Shapes() {
  return {
      {1, 64, {64}, false},     // one token
      {1, 576, {8192}, false},  // logits of the last token
      {7, 576, {576}, false},   // attention's output
      {129, 576, {192, 64, 64}, false},
      {33, 896, {256, 128, 128}, true},  // Qwen2: biases
      {20, 576, {512, 512}, false},      // gate and up
      {17, 1536, {192}, false},
      {3, 96, {48, 16, 16}, true},
  };
}

class LinearTest : public BackendTest,
                   public ::testing::WithParamInterface<std::tuple<BackendCase, LinearShape>> {
 protected:
  void SetUp() override {
    Open(std::get<0>(GetParam()));
    if (IsSkipped()) return;
    MakeWeight();
  }
  const LinearShape& shape() const { return std::get<1>(GetParam()); }

  // Each part has memory of its own, as in a model file.
  void MakeWeight() {
    const auto scale = 1.0f / std::sqrt(static_cast<float>(shape().in_features));
    std::vector<HostTensor> tensors;
    std::vector<HostTensor> bias_tensors;
    weight_.cols = shape().in_features;
    for (const int64_t out : shape().out_features) {
      const auto seed = static_cast<uint32_t>(10 + parts_.size());
      parts_.push_back(RandomMatrix(out, weight_.cols, seed, dtype(), scale));
      biases_.push_back(RandomMatrix(1, out, seed + 10, dtype()));
    }
    for (size_t i = 0; i < parts_.size(); ++i) {
      const HostMatrix& part = parts_[i];
      tensors.push_back({part.values.data(), DType::kF32, part.rows, part.cols});
      weight_.rows += part.rows;
      weight_.values.insert(weight_.values.end(), part.values.begin(), part.values.end());
      if (!shape().bias) continue;
      bias_tensors.push_back({biases_[i].values.data(), DType::kF32, 1, part.rows});
      bias_.insert(bias_.end(), biases_[i].values.begin(), biases_[i].values.end());
    }
    auto prepared = backend_->PrepareLinear(tensors, bias_tensors);
    ASSERT_OK(prepared);
    device_weight_ = *std::move(prepared);
  }

  void ExpectLinear(DType out_dtype, LinearOutput mode) {
    const HostMatrix x = RandomMatrix(shape().rows, weight_.cols, 1, dtype());
    const HostMatrix start = RandomMatrix(x.rows, weight_.rows, 2, out_dtype);
    HostMatrix expected = reference::Linear(x, weight_, bias_);
    HostMatrix error = reference::Linear(AbsoluteValues(x), AbsoluteValues(weight_),
                                         AbsoluteValues({1, weight_.rows}, bias_));
    // fp32 sums of n products err by about sqrt(n) roundings of their absolute terms.
    const double sum_error =
        (4 + std::sqrt(static_cast<double>(x.cols))) * UnitRoundoff(DType::kF32);
    for (size_t i = 0; i < expected.values.size(); ++i) {
      if (mode == LinearOutput::kAdd) error.values[i] += std::abs(start.values[i]);
      error.values[i] *= static_cast<float>(sum_error);
      if (mode != LinearOutput::kAdd) continue;
      // The product may be rounded before it is added, as in frameworks that add two tensors.
      error.values[i] += static_cast<float>(UnitRoundoff(out_dtype)) * std::abs(expected.values[i]);
      expected.values[i] += start.values[i];
    }
    const DeviceMatrix in = Put(x, dtype());
    const DeviceMatrix out = mode == LinearOutput::kAdd
                                 ? Put(start, out_dtype)
                                 : NewMatrix(x.rows, weight_.rows, out_dtype);
    ASSERT_OK(backend_->Linear(*device_weight_, in.view, out.view, mode));
    // One more rounding to store.
    EXPECT_TRUE(TensorsMatch(Get(out.view).values, expected.values,
                             {.abs = 1, .rel = UnitRoundoff(out_dtype), .scale = error.values}));
    ExpectPaddingUntouched(out);
  }

  HostMatrix weight_;
  std::vector<float> bias_;
  std::unique_ptr<LinearWeight> device_weight_;

 private:
  static std::vector<float> AbsoluteValues(HostMatrix shape, const std::vector<float>& values) {
    shape.values = values;
    return testing::AbsoluteValues(std::move(shape)).values;
  }
  static HostMatrix AbsoluteValues(const HostMatrix& x) { return testing::AbsoluteValues(x); }

  std::vector<HostMatrix> parts_;
  std::vector<HostMatrix> biases_;
};

INSTANTIATE_TEST_SUITE_P(All, LinearTest,
                         ::testing::Combine(::testing::ValuesIn(BackendsUnderTest()),
                                            ::testing::ValuesIn(Shapes())),
                         [](const auto& info) {
                           return NameOf(std::get<0>(info.param)) + "_" +
                                  NameOf(std::get<1>(info.param));
                         });

TEST_P(LinearTest, StoresInComputeType) { ExpectLinear(dtype(), LinearOutput::kStore); }

TEST_P(LinearTest, StoresInF32) { ExpectLinear(DType::kF32, LinearOutput::kStore); }

TEST_P(LinearTest, AddsToTheResidual) {
  ExpectLinear(backend_->residual_dtype(), LinearOutput::kAdd);
}

TEST_P(LinearTest, KnowsItsShape) {
  EXPECT_EQ(device_weight_->in_features(), weight_.cols);
  EXPECT_EQ(device_weight_->out_features(), weight_.rows);
}

TEST_P(LinearTest, RepeatsBitForBit) {
  const DeviceMatrix in = Put(RandomMatrix(shape().rows, weight_.cols, 1, dtype()), dtype());
  const DeviceMatrix out = NewMatrix(shape().rows, weight_.rows, dtype());
  ASSERT_OK(backend_->Linear(*device_weight_, in.view, out.view, LinearOutput::kStore));
  const std::vector<float> first = Get(out.view).values;
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK(backend_->Linear(*device_weight_, in.view, out.view, LinearOutput::kStore));
    ASSERT_EQ(Get(out.view).values, first) << "repeat " << i;
  }
}

}  // namespace
}  // namespace headstart::testing
