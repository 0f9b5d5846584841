// The CUDA attention kernel, dense and over selected blocks, against the reference on rows of every
// kind.
#include <algorithm>
#include <cstring>
#include <tuple>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"

namespace headstart::testing {
namespace {

const BackendCase kCuda{"Cuda", {.device = "cuda"}, ""};

struct Sequence {
  HeadShape heads;
  int64_t first_position;
  int64_t num_tokens;  // of the chunk
};

HeadShape Heads(int32_t group, int32_t head_dim) { return {2 * group, 2, head_dim}; }

// One random chunk with all keys before it, on the device.
struct Chunk {
  HostMatrix q;
  KvRows kv;
  DeviceMatrix device_q;
  DeviceKv device_kv;
};

class CudaAttentionTest : public BackendTest {
 protected:
  void SetUp() override { Open(kCuda); }

  Chunk MakeChunk(const Sequence& sequence, float q_scale) {
    const HeadShape& heads = sequence.heads;
    const int64_t end = sequence.first_position + sequence.num_tokens;
    const int64_t kv_cols = int64_t{heads.num_kv_heads} * heads.head_dim;
    Chunk chunk;
    chunk.q = RandomMatrix(sequence.num_tokens, int64_t{heads.num_heads} * heads.head_dim, 1,
                           dtype(), q_scale);
    chunk.kv = {RandomMatrix(end, kv_cols, 2, dtype()), RandomMatrix(end, kv_cols, 3, dtype())};
    chunk.device_q = Put(chunk.q, dtype());
    chunk.device_kv = PutKv(chunk.kv, heads, end);
    return chunk;
  }

  // Dense without options. What a selection keeps is in selection_ where `read` says so: without,
  // nothing waits between selection and attention.
  DeviceMatrix Run(const Chunk& chunk, int64_t first_position,
                   const ProxyAttnOptions* options = nullptr, bool ends_prompt = false,
                   bool read = false) {
    DeviceMatrix out = NewMatrix(chunk.q.rows, chunk.q.cols, dtype());
    const Buffer budget_ratio =
        PutFloats(*backend_, std::vector<float>(chunk.device_kv.view.shape.num_heads));
    const Buffer counts = NewCounts(*backend_);
    AttentionSequence sequence;
    sequence.rows = {0, chunk.q.rows, first_position, chunk.device_kv.table()};
    sequence.proxy_attn = options;
    sequence.ends_prompt = ends_prompt;
    sequence.budget_ratio = static_cast<float*>(budget_ratio.data());
    sequence.counts = static_cast<BlockCounts*>(counts.data());
    if (read) sequence.selection = &selection_;
    EXPECT_OK(
        backend_->Attention({chunk.device_q.view, out.view, chunk.device_kv.view, {&sequence, 1}}));
    counts_ = GetCounts(*backend_, counts);
    return out;
  }

  // Compares rows [begin, begin + count) of the chunk.
  void ExpectRows(const Chunk& chunk, const Sequence& sequence, const HostMatrix& actual,
                  int64_t begin, int64_t count, const BlockSelection* selection) {
    count = std::min(count, chunk.q.rows - begin);
    const int64_t cols = chunk.q.cols;
    HostMatrix q(count, cols);
    std::copy_n(chunk.q.Row(begin), count * cols, q.values.begin());
    const HostMatrix expected = reference::Attention(q, chunk.kv, sequence.heads,
                                                     sequence.first_position + begin, selection);
    const absl::Span<const float> rows(actual.Row(begin), count * cols);
    // Probabilities are rounded to bf16 before they meet V, and the output is again; V is about 1.
    EXPECT_TRUE(
        TensorsMatch(rows, expected.values, {.abs = 0.02, .rel = 0.02, .min_cosine = 0.99999}))
        << "rows from " << begin << " of " << chunk.q.rows;
  }

  ProxyAttnOptions Options(int32_t proxies, int32_t stride) {
    ProxyAttnOptions options;
    options.enabled = true;
    options.num_proxies = proxies;
    options.stride = stride;
    options.floor_tokens = 128;
    options.dense_below_tokens = 0;
    options.dense_above_density = 1.0f;
    return options;
  }

  BlockSelection selection_;
  BlockCounts counts_;  // of the last Run
};

std::vector<std::byte> BytesOf(Backend& backend, const DeviceMatrix& matrix) {
  std::vector<std::byte> bytes(matrix.memory.bytes());
  EXPECT_OK(backend.Download(matrix.memory.data(), matrix.memory.bytes(), bytes.data()));
  return bytes;
}

// The one row m of a selection.
BlockSelection RowOf(const BlockSelection& selection, int64_t m) {
  BlockSelection row;
  row.num_heads = selection.num_heads;
  row.num_proxies = selection.num_proxies;
  row.first_row = m;
  row.num_rows = 1;
  for (int32_t p = 0; p < selection.num_proxies; ++p) {
    row.ranking.insert(row.ranking.end(), selection.Ranking(p, m), selection.Ranking(p, m) + m + 1);
  }
  for (int32_t h = 0; h < selection.num_heads; ++h) row.counts.push_back(selection.Count(h, m));
  return row;
}

using DenseParams =
    std::tuple<int32_t, int32_t, int64_t, int64_t>;  // head_dim, group, first position, tokens
class CudaDenseAttentionTest : public CudaAttentionTest,
                               public ::testing::WithParamInterface<DenseParams> {};

INSTANTIATE_TEST_SUITE_P(Lengths, CudaDenseAttentionTest,
                         ::testing::Combine(::testing::Values(64, 128), ::testing::Values(4),
                                            ::testing::Values<int64_t>(0),
                                            ::testing::Values<int64_t>(1, 127, 128, 129, 2047, 2048,
                                                                       2049, 8229)));
INSTANTIATE_TEST_SUITE_P(Groups, CudaDenseAttentionTest,
                         ::testing::Combine(::testing::Values(64, 128),
                                            ::testing::Values(1, 3, 7, 8),
                                            ::testing::Values<int64_t>(0),
                                            ::testing::Values<int64_t>(1000)));
INSTANTIATE_TEST_SUITE_P(Offsets, CudaDenseAttentionTest,
                         ::testing::Combine(::testing::Values(64, 128), ::testing::Values(3),
                                            ::testing::Values<int64_t>(1, 77, 127, 128, 2000, 4096),
                                            ::testing::Values<int64_t>(1, 51, 128, 700)));

TEST_P(CudaDenseAttentionTest, MatchesTheReference) {
  const auto [head_dim, group, first_position, num_tokens] = GetParam();
  const Sequence sequence{Heads(group, head_dim), first_position, num_tokens};
  for (const float q_scale : {1.0f, 30.0f}) {
    const Chunk chunk = MakeChunk(sequence, q_scale);
    const DeviceMatrix out = Run(chunk, first_position);
    const HostMatrix actual = Get(out.view);
    ExpectRows(chunk, sequence, actual, 0, 5, nullptr);
    ExpectRows(chunk, sequence, actual, num_tokens / 2, 5, nullptr);
    ExpectRows(chunk, sequence, actual, std::max<int64_t>(num_tokens - 5, 0), 5, nullptr);
    ExpectPaddingUntouched(out);
  }
}

TEST_F(CudaAttentionTest, IsTheSameBitForBitEveryTime) {
  for (const int32_t head_dim : {64, 128}) {
    const Sequence sequence{Heads(4, head_dim), 0, 2049};
    const Chunk chunk = MakeChunk(sequence, 1.0f);
    const std::vector<std::byte> first = BytesOf(*backend_, Run(chunk, 0));
    for (int i = 0; i < 100; ++i)
      ASSERT_EQ(first, BytesOf(*backend_, Run(chunk, 0))) << "repeat " << i;
  }
}

TEST_F(CudaAttentionTest, FullBudgetIsDenseBitForBit) {
  for (const int32_t head_dim : {64, 128}) {
    for (const int64_t first_position : {0, 1024}) {
      const Sequence sequence{Heads(4, head_dim), first_position, 1500};
      const Chunk chunk = MakeChunk(sequence, 1.0f);
      ProxyAttnOptions options = Options(2, 4);
      options.gamma = 1.0f;
      const std::vector<std::byte> dense = BytesOf(*backend_, Run(chunk, first_position));
      EXPECT_EQ(dense, BytesOf(*backend_, Run(chunk, first_position, &options)));
      EXPECT_EQ(counts_.executed_blocks, counts_.causal_blocks);
      // By rule: lists of all blocks where the selection is wanted, no selection at all without.
      options.dense_below_tokens = static_cast<int32_t>(first_position + 1500);
      for (const bool read : {true, false}) {
        EXPECT_EQ(dense, BytesOf(*backend_, Run(chunk, first_position, &options, false, read)));
        EXPECT_EQ(counts_.executed_blocks, counts_.causal_blocks);
        EXPECT_GT(counts_.causal_blocks, 0);
      }
    }
  }
}

using SparseParams = std::tuple<int32_t, int32_t, int64_t, int64_t>;
class CudaSparseAttentionTest : public CudaAttentionTest,
                                public ::testing::WithParamInterface<SparseParams> {};

INSTANTIATE_TEST_SUITE_P(All, CudaSparseAttentionTest,
                         ::testing::Combine(::testing::Values(64, 128),
                                            ::testing::Values(3, 4, 7, 8),
                                            ::testing::Values<int64_t>(0, 1024),
                                            ::testing::Values<int64_t>(129, 2049, 3000)));

TEST_P(CudaSparseAttentionTest, SeesTheSelectedBlocksOnly) {
  const auto [head_dim, group, first_position, num_tokens] = GetParam();
  const Sequence sequence{Heads(group, head_dim), first_position, num_tokens};
  const Chunk chunk = MakeChunk(sequence, 1.0f);
  for (const float density : {0.01f, 0.3f}) {
    ProxyAttnOptions options = Options(/*proxies=*/1, /*stride=*/8);
    options.forced_density = density;
    options.dense_tail_blocks = 1;
    const DeviceMatrix out =
        Run(chunk, first_position, &options, /*ends_prompt=*/true, /*read=*/true);
    const HostMatrix actual = Get(out.view);
    uint64_t executed = 0;
    for (const int32_t count : selection_.counts) executed += static_cast<uint64_t>(count);
    for (int64_t row = 0; row < selection_.num_rows; ++row) {
      const BlockSelection one = RowOf(selection_, selection_.first_row + row);
      ExpectRows(chunk, sequence, actual, row * kBlockTokens, 2, &one);
    }
    ExpectPaddingUntouched(out);
    EXPECT_EQ(counts_.executed_blocks, executed);
    EXPECT_EQ(counts_.causal_blocks, sequence.heads.num_heads * selection_.RankingStride());
  }
}

// Queries of zeros score every block alike: the lists hold the lowest ones, as the ranking does.
TEST_F(CudaAttentionTest, OfEqualScoresTheLowestBlocksAreSeen) {
  const Sequence sequence{Heads(4, 128), 1024, 3000};
  const Chunk chunk = MakeChunk(sequence, /*q_scale=*/0.0f);
  ProxyAttnOptions options = Options(/*proxies=*/8, /*stride=*/16);
  options.forced_density = 0.4f;
  const HostMatrix actual =
      Get(Run(chunk, sequence.first_position, &options, false, /*read=*/true).view);
  const int64_t last = selection_.first_row + selection_.num_rows - 1;
  ASSERT_LT(selection_.Count(0, last), last);
  EXPECT_EQ(selection_.Ranking(0, last)[selection_.Count(0, last)],
            selection_.Ranking(0, last)[selection_.Count(0, last) - 1] + 1);
  for (int64_t row = 0; row < selection_.num_rows; ++row) {
    const BlockSelection one = RowOf(selection_, selection_.first_row + row);
    ExpectRows(chunk, sequence, actual, row * kBlockTokens, 2, &one);
  }
}

TEST_F(CudaAttentionTest, SelectedRunsAreTheSameBitForBit) {
  const Sequence sequence{Heads(4, 128), 0, 5000};
  const Chunk chunk = MakeChunk(sequence, 1.0f);
  ProxyAttnOptions options = Options(8, 16);
  options.gamma = 0.5f;
  const std::vector<std::byte> first = BytesOf(*backend_, Run(chunk, 0, &options, true));
  for (int i = 0; i < 100; ++i) {
    ASSERT_EQ(first, BytesOf(*backend_, Run(chunk, 0, &options, true))) << "repeat " << i;
  }
}

}  // namespace
}  // namespace headstart::testing
