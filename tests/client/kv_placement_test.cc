// Every part of the KV, on any number of streams, to every kind of memory.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "client/kv_assembly.h"
#include "client/prefill_client.h"
#include "kernels/base/dtype.h"
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
  Memory(const KvShape& sent, PageLayout layout, int64_t page_tokens,
         KvValues values = KvValues::kAsSent)
      : shape_(ShapeOfValues(sent, values)) {
    const KvShape& shape = shape_;
    if (values == KvValues::kAsSent) scales_.resize(sent.num_scales());
    if (page_tokens == 0) {
      bytes_.resize(shape.total_bytes());
      destination_ = *ContiguousKv(sent, absl::MakeSpan(bytes_), values);
      destination_.scales = absl::MakeSpan(scales_);
      return;
    }
    destination_.values = values;
    destination_.scales = absl::MakeSpan(scales_);
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

  const std::vector<float>& scales() const { return scales_; }
  int64_t NumZeros() const { return std::count(bytes_.begin(), bytes_.end(), std::byte{0}); }
  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }

 private:
  const KvShape shape_;
  std::vector<std::byte> bytes_;
  std::vector<float> scales_;
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

// ---- fp8

constexpr KvStreamSpec kFp8Spec{.num_layers = 2,
                                .num_kv_heads = 4,
                                .head_dim = 3,
                                .num_tokens = 413,
                                .block_tokens = 128,
                                .chunk_tokens = 256,
                                .pass_tokens = 256,
                                .dtype = v1::KV_DTYPE_FP8_E4M3};

// By the definition of OCP E4M3.
double NumberOf(std::byte byte) {
  const int bits = std::to_integer<int>(byte);
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double magnitude =
      exponent > 0 ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return bits < 128 ? magnitude : -magnitude;
}

// Calls visit(layer, page of the wire, plane, head) for every element of a part, in its order.
template <typename Visit>
void ForEachElement(const KvShape& shape, const v1::KvPart& part, const Visit& visit) {
  for (int64_t l = 0; l < shape.num_layers; ++l) {
    for (int64_t plane = 0; plane < 2; ++plane) {
      for (int64_t h = 0; h < shape.num_kv_heads; ++h) {
        for (int64_t t = shape.token_begin; t < shape.token_end(); ++t) {
          for (int64_t i = 0; i < shape.head_dim; ++i) {
            visit(part.layer_begin() + l, t / shape.block_tokens, plane, part.kv_head_begin() + h);
          }
        }
      }
    }
  }
}

// values, skip_tokens, stripes
class EveryFp8WayTest : public ::testing::TestWithParam<std::tuple<KvValues, int, int>> {
 protected:
  // The part as it should lie in memory.
  static std::vector<std::byte> Expected(const KvStreamSpec& spec, const std::vector<std::byte>& kv,
                                         const v1::KvPart& part, KvValues values) {
    const std::vector<std::byte> numbers = PartOf(spec, kv, part);
    if (values == KvValues::kAsSent) return numbers;
    std::vector<std::byte> bytes;
    size_t at = 0;
    ForEachElement(ShapeOf(spec, part), part, [&](int64_t l, int64_t page, int64_t k, int64_t h) {
      const auto number = static_cast<float>(NumberOf(numbers[at++]));
      const float product = number * ScaleOf(spec, l, page, k, h);
      const BFloat16 rounded(product);
      const auto* data = values == KvValues::kF32 ? reinterpret_cast<const std::byte*>(&product)
                                                  : reinterpret_cast<const std::byte*>(&rounded);
      bytes.insert(bytes.end(), data, data + (values == KvValues::kF32 ? 4 : 2));
    });
    return bytes;
  }
  static std::vector<float> ExpectedScales(const KvStreamSpec& spec, const v1::KvPart& part) {
    const KvShape shape = ShapeOf(spec, part);
    std::vector<float> scales;
    for (int64_t l = 0; l < shape.num_layers; ++l) {
      for (int64_t page = shape.token_begin / 128; page <= (shape.token_end() - 1) / 128; ++page) {
        for (int64_t plane = 0; plane < 2; ++plane) {
          for (int64_t h = 0; h < shape.num_kv_heads; ++h) {
            scales.push_back(
                ScaleOf(spec, part.layer_begin() + l, page, plane, part.kv_head_begin() + h));
          }
        }
      }
    }
    return scales;
  }
};

TEST_P(EveryFp8WayTest, EveryNumberComesToItsPlaceWithItsScale) {
  const auto [values, skip_tokens, stripes] = GetParam();
  KvStreamSpec spec = kFp8Spec;
  spec.skip_tokens = static_cast<uint32_t>(skip_tokens);
  std::vector<std::byte> kv = MakeKv(spec);
  for (std::byte& byte : kv) {
    if ((byte & std::byte{0x7f}) == std::byte{0x7f}) byte ^= std::byte{1};  // no NaN
  }
  std::vector<v1::KvPart> parts(3);
  parts[1].set_kv_head_begin(1);
  parts[1].set_kv_head_count(2);
  parts[2].set_layer_begin(1);
  for (const v1::KvPart& part : parts) {
    const KvShape shape = ShapeOf(spec, part);
    std::vector<KvStream> streams;
    for (const v1::KvPart& stripe : StripesOf(part, stripes))
      streams.push_back(MakeFetchStream(spec, kv, stripe));
    for (const PageLayout layout : {PageLayout::kHnd, PageLayout::kNhd}) {
      for (const int64_t page_tokens : {0, 16, 128, 256}) {
        Memory memory(shape, layout, page_tokens, values);
        KvReceiverOptions options;
        options.expected.skip_tokens = skip_tokens;
        options.on_manifest = [&](const v1::KvManifest&, const KvShape&) {
          return memory.destination();
        };
        KvAssembly assembly(options, part);
        ASSERT_OK(ReceiveInTurns(streams, &assembly)) << page_tokens;
        EXPECT_TRUE(memory.ReadBack() == Expected(spec, kv, part, values)) << page_tokens;
        if (values == KvValues::kAsSent) {
          EXPECT_EQ(memory.scales(), ExpectedScales(spec, part));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    ValuesSkipStripes, EveryFp8WayTest,
    ::testing::Combine(::testing::Values(KvValues::kAsSent, KvValues::kBF16, KvValues::kF32),
                       ::testing::Values(0, 128, 200, 412), ::testing::Values(1, 3)));

// The bytes of a chunk, cut anywhere, scales too.
TEST(Fp8PlacementTest, PiecesMayBeOfAnySize) {
  const KvShape shape = ShapeOf(kFp8Spec);
  const std::vector<std::byte> kv = MakeKv(kFp8Spec);
  const KvStream stream = MakeFetchStream(kFp8Spec, kv, {});
  Memory whole(shape, PageLayout::kNhd, 16, KvValues::kF32);
  for (const size_t piece : {100000, 1, 3, 7, 50}) {
    Memory memory(shape, PageLayout::kNhd, 16, KvValues::kF32);
    Memory& target = piece == 100000 ? whole : memory;
    ASSERT_OK(CheckDestination(target.destination(), shape));
    for (size_t m = 1; m + 1 < stream.size(); ++m) {
      const v1::KvChunk& chunk = stream[m].chunk();
      const KvRange range{chunk.layer(), chunk.token_begin(), chunk.token_count()};
      ChunkScatter scatter(target.destination(), shape, range);
      for (size_t at = 0; at < chunk.data().size(); at += piece)
        scatter.Write(absl::string_view(chunk.data()).substr(at, piece));
    }
    EXPECT_TRUE(target.ReadBack() == whole.ReadBack()) << piece;
  }
  EXPECT_GT(whole.size(), whole.NumZeros());
}

TEST(Fp8PlacementTest, RefusesMemoryThatDoesNotFit) {
  const KvShape shape = ShapeOf(kFp8Spec);
  const auto refuses = [](const KvDestination& destination, const KvShape& shape,
                          const std::string& what) {
    EXPECT_THAT(CheckDestination(destination, shape),
                testing::StatusIs(absl::StatusCode::kInvalidArgument, ::testing::HasSubstr(what)));
  };
  Memory sent(shape, PageLayout::kHnd, 128);
  EXPECT_OK(CheckDestination(sent.destination(), shape));
  KvDestination without_scales = sent.destination();
  without_scales.scales = {};
  refuses(without_scales, shape, "scales has 0 values, the KV 64");
  KvDestination too_small = sent.destination();
  too_small.values = KvValues::kBF16;
  refuses(too_small, shape, "can't hold rows of 6 bytes");
  KvStreamSpec bf16 = kFp8Spec;
  bf16.dtype = v1::KV_DTYPE_BF16;
  Memory of_bf16(ShapeOf(bf16), PageLayout::kHnd, 128);
  KvDestination multiplied = of_bf16.destination();
  multiplied.values = KvValues::kF32;
  refuses(multiplied, ShapeOf(bf16), "only fp8 is multiplied out");
}

}  // namespace
}  // namespace headstart
