// Several sequences in one launch of the CUDA attention kernel: each gets the bits that it gets
// alone.
#include <algorithm>
#include <vector>

#include "kernels/cuda/cuda_resources.h"
#include "kernels/cuda/launchers.h"
#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using cuda::AttendedSequence;
using cuda::AttentionParams;
using cuda::KeptBlocks;

struct Shape {
  int64_t first_position, rows;
};

// Rows of q and out that belong to no sequence, before each of them.
constexpr int64_t kGap = 3;

class CudaAttentionBatchTest : public BackendTest, public ::testing::WithParamInterface<int32_t> {
 protected:
  void SetUp() override {
    Open({"Cuda", {.device = "cuda"}, ""});
    if (IsSkipped()) return;
    counter_ = Upload(std::vector<uint32_t>{0});
    ASSERT_EQ(cudaGetDeviceProperties(&device_, 0), cudaSuccess);
  }

  template <typename T>
  Buffer Upload(const std::vector<T>& values) {
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
    auto buffer = backend_->Allocate(bytes);
    EXPECT_OK(buffer);
    EXPECT_OK(backend_->Upload(values.data(), bytes, buffer->data()));
    return *std::move(buffer);
  }

  // Sequences one behind the other in q, in the pages and in the page table.
  void Make(const HeadShape& heads, absl::Span<const Shape> shapes) {
    heads_ = heads;
    int64_t rows = 0, blocks = 0;
    for (const Shape& shape : shapes) {
      AttendedSequence sequence;
      sequence.rows = {rows + kGap, shape.rows, shape.first_position, nullptr};
      sequences_.push_back(sequence);
      first_block_.push_back(blocks);
      rows = sequence.rows.first_row + shape.rows;
      blocks += NumBlocks(shape.first_position + shape.rows);
    }
    q_ = Put(RandomMatrix(rows, int64_t{heads.num_heads} * heads.head_dim, 1, dtype()), dtype());
    const int64_t kv_cols = int64_t{heads.num_kv_heads} * heads.head_dim;
    const int64_t tokens = blocks * kBlockTokens;
    kv_ = PutKv(
        {RandomMatrix(tokens, kv_cols, 2, dtype()), RandomMatrix(tokens, kv_cols, 3, dtype())},
        heads, tokens);
    for (size_t i = 0; i < sequences_.size(); ++i) {
      sequences_[i].rows.page_table = kv_.table() + first_block_[i];
    }
  }

  // Keeps the diagonal, block 0 and the blocks between that `step` divides, the same for all heads.
  void KeepBlocks(AttendedSequence& sequence, int64_t step) {
    const int64_t first = sequence.rows.first_position / kBlockTokens;
    const int64_t end = NumBlocks(sequence.rows.first_position + sequence.rows.num_rows);
    const int64_t head_stride = (end * (end + 1) - first * (first + 1)) / 2;
    std::vector<uint16_t> lists(heads_.num_heads * head_stride);
    std::vector<int32_t> counts;
    for (int32_t h = 0; h < heads_.num_heads; ++h) {
      for (int64_t m = first; m < end; ++m) {
        uint16_t* list = lists.data() + h * head_stride + (m * (m + 1) - first * (first + 1)) / 2;
        int32_t count = 0;
        for (int64_t n = m; n >= 0; --n) {
          if (n == m || n % step == 0) list[count++] = static_cast<uint16_t>(n);
        }
        counts.push_back(count);
      }
    }
    memory_.push_back(Upload(lists));
    const auto* device_lists = static_cast<const uint16_t*>(memory_.back().data());
    memory_.push_back(Upload(counts));
    sequence.kept = {device_lists, static_cast<const int32_t*>(memory_.back().data()), head_stride};
  }

  // The output of one launch over `sequences`; NaN where nothing was written.
  std::vector<uint16_t> Run(absl::Span<const AttendedSequence> sequences) {
    const DeviceMatrix out = NewMatrix(q_.view.rows, q_.view.cols, dtype());
    AttentionParams params{};
    params.q = q_.view.data;
    params.out = out.view.data;
    params.rows = q_.view.rows;
    params.q_stride = q_.view.row_stride;
    params.out_stride = out.view.row_stride;
    params.kv = kv_.view;
    params.sequences = sequences.data();
    params.num_sequences = static_cast<int>(sequences.size());
    params.tile_counter = static_cast<uint32_t*>(counter_.data());
    params.num_sms = device_.multiProcessorCount;
    // The backend uploads on a stream of its own.
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cuda::LaunchAttention(params, nullptr), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    std::vector<uint16_t> values(out.memory.bytes() / sizeof(uint16_t));
    EXPECT_OK(backend_->Download(out.memory.data(), out.memory.bytes(), values.data()));
    return values;
  }

  // What one launch writes is what a launch for each sequence writes, and nothing else.
  void ExpectTheSameAlone() {
    const std::vector<uint16_t> together = Run(sequences_);
    std::vector<uint16_t> alone(together.size(), 0xffff);
    for (const AttendedSequence& sequence : sequences_) {
      const std::vector<uint16_t> own = Run({&sequence, 1});
      const SequenceRows& rows = sequence.rows;
      for (int64_t r = rows.first_row; r < rows.first_row + rows.num_rows; ++r) {
        const int64_t at = r * q_.view.row_stride;
        ASSERT_TRUE(std::none_of(&own[at], &own[at + q_.view.cols],
                                 [](uint16_t bits) { return bits == 0xffff; }))
            << "row " << r;
        std::copy_n(&own[at], q_.view.cols, &alone[at]);
      }
    }
    EXPECT_EQ(together, alone);
  }

  cudaDeviceProp device_{};
  Buffer counter_;
  HeadShape heads_;
  std::vector<AttendedSequence> sequences_;
  std::vector<int64_t> first_block_;
  std::vector<Buffer> memory_;  // of lists and counts
  DeviceMatrix q_;
  DeviceKv kv_;
};

INSTANTIATE_TEST_SUITE_P(HeadDim, CudaAttentionBatchTest, ::testing::Values(64, 128));

TEST_P(CudaAttentionBatchTest, DenseSequencesOfAllKinds) {
  Make({8, 2, GetParam()},
       {{0, 300}, {77, 51}, {1024, 700}, {0, 1}, {128, 128}, {0, 2049}, {127, 1}, {5, 256}});
  ExpectTheSameAlone();
}

TEST_P(CudaAttentionBatchTest, SelectedAndDenseSequences) {
  Make({7, 1, GetParam()}, {{0, 1500}, {1024, 700}, {0, 130}, {256, 1}, {300, 900}});
  KeepBlocks(sequences_[0], 3);
  KeepBlocks(sequences_[1], 2);
  KeepBlocks(sequences_[3], 5);
  ExpectTheSameAlone();
}

// Dense sequences add what they come to, each to its own counts; selected ones nothing.
TEST_P(CudaAttentionBatchTest, CountsTheBlocksOfDenseSequences) {
  Make({8, 2, GetParam()}, {{0, 300}, {77, 51}, {1024, 700}});
  KeepBlocks(sequences_[2], 3);
  std::vector<Buffer> counts;
  for (AttendedSequence& sequence : sequences_) {
    counts.push_back(NewCounts(*backend_));
    sequence.counts = static_cast<BlockCounts*>(counts.back().data());
  }
  sequences_[2].counts = nullptr;
  Run(sequences_);
  Run(sequences_);
  const uint64_t expected[] = {2 * 8 * (1 + 2 + 3), 2 * 8 * 1, 0};
  for (size_t i = 0; i < counts.size(); ++i) {
    const BlockCounts got = GetCounts(*backend_, counts[i]);
    EXPECT_EQ(got.executed_blocks, expected[i]) << i;
    EXPECT_EQ(got.causal_blocks, expected[i]) << i;
    EXPECT_EQ(got.dense_fallbacks, 0) << i;
  }
}

TEST_P(CudaAttentionBatchTest, AsManySequencesAsALaunchTakes) {
  std::vector<Shape> shapes;
  for (int64_t i = 0; i < cuda::kMaxSequences; ++i) shapes.push_back({i * 128, 64 + i});
  Make({4, 2, GetParam()}, shapes);
  ExpectTheSameAlone();
  AttentionParams params{};
  params.kv = kv_.view;
  params.sequences = sequences_.data();
  for (const int refused : {0, cuda::kMaxSequences + 1}) {
    params.num_sequences = refused;
    EXPECT_EQ(cuda::LaunchAttention(params, nullptr), cudaErrorInvalidValue) << refused;
  }
}

}  // namespace
}  // namespace headstart::testing
