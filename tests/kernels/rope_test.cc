// RopeAndStoreKv of every backend against the reference.
#include <cmath>
#include <limits>
#include <tuple>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"

namespace headstart::testing {
namespace {

constexpr double kF32Roundoff = UnitRoundoff(DType::kF32);
constexpr float kNormEps = 1e-6f;

struct RopeShape {
  HeadShape heads;
  int64_t rows;
  int64_t first_position;
  bool qk_norm;
  float scaling;
};
std::string NameOf(const RopeShape& s) {
  return std::to_string(s.heads.num_heads) + "q" + std::to_string(s.heads.num_kv_heads) + "kv" +
         std::to_string(s.heads.head_dim) + "d_" + std::to_string(s.rows) + "at" +
         std::to_string(s.first_position) + (s.qk_norm ? "_norm" : "") +
         (s.scaling == 1 ? "" : "_scaled");
}
void PrintTo(const RopeShape& shape, std::ostream* os) { *os << NameOf(shape); }

std::vector<RopeShape> Shapes() {
  return {
      {{9, 3, 64}, 1, 0, false, 1},     {{9, 3, 64}, 129, 0, false, 1},
      {{9, 3, 64}, 130, 127, false, 1},  // starts within a page and ends two pages on
      {{4, 4, 64}, 5, 8000, false, 1},  {{14, 2, 64}, 64, 128, false, 1.3f},
      {{16, 2, 128}, 33, 256, true, 1}, {{3, 1, 128}, 1, 8191, true, 1.1f},
      {{8, 8, 16}, 20, 5, false, 1},
  };
}

class RopeTest : public BackendTest,
                 public ::testing::WithParamInterface<std::tuple<BackendCase, RopeShape>> {
 protected:
  void SetUp() override {
    Open(std::get<0>(GetParam()));
    if (IsSkipped()) return;
    if (backend_->name() == "cuda" && shape().heads.head_dim != 64 &&
        shape().heads.head_dim != 128) {
      GTEST_SKIP() << "the CUDA kernels take head_dim 64 and 128";
    }
    const int64_t d = shape().heads.head_dim;
    for (int64_t i = 0; i < d / 2; ++i) {
      inv_freq_.push_back(std::pow(1e5f, -static_cast<float>(2 * i) / static_cast<float>(d)));
    }
    qkv_ = RandomMatrix(shape().rows, shape().heads.qkv_cols(), 1, dtype());
    q_norm_ = RandomMatrix(1, d, 2, DType::kF32).values;
    k_norm_ = RandomMatrix(1, d, 3, DType::kF32).values;
  }
  const RopeShape& shape() const { return std::get<1>(GetParam()); }
  int64_t q_cols() const { return int64_t{shape().heads.num_heads} * shape().heads.head_dim; }
  int64_t kv_cols() const { return int64_t{shape().heads.num_kv_heads} * shape().heads.head_dim; }
  int64_t end() const { return shape().first_position + shape().rows; }

  // Normed and rotated by the reference.
  HostMatrix ExpectedQkv() const {
    HostMatrix x = qkv_;
    const HeadShape& heads = shape().heads;
    if (shape().qk_norm) {
      reference::NormHeads(x, 0, heads.num_heads, q_norm_, kNormEps);
      reference::NormHeads(x, q_cols(), heads.num_kv_heads, k_norm_, kNormEps);
    }
    reference::ApplyRope(x, 0, heads.num_heads + heads.num_kv_heads, inv_freq_, shape().scaling,
                         shape().first_position);
    return x;
  }

  void Run(const DeviceMatrix& qkv, const DeviceKv& kv) {
    auto table = backend_->PrepareRope(inv_freq_, shape().scaling, end());
    ASSERT_OK(table);
    const auto d = static_cast<int64_t>(q_norm_.size());
    auto q_norm = backend_->PrepareVector({q_norm_.data(), DType::kF32, 1, d});
    auto k_norm = backend_->PrepareVector({k_norm_.data(), DType::kF32, 1, d});
    ASSERT_OK(q_norm);
    ASSERT_OK(k_norm);
    RopeArgs args;
    args.qkv = qkv.view;
    const RopeSequence sequence{{0, shape().rows, shape().first_position, kv.table()}, nullptr};
    args.sequences = {&sequence, 1};
    args.rope = table->get();
    if (shape().qk_norm) {
      args.q_norm = &*q_norm;
      args.k_norm = &*k_norm;
      args.norm_eps = kNormEps;
    }
    args.kv = kv.view;
    ASSERT_OK(backend_->RopeAndStoreKv(args));
  }

  // Each value is a cos - b sin: half a dozen fp32 roundings of |a| + |b|, the norm's sum of d
  // squares, one rounding to store.
  Tolerance RopeTolerance(const HostMatrix& scale) const {
    const double norm = shape().qk_norm ? std::sqrt(shape().heads.head_dim) : 0;
    return {.abs = (6 + norm) * kF32Roundoff, .rel = UnitRoundoff(dtype()), .scale = scale.values};
  }
  // |a| + |b| of every rotated value, bounded by twice the head's greatest.
  static HostMatrix Scale(const HostMatrix& x, int64_t head_dim) {
    HostMatrix scale(x.rows, x.cols);
    for (int64_t i = 0; i < x.rows * x.cols; i += head_dim) {
      float greatest = 0;
      for (int64_t c = i; c < i + head_dim; ++c) {
        greatest = std::max(greatest, std::abs(x.values[c]));
      }
      for (int64_t c = i; c < i + head_dim; ++c) scale.values[c] = 2 * greatest;
    }
    return scale;
  }
  static HostMatrix Columns(const HostMatrix& x, int64_t begin, int64_t count) {
    HostMatrix part(x.rows, count);
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.Row(r) + begin, count, part.Row(r));
    return part;
  }
  static HostMatrix LastRows(const HostMatrix& x, int64_t count) {
    HostMatrix part(count, x.cols);
    std::copy(x.values.end() - count * x.cols, x.values.end(), part.values.begin());
    return part;
  }

  std::vector<float> inv_freq_;
  std::vector<float> q_norm_;
  std::vector<float> k_norm_;
  HostMatrix qkv_;
};

INSTANTIATE_TEST_SUITE_P(All, RopeTest,
                         ::testing::Combine(::testing::ValuesIn(BackendsUnderTest()),
                                            ::testing::ValuesIn(Shapes())),
                         [](const auto& info) {
                           return NameOf(std::get<0>(info.param)) + "_" +
                                  NameOf(std::get<1>(info.param));
                         });

TEST_P(RopeTest, RotatesAndStores) {
  const KvRows before{RandomMatrix(shape().first_position, kv_cols(), 4, dtype()),
                      RandomMatrix(shape().first_position, kv_cols(), 5, dtype())};
  const DeviceMatrix qkv = Put(qkv_, dtype());
  const DeviceKv kv = PutKv(before, shape().heads, end());
  ASSERT_NO_FATAL_FAILURE(Run(qkv, kv));

  const HostMatrix expected = ExpectedQkv();
  const int64_t d = shape().heads.head_dim;
  const HostMatrix expected_q = Columns(expected, 0, q_cols());
  EXPECT_TRUE(TensorsMatch(Get(qkv.view.Cols(0, q_cols())).values, expected_q.values,
                           RopeTolerance(Scale(expected_q, d))));
  const KvRows stored = GetKv(kv, end());
  const HostMatrix expected_k = Columns(expected, q_cols(), kv_cols());
  EXPECT_TRUE(TensorsMatch(LastRows(stored.k, shape().rows).values, expected_k.values,
                           RopeTolerance(Scale(expected_k, d))));
  EXPECT_EQ(LastRows(stored.v, shape().rows).values,
            Columns(expected, q_cols() + kv_cols(), kv_cols()).values)
      << "values are copied as they are";
  // Earlier tokens stay.
  HostMatrix k_before = stored.k;
  k_before.values.resize(before.k.values.size());
  EXPECT_EQ(k_before.values, before.k.values);
  ExpectPaddingUntouched(qkv);
}

TEST_P(RopeTest, WritesNoOtherToken) {
  const DeviceMatrix qkv = Put(qkv_, dtype());
  // Room for one more block, and no token before this chunk: all else must stay NaN.
  const DeviceKv kv = PutKv({HostMatrix(0, kv_cols()), HostMatrix(0, kv_cols())}, shape().heads,
                            end() + kBlockTokens);
  ASSERT_NO_FATAL_FAILURE(Run(qkv, kv));
  const KvRows all = GetKv(kv, NumBlocks(end() + kBlockTokens) * kBlockTokens);
  for (int64_t t = 0; t < all.k.rows; ++t) {
    const bool written = t >= shape().first_position && t < end();
    ASSERT_EQ(std::isnan(all.k.Row(t)[0]), !written) << "K of token " << t;
    ASSERT_EQ(std::isnan(all.v.Row(t)[0]), !written) << "V of token " << t;
  }
}

}  // namespace
}  // namespace headstart::testing
