#include "client/kv_destination.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

constexpr KvShape kShape{.num_layers = 2,
                         .num_kv_heads = 3,
                         .head_dim = 2,
                         .num_tokens = 10,
                         .element_bytes = 2,
                         .block_tokens = 4};
constexpr int64_t kPageTokens = 4;
constexpr int64_t kNumPages = 6;

// One layer's pages of K and of V, and the destination that fills them.
struct PagedMemory {
  explicit PagedMemory(PageLayout layout) {
    const int64_t bytes = kNumPages * PackedStrides(kShape, layout, kPageTokens).page;
    for (int64_t l = 0; l < 2 * kShape.num_layers; ++l) planes.emplace_back(bytes, std::byte{0});
    destination = {
        .layers = {{planes[0].data(), planes[1].data()}, {planes[2].data(), planes[3].data()}},
        .plane_bytes = bytes,
        .page_tokens = kPageTokens,
        .page_table = {5, 0, 3},
        .strides = PackedStrides(kShape, layout, kPageTokens)};
  }
  std::vector<std::vector<std::byte>> planes;
  KvDestination destination;
};

// A value that tells everything about its place.
uint16_t Value(int64_t layer, int64_t plane, int64_t head, int64_t token, int64_t i) {
  return static_cast<uint16_t>(1 + i + 2 * (token + 10 * (head + 3 * (plane + 2 * layer))));
}

// K and V of the tokens of one page, or of any others: each [heads][tokens][head_dim].
std::string PageData(const KvRange& range) {
  std::string data;
  for (int64_t plane = 0; plane < 2; ++plane) {
    for (int64_t h = 0; h < kShape.num_kv_heads; ++h) {
      for (int64_t t = range.token_begin; t < range.token_end(); ++t) {
        for (int64_t i = 0; i < kShape.head_dim; ++i) {
          const uint16_t value = Value(range.layer, plane, h, t, i);
          data.append(reinterpret_cast<const char*>(&value), sizeof(value));
        }
      }
    }
  }
  return data;
}

// Writes the whole prompt in chunks of `pages` pages, each in pieces of `piece_bytes`.
void WriteAll(const KvDestination& destination, int64_t pages, size_t piece_bytes) {
  ASSERT_OK(CheckDestination(destination, kShape));
  const int64_t block = kShape.block_tokens;
  for (int64_t layer = 0; layer < kShape.num_layers; ++layer) {
    for (int64_t begin = 0; begin < kShape.num_tokens; begin += pages * block) {
      const int64_t end = std::min(begin + pages * block, kShape.num_tokens);
      std::string data;
      for (int64_t page = begin; page < end; page += block)
        data += PageData({layer, page, std::min(block, end - page)});
      ChunkScatter scatter(destination, kShape, {layer, begin, end - begin});
      for (size_t at = 0; at < data.size(); at += piece_bytes)
        scatter.Write(data.substr(at, piece_bytes));
    }
  }
}

// Where the header says that an element lies.
uint16_t ReadBack(const KvDestination& d, int64_t layer, int64_t plane, int64_t head, int64_t token,
                  int64_t i) {
  const std::byte* base = plane == 0 ? d.layers[layer].k : d.layers[layer].v;
  uint16_t value;
  std::memcpy(&value,
              base + d.page_table[token / d.page_tokens] * d.strides.page + head * d.strides.head +
                  (token % d.page_tokens) * d.strides.token + i * 2,
              sizeof(value));
  return value;
}

void ExpectAllInPlace(const KvDestination& destination) {
  for (int64_t layer = 0; layer < kShape.num_layers; ++layer) {
    for (int64_t plane = 0; plane < 2; ++plane) {
      for (int64_t h = 0; h < kShape.num_kv_heads; ++h) {
        for (int64_t t = 0; t < kShape.num_tokens; ++t) {
          for (int64_t i = 0; i < kShape.head_dim; ++i) {
            ASSERT_EQ(ReadBack(destination, layer, plane, h, t, i), Value(layer, plane, h, t, i))
                << layer << " " << plane << " " << h << " " << t << " " << i;
          }
        }
      }
    }
  }
}

TEST(KvDestinationTest, ContiguousIsLayerPlaneHeadTokenElement) {
  std::vector<std::byte> memory(kShape.total_bytes());
  ASSERT_OK_AND_ASSIGN(const KvDestination destination,
                       ContiguousKv(kShape, absl::MakeSpan(memory)));
  WriteAll(destination, 3, 1000);
  ExpectAllInPlace(destination);
  std::string expected;
  for (int64_t layer = 0; layer < 2; ++layer) expected += PageData({layer, 0, 10});
  EXPECT_EQ(absl::string_view(reinterpret_cast<const char*>(memory.data()), memory.size()),
            expected);
}

TEST(KvDestinationTest, PagesFollowTheTableInBothLayouts) {
  for (const PageLayout layout : {PageLayout::kHnd, PageLayout::kNhd}) {
    PagedMemory memory(layout);
    WriteAll(memory.destination, 3, 1000);
    ExpectAllInPlace(memory.destination);
    for (const std::vector<std::byte>& plane : memory.planes) {
      const int64_t page_bytes = memory.destination.strides.page;
      for (const int64_t unused : {1, 2, 4}) {
        for (int64_t i = 0; i < page_bytes; ++i)
          ASSERT_EQ(plane[unused * page_bytes + i], std::byte{0});
      }
    }
  }
}

TEST(KvDestinationTest, PiecesAndChunksMayBeOfAnySize) {
  for (const size_t piece : {1, 3, 7, 50}) {
    for (const int64_t pages : {1, 2, 3}) {
      PagedMemory memory(PageLayout::kNhd);
      WriteAll(memory.destination, pages, piece);
      ExpectAllInPlace(memory.destination);
    }
  }
}

// [num_pages, heads, page_tokens, 2 * dim]: K and V of a token side by side.
TEST(KvDestinationTest, KeysAndValuesMayBeInterleaved) {
  const int64_t row = 2 * kShape.row_bytes();
  const int64_t page = kShape.num_kv_heads * kPageTokens * row;
  std::vector<std::byte> memory(kShape.num_layers * kNumPages * page);
  KvDestination destination{.layers = {},
                            .plane_bytes = kNumPages * page - kShape.row_bytes(),
                            .page_tokens = kPageTokens,
                            .page_table = {5, 0, 3},
                            .strides = {.page = page, .head = kPageTokens * row, .token = row}};
  for (int64_t l = 0; l < kShape.num_layers; ++l) {
    std::byte* k = memory.data() + l * kNumPages * page;
    destination.layers.push_back({k, k + kShape.row_bytes()});
  }
  WriteAll(destination, 3, 5);
  ExpectAllInPlace(destination);
}

class BadDestinationTest : public ::testing::Test {
 protected:
  void ExpectRefused(const std::string& what) {
    EXPECT_THAT(CheckDestination(memory_.destination, kShape),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what)));
  }
  PagedMemory memory_{PageLayout::kHnd};
  KvDestination& destination_ = memory_.destination;
};

TEST_F(BadDestinationTest, AcceptsTheUntouchedOne) {
  EXPECT_OK(CheckDestination(destination_, kShape));
}

TEST_F(BadDestinationTest, RefusesAPageBehindTheMemory) {
  destination_.page_table[1] = kNumPages;
  ExpectRefused("plane_bytes");
}

TEST_F(BadDestinationTest, RefusesOneByteTooFew) {
  --destination_.plane_bytes;
  ExpectRefused("plane_bytes");
}

TEST_F(BadDestinationTest, RefusesAPageUsedTwice) {
  destination_.page_table[2] = 5;
  ExpectRefused("twice");
}

TEST_F(BadDestinationTest, RefusesANegativePage) {
  destination_.page_table[0] = -1;
  ExpectRefused("negative");
}

TEST_F(BadDestinationTest, RefusesTooFewPages) {
  destination_.page_table.pop_back();
  ExpectRefused("page_table has 2");
}

TEST_F(BadDestinationTest, RefusesMissingLayers) {
  destination_.layers.pop_back();
  ExpectRefused("layers has 1");
}

TEST_F(BadDestinationTest, RefusesALayerWithoutMemory) {
  destination_.layers[1].v = nullptr;
  ExpectRefused("no memory");
}

TEST_F(BadDestinationTest, RefusesStridesSmallerThanARow) {
  destination_.strides.token = kShape.row_bytes() - 1;
  ExpectRefused("strides");
}

TEST_F(BadDestinationTest, RefusesStridesThatWouldOverflow) {
  destination_.strides.page = INT64_MAX / 2;
  ExpectRefused("plane_bytes");
}

TEST_F(BadDestinationTest, RefusesToBeginBehindTheFirstTokenThatComes) {
  destination_.token_begin = 1;
  ExpectRefused("token_begin=1");
}

// Pages of tokens that do not come may hold anything, others' KV too.
TEST_F(BadDestinationTest, DoesNotLookAtPagesOfSkippedTokens) {
  KvShape suffix = kShape;
  suffix.token_begin = 5;
  suffix.num_tokens = 5;
  destination_.page_table[0] = -1;
  EXPECT_OK(CheckDestination(destination_, suffix));
  destination_.page_table[1] = -1;
  EXPECT_THAT(CheckDestination(destination_, suffix),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("page_table[1]")));
}

TEST(KvDestinationTest, ContiguousWantsExactlyTheRightSize) {
  std::vector<std::byte> memory(kShape.total_bytes() + 1);
  EXPECT_THAT(ContiguousKv(kShape, absl::MakeSpan(memory)),
              StatusIs(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace headstart
