// The reference itself, on values that can be worked out by hand and on identities.
#include "kernels/cpu/reference_ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels/cpu/reference_selection.h"

namespace headstart::reference {
namespace {

HostMatrix MatrixOf(int64_t rows, int64_t cols, const std::vector<float>& values) {
  HostMatrix m(rows, cols);
  m.values = values;
  return m;
}

TEST(ReferenceOpsTest, LoadReadsEveryTypeWithItsStride) {
  const std::vector<float> f32 = {1, 2, -1, 3, 4, -1};
  EXPECT_EQ(Load({const_cast<float*>(f32.data()), DType::kF32, 2, 2, 3}).values,
            (std::vector<float>{1, 2, 3, 4}));
  std::vector<BFloat16> bf16 = {BFloat16(1.5f), BFloat16(-2.0f)};
  EXPECT_EQ(Load({bf16.data(), DType::kBF16, 1, 2, 2}).values, (std::vector<float>{1.5f, -2.0f}));
  std::vector<uint16_t> f16 = {0x3c00, 0xc000, 0x0001};  // 1, -2, the least subnormal
  EXPECT_EQ(Load({f16.data(), DType::kF16, 1, 3, 3}).values, (std::vector<float>{1, -2, 0x1p-24f}));
}

TEST(ReferenceOpsTest, RoundToTakesTheNearestWithTiesToEven) {
  EXPECT_EQ(RoundTo(1.0f + 0x1p-8f, DType::kBF16), 1.0f);                // a tie: to even
  EXPECT_EQ(RoundTo(1.0f + 3 * 0x1p-8f, DType::kBF16), 1.0f + 0x1p-6f);  // a tie: to even
  EXPECT_EQ(RoundTo(1.0f + 0x1.02p-8f, DType::kBF16), 1.0f + 0x1p-7f);
  EXPECT_EQ(RoundTo(1.0f + 0x1p-23f, DType::kF32), 1.0f + 0x1p-23f);
}

TEST(ReferenceOpsTest, NearestFloat8E4M3RoundsToEvenAndSaturates) {
  EXPECT_EQ(NearestFloat8E4M3(0.0f), 0x00);
  EXPECT_EQ(NearestFloat8E4M3(-0.0f), 0x80);
  EXPECT_EQ(NearestFloat8E4M3(1.0f), 0x38);
  EXPECT_EQ(NearestFloat8E4M3(1.0625f), 0x38);    // a tie: to even
  EXPECT_EQ(NearestFloat8E4M3(1.1875f), 0x3a);    // a tie: to even
  EXPECT_EQ(NearestFloat8E4M3(-0x1p-10f), 0x80);  // half of the least number: to even
  EXPECT_EQ(NearestFloat8E4M3(0x1.8p-9f), 0x02);
  EXPECT_EQ(NearestFloat8E4M3(-448.0f), 0xfe);
  EXPECT_EQ(NearestFloat8E4M3(1e30f), 0x7e);
}

// One page [K, V][1 head][128 tokens][1]: K counts, V is 0; two tokens count.
TEST(ReferenceOpsTest, QuantizePageScalesByTheTokensThatCount) {
  std::vector<float> page(2 * kBlockTokens);
  page[0] = -896;
  page[1] = 100;
  page[2] = 1e9f;  // behind the two
  const KvPages pages{page.data(), DType::kF32, {1, 1, 1}};
  const std::vector<uint8_t> fp8 = QuantizePage(pages, 0, 2);
  ASSERT_EQ(fp8.size(), 8 + 2 * kBlockTokens);
  float scales[2];
  std::memcpy(scales, fp8.data(), sizeof(scales));
  EXPECT_EQ(scales[0], 2);
  EXPECT_EQ(scales[1], 0);
  EXPECT_EQ(fp8[8], 0xfe);      // -448
  EXPECT_EQ(fp8[8 + 1], 0x64);  // 48: 50 lies between 48 and 52, a tie
  EXPECT_EQ(fp8[8 + 2], 0);
  EXPECT_EQ(fp8[8 + kBlockTokens], 0);
}

TEST(ReferenceOpsTest, EmbedPicksRows) {
  const HostMatrix table = MatrixOf(3, 2, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(Embed({2, 0, 2}, table).values, (std::vector<float>{5, 6, 1, 2, 5, 6}));
}

TEST(ReferenceOpsTest, RmsNormDividesByTheRootMeanSquare) {
  const HostMatrix x = MatrixOf(1, 2, {3, 4});  // mean of squares 12.5
  const HostMatrix y = RmsNorm(x, {1, 2}, 0);
  EXPECT_FLOAT_EQ(y.values[0], 3 / std::sqrt(12.5f));
  EXPECT_FLOAT_EQ(y.values[1], 8 / std::sqrt(12.5f));
  EXPECT_FLOAT_EQ(RmsNorm(MatrixOf(1, 1, {0}), {1}, 1e-6).values[0], 0);
}

TEST(ReferenceOpsTest, LinearMultipliesByTheTransposedWeight) {
  const HostMatrix weight = MatrixOf(3, 2, {1, 0, 0, 1, 1, 1});
  EXPECT_EQ(Linear(MatrixOf(1, 2, {2, 3}), weight, {}).values, (std::vector<float>{2, 3, 5}));
  EXPECT_EQ(Linear(MatrixOf(1, 2, {2, 3}), weight, {1, 1, -5}).values,
            (std::vector<float>{3, 4, 0}));
}

TEST(ReferenceOpsTest, RopeTurnsPairsByTheAngleOfTheirPosition) {
  // Column i turns with column i + d/2; a quarter turn at position 2.
  const std::vector<float> inv_freq = {static_cast<float>(M_PI) / 4, 0};
  HostMatrix x = MatrixOf(2, 4, {1, 2, 0, 3, 1, 2, 0, 3});
  ApplyRope(x, 0, 1, inv_freq, 1, 1);
  EXPECT_NEAR(x.Row(0)[0], std::sqrt(0.5), 1e-6);
  EXPECT_NEAR(x.Row(0)[2], std::sqrt(0.5), 1e-6);
  EXPECT_NEAR(x.Row(1)[0], 0, 1e-6);
  EXPECT_NEAR(x.Row(1)[2], 1, 1e-6);
  EXPECT_EQ(x.Row(1)[1], 2);
  EXPECT_EQ(x.Row(1)[3], 3);
}

TEST(ReferenceOpsTest, RopeKeepsDotProductsOfEqualDistances) {
  const std::vector<float> inv_freq = {1, 0.1f};
  const auto dot_at = [&](int64_t q_position, int64_t k_position) {
    HostMatrix q = MatrixOf(1, 4, {1, 2, 3, 4});
    HostMatrix k = MatrixOf(1, 4, {-2, 1, 0.5, 1});
    ApplyRope(q, 0, 1, inv_freq, 1, q_position);
    ApplyRope(k, 0, 1, inv_freq, 1, k_position);
    return std::inner_product(q.values.begin(), q.values.end(), k.values.begin(), 0.0);
  };
  EXPECT_NEAR(dot_at(7, 3), dot_at(104, 100), 1e-4);
  EXPECT_GT(std::abs(dot_at(7, 3) - dot_at(7, 4)), 0.1);
}

TEST(ReferenceOpsTest, NormHeadsTouchesItsHeadsOnly) {
  HostMatrix x = MatrixOf(1, 6, {9, 9, 3, 4, 0, 2});
  NormHeads(x, 2, 2, {1, 1}, 0);
  EXPECT_EQ(x.values[0], 9);
  EXPECT_FLOAT_EQ(x.values[2], 3 / std::sqrt(12.5f));
  EXPECT_FLOAT_EQ(x.values[5], 2 / std::sqrt(2.0f));
}

TEST(ReferenceOpsTest, SwiGluGatesUp) {
  const HostMatrix y = SwiGlu(MatrixOf(1, 4, {0, 2, 5, 3}));  // gates 0 and 2, ups 5 and 3
  EXPECT_EQ(y.values[0], 0);
  EXPECT_NEAR(y.values[1], 2 / (1 + std::exp(-2.0)) * 3, 1e-6);
}

TEST(ReferenceOpsTest, LogProbIsNormalised) {
  const std::vector<float> logits = {1, 3, 2, -50};
  double sum = 0;
  for (int32_t id = 0; id < 4; ++id) sum += std::exp(LogProb(logits, id));
  EXPECT_NEAR(sum, 1, 1e-12);
  EXPECT_NEAR(LogProb(logits, 1) - LogProb(logits, 0), 2, 1e-12);
  EXPECT_NEAR(LogProb(std::vector<float>{1e4f, 1e4f}, 0), -std::log(2.0), 1e-12);
}

TEST(ReferenceOpsTest, KvLivesWhereThePageTableSays) {
  KvPages pages;
  pages.dtype = DType::kF32;
  pages.shape = {2, 2, 16};
  const std::vector<int32_t> table = {1, 0};
  std::vector<float> memory(2 * pages.page_elements(), -1);
  pages.pages = memory.data();
  KvRows rows{HostMatrix(2, 32), HostMatrix(2, 32)};
  std::iota(rows.k.values.begin(), rows.k.values.end(), 100.0f);
  std::iota(rows.v.values.begin(), rows.v.values.end(), 500.0f);
  StoreKv(rows, 127, pages, table.data());  // the last token of page 1, the first of page 0
  const int64_t head = kBlockTokens * 16;
  EXPECT_EQ(memory[pages.page_elements() + 127 * 16], 100);             // K, head 0
  EXPECT_EQ(memory[pages.page_elements() + head + 127 * 16 + 3], 119);  // K, head 1
  EXPECT_EQ(memory[pages.page_elements() + pages.plane_elements() + 127 * 16 + 15], 515);  // V
  EXPECT_EQ(memory[0], 132);  // token 128
  EXPECT_EQ(LoadKv(pages, table.data(), 129).v.Row(128)[31], 563);
}

// Two blocks of keys; the values say which block they are of.
struct TwoBlocks {
  HeadShape shape{2, 1, 16};
  KvRows kv{HostMatrix(200, 16), HostMatrix(200, 16)};
  TwoBlocks() {
    for (int64_t t = 0; t < 200; ++t) {
      for (int64_t c = 0; c < 16; ++c) kv.v.Row(t)[c] = t < kBlockTokens ? 1 : 2;
    }
  }
};

TEST(ReferenceOpsTest, AttentionIsCausal) {
  const TwoBlocks blocks;
  const HostMatrix q(2, 32);  // zero logits: every visible token weighs the same
  const HostMatrix out = Attention(q, blocks.kv, blocks.shape, 127, nullptr);
  EXPECT_FLOAT_EQ(out.Row(0)[0], 1);
  EXPECT_FLOAT_EQ(out.Row(1)[0], (128 * 1 + 2) / 129.0f);
}

TEST(ReferenceOpsTest, AttentionScalesByTheRootOfHeadDim) {
  TwoBlocks blocks;
  HostMatrix q(1, 32);
  blocks.kv.k.Row(1)[0] = 8;
  q.Row(0)[0] = 2;  // logit of token 1: 16 / 4
  blocks.kv.v.Row(1)[0] = 5;
  const HostMatrix out = Attention(q, blocks.kv, blocks.shape, 1, nullptr);
  EXPECT_NEAR(out.values[0], (1 + 5 * std::exp(4)) / (1 + std::exp(4)), 1e-6);
  EXPECT_NEAR(out.values[16], 3, 1e-6) << "head 1 has a zero query";
}

TEST(ReferenceOpsTest, AttentionSeesTheKeptPrefixOfTheRanking) {
  const TwoBlocks blocks;
  BlockSelection selection;
  selection.num_heads = 2;
  selection.num_proxies = 1;
  selection.first_row = 1;
  selection.num_rows = 1;
  selection.ranking = {1, 0};
  selection.counts = {1, 2};  // head 0 keeps the diagonal only
  const HostMatrix out = Attention(HostMatrix(1, 32), blocks.kv, blocks.shape, 199, &selection);
  EXPECT_FLOAT_EQ(out.values[0], 2);
  EXPECT_FLOAT_EQ(out.values[16], (128 * 1 + 72 * 2) / 200.0f);
}

TEST(ReferenceSelectionTest, PoolsTheFirstTokenOfEveryWindow) {
  HostMatrix x(9, 4);  // 4 heads of one column
  for (int64_t t = 0; t < 9; ++t) x.Row(t)[0] = x.Row(t)[1] = static_cast<float>(t);
  const HostMatrix pooled = SampleAndPool(x, 4, 2, 4, DType::kF32);
  EXPECT_EQ(pooled.rows, 3);
  EXPECT_EQ(pooled.values, (std::vector<float>{0, 0, 4, 0, 8, 0}));
}

TEST(ReferenceSelectionTest, FindsTheBlockThatQueriesPointAt) {
  // Keys of block 1 of 6 are aligned with head 0's queries; head 1 asks for nothing.
  constexpr int64_t kTokens = 6 * kBlockTokens;
  SelectionInput input;
  input.shape = {2, 1, 16};
  input.q = HostMatrix(kTokens, 32);
  input.k = HostMatrix(kTokens, 16);
  for (int64_t t = 0; t < kTokens; ++t) {
    input.q.Row(t)[0] = 8;
    input.k.Row(t)[0] = t / kBlockTokens == 1 ? 8 : 0;
  }
  ProxyAttnOptions options;
  options.enabled = true;
  options.num_proxies = 2;
  options.stride = 16;
  options.dense_below_tokens = 0;
  options.floor_tokens = 0;
  options.local_blocks = 0;
  options.dense_above_density = 1;
  std::vector<float> ratio(2);
  const BlockSelection selection = SelectBlocks(input, options, ratio);
  // The diagonal, the sink, block 1 which has all the mass.
  EXPECT_EQ(std::vector<int32_t>(selection.Ranking(0, 5), selection.Ranking(0, 5) + 3),
            (std::vector<int32_t>{5, 0, 1}));
  EXPECT_EQ(selection.Count(0, 5), 3);
  EXPECT_FLOAT_EQ(ratio[0], 0.5f);
  // Head 1 attends to all tokens alike: .95 of them takes every block.
  EXPECT_EQ(selection.Count(1, 5), 6);
  EXPECT_FLOAT_EQ(ratio[1], 1);
}

}  // namespace
}  // namespace headstart::reference
