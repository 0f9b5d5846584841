// Several sequences in one call: each gets the bits that it gets alone, and rows of none are left
// alone.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

constexpr HeadShape kHeads{8, 2, 64};
constexpr int64_t kQCols = 8 * 64;
// Rows that belong to no sequence, before each of them.
constexpr int64_t kGap = 3;

struct Shape {
  int64_t first_position, num_rows;
  bool sparse = false;
  bool ends_prompt = false;
};

std::vector<std::byte> BytesOf(Backend& backend, const Buffer& buffer) {
  std::vector<std::byte> bytes(static_cast<size_t>(buffer.bytes()));
  EXPECT_OK(backend.Download(buffer.data(), buffer.bytes(), bytes.data()));
  return bytes;
}

class SequencesTest : public BackendTest, public ::testing::WithParamInterface<BackendCase> {
 protected:
  void SetUp() override {
    Open(GetParam());
    if (IsSkipped()) return;
    options_.enabled = true;
    options_.num_proxies = 8;
    options_.stride = 16;
    options_.gamma = 0.6f;
    options_.floor_tokens = 0;
    options_.dense_below_tokens = 600;
    options_.dense_tail_blocks = 1;
    options_.dense_above_density = 1;
  }

  // The sequences one behind the other in the matrices, in the page table and in the pages.
  void Place(const std::vector<Shape>& shapes) {
    shapes_ = shapes;
    int64_t blocks = 0;
    for (const Shape& shape : shapes_) {
      first_block_.push_back(blocks);
      blocks += NumBlocks(shape.first_position + shape.num_rows);
      num_rows_ += kGap + shape.num_rows;
    }
    const HostMatrix k = RandomMatrix(blocks * kBlockTokens, 2 * 64, 2, dtype());
    const HostMatrix v = RandomMatrix(blocks * kBlockTokens, 2 * 64, 3, dtype());
    kv_ = PutKv({k, v}, kHeads, blocks * kBlockTokens);
    int64_t row = 0;
    for (size_t i = 0; i < shapes_.size(); ++i) {
      row += kGap;
      rows_.push_back(
          {row, shapes_[i].num_rows, shapes_[i].first_position, kv_.table() + first_block_[i]});
      row += shapes_[i].num_rows;
    }
  }

  // What Attention leaves: its output, and of each sequence the counts and the ratios.
  struct Attended {
    DeviceMatrix out;
    std::vector<Buffer> counts, ratios;
  };
  // The sequences of `indices` in one call.
  Attended Attend(const DeviceMatrix& q, const std::vector<size_t>& indices) {
    Attended result{NewMatrix(num_rows_, kQCols, dtype()), {}, {}};
    std::vector<AttentionSequence> sequences;
    for (const size_t i : indices) {
      result.counts.push_back(NewCounts(*backend_));
      result.ratios.push_back(PutFloats(*backend_, std::vector<float>(8)));
      AttentionSequence sequence;
      sequence.rows = rows_[i];
      sequence.proxy_attn = shapes_[i].sparse ? &options_ : nullptr;
      sequence.ends_prompt = shapes_[i].ends_prompt;
      sequence.budget_ratio = static_cast<float*>(result.ratios.back().data());
      sequence.counts = static_cast<BlockCounts*>(result.counts.back().data());
      sequences.push_back(sequence);
    }
    EXPECT_OK(backend_->Attention({q.view, result.out.view, kv_.view, sequences}));
    return result;
  }
  std::vector<size_t> All() const {
    std::vector<size_t> all(shapes_.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    return all;
  }
  // The bytes of a matrix's rows of one sequence.
  std::vector<std::byte> RowsOf(const DeviceMatrix& matrix, const SequenceRows& rows) {
    const Matrix part = matrix.view.Rows(rows.first_row, rows.num_rows);
    std::vector<std::byte> bytes(
        static_cast<size_t>(part.rows * part.row_stride * DTypeBytes(part.dtype)));
    EXPECT_OK(backend_->Download(part.data, static_cast<int64_t>(bytes.size()), bytes.data()));
    return bytes;
  }

  ProxyAttnOptions options_;
  std::vector<Shape> shapes_;
  std::vector<SequenceRows> rows_;
  std::vector<int64_t> first_block_;
  int64_t num_rows_ = 0;
  DeviceKv kv_;
};

INSTANTIATE_TEST_SUITE_P(All, SequencesTest, ::testing::ValuesIn(BackendsUnderTest()),
                         [](const auto& info) { return NameOf(info.param); });

TEST_P(SequencesTest, AttentionGivesEachWhatItGetsAlone) {
  Place({{0, 300},
         {0, 700, true, true},  // sparse
         {77, 51},              // within a block
         {1024, 500, true},     // sparse, behind earlier pieces
         {1000, 1},             // a decode's token
         {0, 400, true, true},  // dense by rule
         {512, 3, true, true},  // dense by rule, few rows
         {1280, 130, true, true}});
  const DeviceMatrix q = Put(RandomMatrix(num_rows_, kQCols, 1, dtype(), 3), dtype());
  const Attended together = Attend(q, All());
  for (size_t i = 0; i < shapes_.size(); ++i) {
    SCOPED_TRACE(i);
    const Attended alone = Attend(q, {i});
    EXPECT_EQ(RowsOf(together.out, rows_[i]), RowsOf(alone.out, rows_[i]));
    EXPECT_EQ(BytesOf(*backend_, together.counts[i]), BytesOf(*backend_, alone.counts[0]));
    EXPECT_EQ(BytesOf(*backend_, together.ratios[i]), BytesOf(*backend_, alone.ratios[0]));
    const HostMatrix out =
        Get(together.out.view.Rows(rows_[i].first_row - kGap, kGap + rows_[i].num_rows));
    for (int64_t r = 0; r < out.rows; ++r) {
      ASSERT_EQ(std::isnan(out.Row(r)[0]), r < kGap) << "row " << r;
    }
    const BlockCounts counts = GetCounts(*backend_, together.counts[i]);
    EXPECT_GT(counts.executed_blocks, 0);
    const int64_t end = rows_[i].first_position + rows_[i].num_rows;
    const bool is_sparse = shapes_[i].sparse && end > options_.dense_below_tokens;
    EXPECT_EQ(counts.executed_blocks < counts.causal_blocks, is_sparse);
  }
}

// More than the kernels take in one launch.
TEST_P(SequencesTest, AnyNumberOfThem) {
  std::vector<Shape> shapes;
  for (int64_t i = 0; i < 37; ++i) shapes.push_back({i * 5, 1 + i % 7});
  Place(shapes);
  const DeviceMatrix q = Put(RandomMatrix(num_rows_, kQCols, 1, dtype()), dtype());
  const Attended together = Attend(q, All());
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const Attended alone = Attend(q, {i});
    ASSERT_EQ(RowsOf(together.out, rows_[i]), RowsOf(alone.out, rows_[i])) << i;
  }
  ASSERT_OK(backend_->Attention({q.view, q.view, kv_.view, {}}));
}

TEST_P(SequencesTest, RopeGivesEachWhatItGetsAlone) {
  std::vector<Shape> shapes = {{0, 300}, {127, 2}, {640, 1}, {5, 260}};
  for (int64_t i = 0; i < 20; ++i) shapes.push_back({i * 31, 1 + i});
  Place(shapes);
  std::vector<float> inv_freq;
  for (int i = 0; i < 32; ++i) inv_freq.push_back(std::pow(1e4f, -static_cast<float>(i) / 32));
  auto rope = backend_->PrepareRope(inv_freq, 1.0f, 1024);
  ASSERT_OK(rope);
  const HostMatrix values = RandomMatrix(num_rows_, kHeads.qkv_cols(), 1, dtype());
  const auto run = [&](const DeviceMatrix& qkv, const std::vector<size_t>& indices) {
    std::vector<RopeSequence> sequences;
    for (const size_t i : indices) sequences.push_back({rows_[i], nullptr});
    RopeArgs args;
    args.qkv = qkv.view;
    args.sequences = sequences;
    args.rope = rope->get();
    args.kv = kv_.view;
    ASSERT_OK(backend_->RopeAndStoreKv(args));
  };
  const std::vector<std::byte> before = BytesOf(*backend_, kv_.pages);
  const DeviceMatrix together = Put(values, dtype());
  ASSERT_NO_FATAL_FAILURE(run(together, All()));
  const std::vector<std::byte> pages = BytesOf(*backend_, kv_.pages);
  EXPECT_NE(pages, before);
  ASSERT_OK(backend_->Upload(before.data(), kv_.pages.bytes(), kv_.pages.data()));
  const DeviceMatrix alone = Put(values, dtype());
  for (size_t i = 0; i < shapes_.size(); ++i) ASSERT_NO_FATAL_FAILURE(run(alone, {i}));
  EXPECT_EQ(BytesOf(*backend_, kv_.pages), pages);
  const Matrix q = together.view.Cols(0, kQCols);
  EXPECT_EQ(Get(q).values, Get(alone.view.Cols(0, kQCols)).values);
  // Rows between them are what they were.
  const HostMatrix got = Get(q);
  for (const SequenceRows& rows : rows_) {
    for (int64_t r = rows.first_row - kGap; r < rows.first_row; ++r) {
      ASSERT_TRUE(std::equal(got.Row(r), got.Row(r) + kQCols, values.Row(r))) << "row " << r;
    }
  }
}

// The flag of a sequence is set by its own K and V, stays, and may be left out.
TEST_P(SequencesTest, FlagsTheSequenceWithAValueThatIsNotFinite) {
  Place({{0, 200}, {128, 77}, {10, 3}});
  const std::vector<float> inv_freq(32, 0.1f);
  auto rope = backend_->PrepareRope(inv_freq, 1.0f, 256);
  ASSERT_OK(rope);
  const float infinity = std::numeric_limits<float>::infinity();
  struct Bad {
    int64_t row, col;
    float value;
    bool is_kv;
  };
  const int64_t middle = rows_[1].first_row;
  const int64_t k = kQCols, v = kQCols + 2 * 64;
  const Bad cases[] = {{middle, k, infinity, true},
                       {middle + 76, k + 127, -infinity, true},
                       {middle + 5, v, std::nanf(""), true},
                       {middle + 76, v + 127, infinity, true},
                       {middle + 3, 9, infinity, false},            // of a query
                       {middle - 1, v + 1, std::nanf(""), false}};  // of no sequence
  for (const Bad& bad : cases) {
    SCOPED_TRACE(::testing::Message() << "row " << bad.row << ", column " << bad.col);
    HostMatrix values = RandomMatrix(num_rows_, kHeads.qkv_cols(), 1, dtype());
    values.Row(bad.row)[bad.col] = bad.value;
    const DeviceMatrix qkv = Put(values, dtype());
    const Buffer flags = PutFloats(*backend_, std::vector<float>(3));
    auto* const flag = static_cast<uint32_t*>(flags.data());
    const RopeSequence sequences[] = {{rows_[0], flag}, {rows_[1], flag + 1}, {rows_[2], flag + 2}};
    const RopeSequence silent[] = {{rows_[1], nullptr}};
    RopeArgs args;
    args.qkv = qkv.view;
    args.rope = rope->get();
    args.kv = kv_.view;
    args.sequences = sequences;
    ASSERT_OK(backend_->RopeAndStoreKv(args));
    args.sequences = silent;
    ASSERT_OK(backend_->RopeAndStoreKv(args));
    uint32_t got[3];
    ASSERT_OK(backend_->Download(flag, sizeof(got), got));
    EXPECT_THAT(got, ::testing::ElementsAre(0, bad.is_kv ? 1 : 0, 0));
    // What is fine afterwards clears nothing.
    const DeviceMatrix fine = Put(RandomMatrix(num_rows_, kHeads.qkv_cols(), 1, dtype()), dtype());
    args.qkv = fine.view;
    args.sequences = sequences;
    ASSERT_OK(backend_->RopeAndStoreKv(args));
    ASSERT_OK(backend_->Download(flag, sizeof(got), got));
    EXPECT_THAT(got, ::testing::ElementsAre(0, bad.is_kv ? 1 : 0, 0));
  }
}

TEST_P(SequencesTest, RefusesRowsOutOfPlace) {
  Place({{0, 20}, {0, 30}});
  const DeviceMatrix q = Put(RandomMatrix(num_rows_, kQCols, 1, dtype()), dtype());
  const DeviceMatrix out = NewMatrix(num_rows_, kQCols, dtype());
  const auto refuses = [&](const std::vector<SequenceRows>& all, const std::string& message) {
    std::vector<AttentionSequence> sequences(all.size());
    for (size_t i = 0; i < all.size(); ++i) sequences[i].rows = all[i];
    EXPECT_THAT(backend_->Attention({q.view, out.view, kv_.view, sequences}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  const int32_t* table = kv_.table();
  refuses({{0, 0, 0, table}}, "0 rows");
  refuses({{-1, 3, 0, table}}, "from row -1");
  refuses({{num_rows_ - 2, 3, 0, table}}, "within the matrix");
  refuses({{5, 3, 0, table}, {7, 3, 0, table}}, "behind the sequence before (row 8)");
  refuses({{0, 3, -128, table}}, "first_position=-128");
  refuses({{0, 3, 0, nullptr}}, "page table");
}

}  // namespace
}  // namespace headstart::testing
