// Every part of the KV, on any number of streams, to every kind of memory.
#include <gtest/gtest.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "client/kv_assembly.h"
#include "client/prefill_client.h"
#include "tests/client/kv_stream.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::KvStream;
using testing::KvStreamSpec;
using testing::ReceiveInTurns;

// Memory of a destination, and where the format says that its elements lie.
class Memory {
 public:
  // page_tokens 0: contiguous.
  Memory(const KvShape& shape, PageLayout layout, int64_t page_tokens) : shape_(shape) {
    if (page_tokens == 0) {
      bytes_.resize(shape.total_bytes());
      destination_ = *ContiguousKv(shape, absl::MakeSpan(bytes_));
      return;
    }
    // A table over the whole prompt, pages in disorder with gaps in between.
    const int64_t num_pages = (shape.token_end() - 1) / page_tokens + 1;
    destination_.page_tokens = page_tokens;
    destination_.strides = PackedStrides(shape, layout, page_tokens);
    for (int64_t i = 0; i < num_pages; ++i)
      destination_.page_table.push_back(static_cast<int32_t>(2 * (num_pages - 1 - i) + 1));
    destination_.plane_bytes = 2 * num_pages * destination_.strides.page;
    bytes_.resize(2 * shape.num_layers * destination_.plane_bytes);
    for (int64_t l = 0; l < shape.num_layers; ++l) {
      std::byte* k = bytes_.data() + 2 * l * destination_.plane_bytes;
      destination_.layers.push_back({k, k + destination_.plane_bytes});
    }
  }

  const KvDestination& destination() const { return destination_; }

  // [layer][K, V][kv_heads][tokens][head_dim], row by row.
  std::vector<std::byte> ReadBack() const {
    const KvDestination& d = destination_;
    std::vector<std::byte> read;
    for (int64_t l = 0; l < shape_.num_layers; ++l) {
      for (const std::byte* plane : {d.layers[l].k, d.layers[l].v}) {
        for (int64_t h = 0; h < shape_.num_kv_heads; ++h) {
          for (int64_t t = shape_.token_begin; t < shape_.token_end(); ++t) {
            const int64_t at = t - d.token_begin;
            const std::byte* row = plane + d.page_table[at / d.page_tokens] * d.strides.page +
                                   h * d.strides.head + at % d.page_tokens * d.strides.token;
            read.insert(read.end(), row, row + shape_.row_bytes());
          }
        }
      }
    }
    return read;
  }

  int64_t NumZeros() const { return std::count(bytes_.begin(), bytes_.end(), std::byte{0}); }
  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }

 private:
  const KvShape shape_;
  std::vector<std::byte> bytes_;
  KvDestination destination_;
};

// skip_tokens, stripes, ranks
using Way = std::tuple<int, int, int>;

class EveryWayTest : public ::testing::TestWithParam<Way> {};

// A prompt of 3 blocks of 128 tokens and a part, in chunks of up to two pages, to every memory; by
// ranks of heads, and by halves of the layers.
TEST_P(EveryWayTest, EveryByteComesToItsPlaceAndNoOtherIsTouched) {
  const auto [skip_tokens, stripes, ranks] = GetParam();
  KvStreamSpec spec{.num_layers = 2,
                    .num_kv_heads = 4,
                    .head_dim = 2,
                    .num_tokens = 413,
                    .block_tokens = 128,
                    .chunk_tokens = 256,
                    .pass_tokens = 256};
  spec.skip_tokens = static_cast<uint32_t>(skip_tokens);
  std::vector<std::byte> kv = MakeKv(spec);
  for (std::byte& byte : kv) byte |= std::byte{1};  // zero is what nobody wrote
  std::vector<v1::KvPart> parts(ranks + 2);
  for (int r = 0; r < ranks; ++r) {
    parts[r].set_kv_head_begin(r * 4 / ranks);
    parts[r].set_kv_head_count(4 / ranks);
  }
  parts[ranks].set_layer_count(1);
  parts[ranks + 1].set_layer_begin(1);
  for (const v1::KvPart& part : parts) {
    const KvShape shape = ShapeOf(spec, part);
    const std::vector<std::byte> expected = PartOf(spec, kv, part);
    std::vector<KvStream> streams;
    for (const v1::KvPart& stripe : StripesOf(part, stripes))
      streams.push_back(MakeFetchStream(spec, kv, stripe));
    for (const PageLayout layout : {PageLayout::kHnd, PageLayout::kNhd}) {
      for (const int64_t page_tokens : {0, 16, 64, 128, 256}) {
        Memory memory(shape, layout, page_tokens);
        KvReceiverOptions options;
        options.expected.skip_tokens = skip_tokens;
        options.on_manifest = [&](const v1::KvManifest&, const KvShape& promised) {
          EXPECT_EQ(promised.total_bytes(), shape.total_bytes());
          return memory.destination();
        };
        KvAssembly assembly(options, part);
        ASSERT_OK(ReceiveInTurns(streams, &assembly)) << page_tokens;
        EXPECT_TRUE(memory.ReadBack() == expected) << page_tokens;
        EXPECT_EQ(memory.NumZeros(), memory.size() - shape.total_bytes()) << page_tokens;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(SkipStripesRanks, EveryWayTest,
                         ::testing::Combine(::testing::Values(0, 128, 200, 412),
                                            ::testing::Values(1, 2, 3, 8),
                                            ::testing::Values(1, 2, 4)));

}  // namespace
}  // namespace headstart
