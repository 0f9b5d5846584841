// What is the CUDA backend's own: products over shapes that the algorithm cache meets, RoPE with KV
// pages, reading KV while the stream goes on, errors that leave the device whole.
#include <cmath>
#include <limits>

#include "kernels/base/nonfinite.h"
#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"

namespace headstart::testing {
namespace {

std::vector<BFloat16> AsBf16(const HostMatrix& x) {
  std::vector<BFloat16> out;
  for (const float value : x.values) out.emplace_back(value);
  return out;
}

class CudaBackendTest : public BackendTest {
 protected:
  void SetUp() override { Open({"Cuda", {.device = "cuda"}, ""}); }
};

struct LinearCase {
  int64_t rows, in, out;
  bool bias;
};
class CudaLinearTest : public CudaBackendTest, public ::testing::WithParamInterface<LinearCase> {};
INSTANTIATE_TEST_SUITE_P(
    All, CudaLinearTest,
    ::testing::Values(LinearCase{1, 64, 128, false}, LinearCase{37, 576, 960, true},
                      LinearCase{128, 576, 1536, false}, LinearCase{300, 896, 1152, true},
                      LinearCase{1100, 256, 264, true}, LinearCase{1100, 128, 520, false}));

TEST_P(CudaLinearTest, StoresAndAdds) {
  const auto [rows, in, out, has_bias] = GetParam();
  const HostMatrix x = RandomMatrix(rows, in, 1, DType::kBF16),
                   w = RandomMatrix(out, in, 2, DType::kBF16, 0.1f);
  const HostMatrix bias = RandomMatrix(1, out, 3, DType::kBF16),
                   before = RandomMatrix(rows, out, 4, DType::kBF16);
  const std::vector<BFloat16> w16 = AsBf16(w), bias16 = AsBf16(bias);
  // Two parts, as q, k, v or gate, up are.
  const int64_t split = out / 4;
  const std::vector<HostTensor> parts = {{w16.data(), DType::kBF16, split, in},
                                         {w16.data() + split * in, DType::kBF16, out - split, in}};
  std::vector<HostTensor> biases;
  if (has_bias) {
    biases = {{bias16.data(), DType::kBF16, 1, split},
              {bias16.data() + split, DType::kBF16, 1, out - split}};
  }
  auto weight = backend_->PrepareLinear(parts, biases);
  ASSERT_OK(weight);
  const HostMatrix product = reference::Linear(
      x, w, has_bias ? absl::MakeConstSpan(bias.values) : absl::Span<const float>());
  const double abs = 1e-5 * static_cast<double>(in);  // fp32 sums of `in` terms of about 0.1
  const DeviceMatrix device_x = Put(x, DType::kBF16);

  const DeviceMatrix stored = NewMatrix(rows, out, DType::kBF16);
  ASSERT_OK(backend_->Linear(**weight, device_x.view, stored.view, LinearOutput::kStore));
  EXPECT_TRUE(TensorsMatch(Get(stored.view).values, product.values, {.abs = abs, .rel = 0x1p-8}));
  ExpectPaddingUntouched(stored);

  HostMatrix sum = product;
  for (size_t i = 0; i < sum.values.size(); ++i) sum.values[i] += before.values[i];
  const DeviceMatrix added = Put(before, DType::kBF16);
  ASSERT_OK(backend_->Linear(**weight, device_x.view, added.view, LinearOutput::kAdd));
  EXPECT_TRUE(TensorsMatch(Get(added.view).values, sum.values, {.abs = abs, .rel = 0x1p-8}));
  ExpectPaddingUntouched(added);

  if (has_bias) return;
  const DeviceMatrix wide = NewMatrix(rows, out, DType::kF32);
  ASSERT_OK(backend_->Linear(**weight, device_x.view, wide.view, LinearOutput::kStore));
  EXPECT_TRUE(TensorsMatch(Get(wide.view).values, product.values, {.abs = abs, .rel = 1e-5}));
}

struct RopeCase {
  HeadShape heads;
  int64_t first_position, num_tokens;
  bool qk_norm;
};
class CudaRopeTest : public CudaBackendTest, public ::testing::WithParamInterface<RopeCase> {};
INSTANTIATE_TEST_SUITE_P(All, CudaRopeTest,
                         ::testing::Values(RopeCase{{4, 2, 128}, 0, 130, false},
                                           RopeCase{{4, 2, 128}, 100, 300, true},
                                           RopeCase{{9, 3, 64}, 0, 257, false},
                                           RopeCase{{6, 2, 64}, 4000, 1, true},
                                           RopeCase{{28, 4, 128}, 128, 40, false}));

TEST_P(CudaRopeTest, RotatesAndFillsThePages) {
  const auto [heads, first_position, num_tokens, qk_norm] = GetParam();
  constexpr float kEps = 1e-6f;
  const int64_t d = heads.head_dim, end = first_position + num_tokens;
  std::vector<float> inv_freq;
  for (int64_t i = 0; i < d / 2; ++i)
    inv_freq.push_back(std::pow(1e4f, -2.0f * static_cast<float>(i) / d));
  auto rope = backend_->PrepareRope(inv_freq, 1.25f, end);
  ASSERT_OK(rope);
  HostMatrix x = RandomMatrix(num_tokens, heads.qkv_cols(), 5, DType::kBF16);
  const HostMatrix q_weight = RandomMatrix(1, d, 6, DType::kF32),
                   k_weight = RandomMatrix(1, d, 7, DType::kF32);
  auto q_norm = backend_->PrepareVector({q_weight.values.data(), DType::kF32, 1, d});
  auto k_norm = backend_->PrepareVector({k_weight.values.data(), DType::kF32, 1, d});
  ASSERT_OK(q_norm);
  ASSERT_OK(k_norm);
  const DeviceMatrix qkv = Put(x, DType::kBF16);
  const KvRows nothing{HostMatrix(0, heads.num_kv_heads * d),
                       HostMatrix(0, heads.num_kv_heads * d)};
  const DeviceKv kv = PutKv(nothing, heads, end);
  ASSERT_OK(
      backend_->RopeAndStoreKv({qkv.view, first_position, rope->get(), qk_norm ? &*q_norm : nullptr,
                                qk_norm ? &*k_norm : nullptr, kEps, kv.view}));

  const int64_t k_begin = heads.num_heads * d, v_begin = k_begin + heads.num_kv_heads * d;
  if (qk_norm) {
    reference::NormHeads(x, 0, heads.num_heads, q_weight.values, kEps);
    reference::NormHeads(x, k_begin, heads.num_kv_heads, k_weight.values, kEps);
  }
  reference::ApplyRope(x, 0, heads.num_heads + heads.num_kv_heads, inv_freq, 1.25f, first_position);
  const HostMatrix q = Get(qkv.view);
  const KvRows written = GetKv(kv, end);
  for (int64_t r = 0; r < num_tokens; ++r) {
    const auto expect = [&](const float* actual, const float* expected, int64_t count,
                            const char* what) {
      ASSERT_TRUE(TensorsMatch({actual, static_cast<size_t>(count)},
                               {expected, static_cast<size_t>(count)},
                               {.abs = 1e-4, .rel = 0x1p-8}))
          << what << " of row " << r;
    };
    expect(q.Row(r), x.Row(r), k_begin, "Q");
    expect(written.k.Row(first_position + r), x.Row(r) + k_begin, v_begin - k_begin, "K");
    expect(written.v.Row(first_position + r), x.Row(r) + v_begin, v_begin - k_begin, "V");
  }
  ExpectPaddingUntouched(qkv);
}

TEST_F(CudaBackendTest, ReadsKvHeadByHead) {
  const HeadShape heads{8, 2, 64};
  const KvRows rows{RandomMatrix(1000, 128, 1, DType::kBF16),
                    RandomMatrix(1000, 128, 2, DType::kBF16)};
  const DeviceKv kv = PutKv(rows, heads, 1000);
  constexpr int64_t kBegin = 256, kCount = 1000 - 256;
  std::vector<BFloat16> out(2 * 2 * kCount * 64);
  ASSERT_OK(
      backend_->ReadKv(kv.view, kBegin, kCount,
                       {reinterpret_cast<std::byte*>(out.data()), out.size() * sizeof(BFloat16)}));
  for (int64_t plane = 0; plane < 4; ++plane) {
    const HostMatrix& from = plane < 2 ? rows.k : rows.v;
    for (int64_t t = 0; t < kCount; ++t) {
      for (int64_t c = 0; c < 64; ++c) {
        ASSERT_EQ(static_cast<float>(out[(plane * kCount + t) * 64 + c]),
                  from.Row(kBegin + t)[plane % 2 * 64 + c]);
      }
    }
  }
}

TEST_F(CudaBackendTest, MarksKvThatIsNotFinite) {
  const HeadShape heads{8, 2, 64};
  for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    KvRows rows{RandomMatrix(300, 128, 1, DType::kBF16), RandomMatrix(300, 128, 2, DType::kBF16)};
    std::vector<std::byte> out(int64_t{2} * 2 * 300 * 64 * 2);
    ASSERT_OK(backend_->ReadKv(PutKv(rows, heads, 300).view, 0, 300, absl::MakeSpan(out)));
    rows.v.Row(299)[127] = bad;
    const absl::Status status =
        backend_->ReadKv(PutKv(rows, heads, 300).view, 0, 300, absl::MakeSpan(out));
    EXPECT_TRUE(IsNonFiniteError(status)) << status;
  }
}

TEST_F(CudaBackendTest, StaysWholeWhenMemoryRunsOut) {
  const auto refused = backend_->Allocate(int64_t{1} << 45);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted) << refused.status();
  const DeviceMatrix matrix = Put(RandomMatrix(3, 64, 1, DType::kBF16), DType::kBF16);
  EXPECT_EQ(Get(matrix.view).values, RandomMatrix(3, 64, 1, DType::kBF16).values);
}

TEST_F(CudaBackendTest, NamesWhatItCannotRun) {
  const HeadShape heads{4, 2, 96};
  const DeviceKv kv =
      PutKv({RandomMatrix(128, 192, 1, DType::kBF16), RandomMatrix(128, 192, 2, DType::kBF16)},
            heads, 128);
  const DeviceMatrix q = Put(RandomMatrix(128, 384, 3, DType::kBF16), DType::kBF16);
  backend_->ResetStats(1);
  const absl::Status status = backend_->Attention({q.view, 0, kv.view, 0, false, q.view});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("head_dim 96"), absl::string_view::npos) << status;
}

TEST(CudaDeviceTest, SaysWhatItLookedForWithoutADevice) {
  const auto backend = MakeBackend({.device = "cuda"});
  if (backend.ok()) GTEST_SKIP() << "this machine has " << (*backend)->device();
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(backend.status().message().find("9.0"), absl::string_view::npos) << backend.status();
}

}  // namespace
}  // namespace headstart::testing
