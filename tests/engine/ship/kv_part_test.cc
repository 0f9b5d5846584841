#include "engine/ship/kv_part.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

// Four layers of two KV heads.
constexpr KvGeometry kPartGeometry = {.num_layers = 4,
                                      .heads = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 8}};

KvPart Layers(int32_t begin, int32_t count) {
  return {.layer_begin = begin, .layer_count = count, .head_count = 2};
}

KvPart Heads(int32_t begin, int32_t count) {
  return {.layer_count = 4, .head_begin = begin, .head_count = count};
}

KvPart PartOfStripe(KvPart part, int32_t index, int32_t count) {
  part.stripe_index = index;
  part.stripe_count = count;
  return part;
}

TEST(KvGeometryTest, CountsBytes) {
  EXPECT_EQ(kPartGeometry.token_bytes(), 2 * 2 * 8 * 2);
  EXPECT_EQ(kPartGeometry.page_bytes(), 128 * 64);
  EXPECT_EQ(ChunkPages(512 << 10), 2);
  EXPECT_EQ(ChunkPages(96 << 10), 10);
  EXPECT_EQ(ChunkPages(3 << 20), 1);
}

TEST(KvPartTest, WholeKvIsEverything) {
  const KvPart whole = WholeKv(kPartGeometry);
  EXPECT_OK(CheckPart(whole, kPartGeometry));
  EXPECT_OK(CheckCoverage({whole}, kPartGeometry));
  EXPECT_TRUE(whole.HasLayer(0));
  EXPECT_TRUE(whole.HasLayer(3));
  EXPECT_FALSE(whole.HasLayer(4));
  EXPECT_FALSE(Layers(1, 2).HasLayer(0));
  EXPECT_FALSE(Layers(1, 2).HasLayer(3));
}

TEST(KvPartTest, MustLieInsideTheModel) {
  EXPECT_OK(CheckPart(Layers(3, 1), kPartGeometry));
  for (const auto& [begin, count] : {std::pair{-1, 2}, {0, 0}, {0, 5}, {3, 2}, {4, 1}, {1, -1}}) {
    EXPECT_THAT(CheckPart(Layers(begin, count), kPartGeometry),
                StatusIs(kInvalid, HasSubstr("layer_begin=")));
  }
  EXPECT_OK(CheckPart(Heads(1, 1), kPartGeometry));
  for (const auto& [begin, count] : {std::pair{-1, 1}, {0, 0}, {0, 3}, {2, 1}}) {
    EXPECT_THAT(CheckPart(Heads(begin, count), kPartGeometry),
                StatusIs(kInvalid, HasSubstr("kv_head_begin=")));
  }
}

TEST(KvPartTest, StripeMustBeOneOfItsCount) {
  EXPECT_OK(CheckPart(PartOfStripe(WholeKv(kPartGeometry), 63, 64), kPartGeometry));
  for (const auto& [index, count] : {std::pair{1, 1}, {-1, 2}, {0, 0}, {0, -1}, {0, 65}}) {
    EXPECT_THAT(CheckPart(PartOfStripe(WholeKv(kPartGeometry), index, count), kPartGeometry),
                StatusIs(kInvalid, HasSubstr("stripe_index=")));
  }
}

TEST(CoverageTest, StripesHeadsAndLayersTogether) {
  const KvPart whole = WholeKv(kPartGeometry);
  EXPECT_OK(CheckCoverage({Heads(0, 1), Heads(1, 1)}, kPartGeometry));
  EXPECT_OK(CheckCoverage({Layers(0, 1), Layers(1, 3)}, kPartGeometry));
  EXPECT_OK(CheckCoverage(
      {PartOfStripe(whole, 2, 3), PartOfStripe(whole, 0, 3), PartOfStripe(whole, 1, 3)},
      kPartGeometry));
  EXPECT_OK(
      CheckCoverage({PartOfStripe(Heads(0, 1), 0, 2), PartOfStripe(Heads(0, 1), 1, 2), Heads(1, 1)},
                    kPartGeometry));
  EXPECT_OK(CheckCoverage(
      {PartOfStripe(Layers(0, 2), 0, 2), PartOfStripe(Layers(0, 2), 1, 2), Layers(1, 3)},
      kPartGeometry));
}

TEST(CoverageTest, NamesTheGap) {
  const KvPart whole = WholeKv(kPartGeometry);
  const auto gap = [](std::vector<KvPart> readers) {
    return CheckCoverage(readers, kPartGeometry);
  };
  EXPECT_THAT(gap({}), StatusIs(kInvalid, HasSubstr("layer 0, KV head 0")));
  EXPECT_THAT(gap({Heads(0, 1)}), StatusIs(kInvalid, HasSubstr("layer 0, KV head 1")));
  EXPECT_THAT(gap({Layers(0, 2), Layers(3, 1)}),
              StatusIs(kInvalid, HasSubstr("layer 2, KV head 0")));
  EXPECT_THAT(gap({PartOfStripe(whole, 0, 3), PartOfStripe(whole, 2, 3)}),
              StatusIs(kInvalid, HasSubstr("layer 0, KV head 0")));
  EXPECT_THAT(gap({PartOfStripe(whole, 1, 2)}),
              StatusIs(kInvalid, HasSubstr("layer 0, KV head 0")));
  // Stripes of one count only, and of the same layers: others number chunks otherwise.
  EXPECT_THAT(
      gap({PartOfStripe(whole, 0, 2), PartOfStripe(whole, 1, 4), PartOfStripe(whole, 3, 4)}),
      StatusIs(kInvalid));
  EXPECT_THAT(gap({PartOfStripe(whole, 0, 2), PartOfStripe(Layers(0, 2), 1, 2),
                   PartOfStripe(Layers(2, 2), 1, 2)}),
              StatusIs(kInvalid));
  // A head is whole only where every stripe has it.
  EXPECT_THAT(gap({PartOfStripe(whole, 0, 2), PartOfStripe(Heads(0, 1), 1, 2)}),
              StatusIs(kInvalid, HasSubstr("KV head 1")));
}

TEST(CoverageTest, EveryReaderMustBeGood) {
  EXPECT_THAT(CheckCoverage({WholeKv(kPartGeometry), Layers(4, 1)}, kPartGeometry),
              StatusIs(kInvalid, HasSubstr("layer_begin=4")));
  EXPECT_THAT(CheckCoverage({Heads(0, 1), Heads(1, 1), Heads(0, 1)}, kPartGeometry),
              StatusIs(kInvalid, HasSubstr("readers[2] is the same part as readers[0]")));
  const std::vector<KvPart> many(65, WholeKv(kPartGeometry));
  EXPECT_THAT(CheckCoverage(many, kPartGeometry),
              StatusIs(kInvalid, HasSubstr("65 parts, limit 64")));
}

std::vector<std::pair<int64_t, int64_t>> Cut(int64_t first, int64_t count, int64_t skip,
                                             int64_t chunk_pages) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const TokenRange& range : CutIntoChunks(first, count, skip, chunk_pages)) {
    ranges.emplace_back(range.begin, range.count);
  }
  return ranges;
}

TEST(CutIntoChunksTest, EndsMayBeRagged) {
  using Ranges = std::vector<std::pair<int64_t, int64_t>>;
  EXPECT_EQ(Cut(0, 512, 0, 2), (Ranges{{0, 256}, {256, 256}}));
  EXPECT_EQ(Cut(0, 300, 0, 2), (Ranges{{0, 256}, {256, 44}}));
  EXPECT_EQ(Cut(0, 1, 0, 2), (Ranges{{0, 1}}));
  EXPECT_EQ(Cut(512, 300, 0, 1), (Ranges{{512, 128}, {640, 128}, {768, 44}}));
}

TEST(CutIntoChunksTest, LeavesOutWhatIsSkipped) {
  using Ranges = std::vector<std::pair<int64_t, int64_t>>;
  EXPECT_EQ(Cut(0, 512, 256, 2), (Ranges{{256, 256}}));
  EXPECT_EQ(Cut(0, 512, 100, 2), (Ranges{{100, 156}, {256, 256}}));
  EXPECT_EQ(Cut(0, 300, 299, 2), (Ranges{{299, 1}}));
  EXPECT_THAT(Cut(0, 512, 512, 2), IsEmpty());
  EXPECT_THAT(Cut(512, 512, 2000, 2), IsEmpty());
}

// Whatever the lengths: the chunks of all pieces are [skip, end) once and in order, none crosses a
// border of a piece or has more than its pages.
TEST(CutIntoChunksTest, TogetherTheyAreAllTokensOnce) {
  constexpr int64_t kPieceTokens = 4 * kBlockTokens;
  for (const int64_t chunk_pages : {1, 2, 3, 4, 7}) {
    for (int64_t num_tokens = 1; num_tokens < 3 * kPieceTokens; num_tokens += 61) {
      for (int64_t skip = 0; skip <= num_tokens; skip += 97) {
        int64_t next = skip;
        for (int64_t first = 0; first < num_tokens; first += kPieceTokens) {
          const int64_t end = std::min(first + kPieceTokens, num_tokens);
          for (const TokenRange& range : CutIntoChunks(first, end - first, skip, chunk_pages)) {
            ASSERT_EQ(range.begin, next);
            ASSERT_GT(range.count, 0);
            ASSERT_GE(range.begin, first);
            ASSERT_LE(range.begin + range.count, end);
            const int64_t last = range.begin + range.count - 1;
            ASSERT_EQ((range.begin - first) / (chunk_pages * kBlockTokens),
                      (last - first) / (chunk_pages * kBlockTokens));
            next = range.begin + range.count;
          }
        }
        ASSERT_EQ(next, num_tokens) << "skip " << skip << ", chunk_pages " << chunk_pages;
      }
    }
  }
}

}  // namespace
}  // namespace headstart
