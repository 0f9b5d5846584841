#include "server/rpc/chunk_frame.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/ship/host_pages.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {
namespace {

// CRC-32C bit by bit, as its definition has it.
uint32_t SlowCrc32c(const std::string& bytes) {
  uint32_t crc = 0xffffffffu;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) ? 0x82f63b78u : 0u);
  }
  return ~crc;
}

std::string LittleEndian(uint32_t value) {
  std::string bytes;
  for (int shift = 0; shift < 32; shift += 8) bytes.push_back(static_cast<char>(value >> shift));
  return bytes;
}

std::string SomeBytes(size_t count) {
  std::string bytes(count, '\0');
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<char>(i * 7 + i / 251);
  return bytes;
}

absl::Span<const std::byte> AsBytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

TEST(ChunkFrameTest, SlowCrcKnowsTheCheckValue) { EXPECT_EQ(SlowCrc32c("123456789"), 0xe3069283u); }

TEST(ChunkFrameTest, ChecksumCoversHeaderThenDataRunByRun) {
  const ChunkHeader header = {5, 1, 128, 64, 0, 3};
  const std::string data = SomeBytes(1000);
  std::string summed;
  for (const uint32_t field : {5, 1, 128, 64, 0, 3}) summed += LittleEndian(field);
  const uint32_t expected = SlowCrc32c(summed + data);
  const ByteRun whole = AsBytes(data);
  EXPECT_EQ(ChunkCrc32c(header, {whole}), expected);
  EXPECT_EQ(ChunkCrc32c(header, {whole.first(1), whole.subspan(1, 700), whole.subspan(701)}),
            expected);
}

TEST(ChunkFrameTest, ChecksumOfBytesIsTheStandardOne) {
  EXPECT_EQ(Crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(Crc32c(""), 0u);
}

// ---- the runs of a chunk

KvGeometry SomeGeometry(DType dtype) {
  return {.num_layers = 2,
          .heads = {.num_heads = 6, .num_kv_heads = 3, .head_dim = 16},
          .dtype = dtype,
          .chunk_pages = 4};
}

// One element after the other, as prefill.proto says it: pages, scales where the type has them, K
// and V, heads, tokens, elements.
std::string ReferenceData(const std::string& memory, const TokenRange& tokens, const KvPart& part,
                          const KvGeometry& geometry) {
  const int64_t element = DTypeBytes(geometry.dtype);
  const int64_t heads = geometry.heads.num_kv_heads, dim = geometry.heads.head_dim;
  const int64_t first_page = tokens.begin / kBlockTokens;
  const int64_t end = tokens.begin + tokens.count;
  const int64_t scales = geometry.dtype == DType::kF8E4M3 ? 2 * heads * 4 : 0;
  const int64_t page_bytes = scales + 2 * heads * kBlockTokens * dim * element;
  std::string data;
  const auto add = [&](int64_t place, int64_t bytes) {
    data += memory.substr(static_cast<size_t>(place), static_cast<size_t>(bytes));
  };
  const auto for_each_head = [&](const auto& visit) {
    for (int64_t plane = 0; plane < 2; ++plane) {
      for (int64_t head = part.head_begin; head < part.head_begin + part.head_count; ++head) {
        visit(plane * heads + head);
      }
    }
  };
  for (int64_t page = first_page; page * kBlockTokens < end; ++page) {
    const int64_t begin = (page - first_page) * page_bytes;
    if (scales > 0) for_each_head([&](int64_t head) { add(begin + head * 4, 4); });
    for_each_head([&](int64_t head) {
      for (int64_t slot = 0; slot < kBlockTokens; ++slot) {
        const int64_t token = page * kBlockTokens + slot;
        if (token < tokens.begin || token >= end) continue;
        for (int64_t i = 0; i < dim; ++i) {
          add(begin + scales + ((head * kBlockTokens + slot) * dim + i) * element, element);
        }
      }
    });
  }
  return data;
}

struct RunCase {
  TokenRange tokens;
  int32_t head_begin;
  int32_t head_count;
  size_t runs;
  DType dtype = DType::kBF16;
};

class ChunkRunsTest : public ::testing::TestWithParam<RunCase> {
 protected:
  KvPart Part() const {
    return {
        .layer_count = 2, .head_begin = GetParam().head_begin, .head_count = GetParam().head_count};
  }
  const KvGeometry geometry_ = SomeGeometry(GetParam().dtype);
  const std::string memory_ = SomeBytes(static_cast<size_t>(geometry_.chunk_bytes()));
};

TEST_P(ChunkRunsTest, AreTheBytesOfTheWireFormatInFewPieces) {
  const auto runs = ChunkRuns(AsBytes(memory_).data(), GetParam().tokens, Part(), geometry_);
  std::string data;
  for (const ByteRun& run : runs) {
    data.append(reinterpret_cast<const char*>(run.data()), run.size());
  }
  EXPECT_EQ(data, ReferenceData(memory_, GetParam().tokens, Part(), geometry_));
  EXPECT_EQ(runs.size(), GetParam().runs);
}

TEST_P(ChunkRunsTest, MessageIsASerialisedResponseThatHoldsItsMemory) {
  HostPages pages(HostBuffer(new std::byte[memory_.size()],
                             {[](void* data) { delete[] static_cast<std::byte*>(data); }}),
                  geometry_.chunk_bytes(), 1);
  ShipmentReader::Chunk chunk;
  chunk.index = 7;
  chunk.chunk.layer = 1;
  chunk.chunk.tokens = GetParam().tokens;
  chunk.chunk.memory = std::make_shared<const HostChunk>(std::move(pages.Take(1, 1)[0]));
  std::memcpy(chunk.chunk.memory->data(), memory_.data(), memory_.size());
  {
    const StreamMessage message = ChunkMessage(chunk, Part(), geometry_);
    chunk.chunk.memory.reset();
    EXPECT_EQ(pages.free_chunks(), 0) << "the slices refer to it";

    grpc::Slice slice;
    ASSERT_TRUE(message.bytes.DumpToSingleSlice(&slice).ok());
    v1::PrefillResponse response;
    ASSERT_TRUE(response.ParseFromArray(slice.begin(), static_cast<int>(slice.size())));
    const v1::KvChunk& sent = response.chunk();
    EXPECT_EQ(sent.index(), 7u);
    EXPECT_EQ(sent.layer(), 1u);
    EXPECT_EQ(sent.token_begin(), GetParam().tokens.begin);
    EXPECT_EQ(sent.token_count(), GetParam().tokens.count);
    EXPECT_EQ(sent.kv_head_begin(), static_cast<uint32_t>(GetParam().head_begin));
    EXPECT_EQ(sent.kv_head_count(), static_cast<uint32_t>(GetParam().head_count));
    EXPECT_EQ(sent.data(), ReferenceData(memory_, GetParam().tokens, Part(), geometry_));
    EXPECT_EQ(message.kv_bytes, static_cast<int64_t>(sent.data().size()));
    std::string summed;
    for (const uint32_t field : {sent.index(), sent.layer(), sent.token_begin(), sent.token_count(),
                                 sent.kv_head_begin(), sent.kv_head_count()}) {
      summed += LittleEndian(field);
    }
    EXPECT_EQ(sent.crc32c(), SlowCrc32c(summed + sent.data()));
  }
  EXPECT_EQ(pages.free_chunks(), 1);
}

INSTANTIATE_TEST_SUITE_P(
    Chunks, ChunkRunsTest,
    ::testing::Values(
        RunCase{{0, 512}, 0, 3, 1},    // whole pages, all heads
        RunCase{{256, 128}, 0, 3, 1},  // one page
        RunCase{{0, 256}, 0, 1, 4},    // some heads: K and V of each page
        RunCase{{0, 256}, 1, 2, 4},    //
        RunCase{
            {0, 300}, 0, 3, 6},  // ragged end: every head for itself, the first behind whole pages
        RunCase{{200, 184}, 0, 3, 6},  // cut front, the last head goes on in a whole page
        RunCase{{200, 100}, 1, 1, 4},  // both ends cut
        RunCase{{130, 20}, 0, 3, 6},   // inside of one page
        RunCase{{127, 1}, 2, 1, 2},    // one token
        // The same with scales in front of every page.
        RunCase{{0, 512}, 0, 3, 1, DType::kF8E4M3}, RunCase{{256, 128}, 0, 3, 1, DType::kF8E4M3},
        RunCase{{0, 256}, 0, 1, 8, DType::kF8E4M3},    // K's scale, V's, K, V
        RunCase{{0, 256}, 1, 2, 8, DType::kF8E4M3},    //
        RunCase{{0, 300}, 0, 3, 6, DType::kF8E4M3},    // the scales go on in the first head
        RunCase{{200, 184}, 0, 3, 7, DType::kF8E4M3},  // those of a cut front do not
        RunCase{{200, 100}, 1, 1, 8, DType::kF8E4M3}, RunCase{{130, 20}, 0, 3, 7, DType::kF8E4M3},
        RunCase{{127, 1}, 2, 1, 4, DType::kF8E4M3}));

class ChunkFrameSizeTest : public ::testing::TestWithParam<int64_t> {};

TEST_P(ChunkFrameSizeTest, PrefixAndDataAreTheSerialisedResponse) {
  for (const ChunkHeader& header :
       {ChunkHeader{0, 0, 0, 1, 0, 1}, ChunkHeader{70000, 127, 1 << 20, 4096, 0, 32},
        ChunkHeader{~0u, ~0u, ~0u, ~0u, ~0u, ~0u}}) {
    const std::string data = SomeBytes(GetParam());
    v1::PrefillResponse whole;
    v1::KvChunk* chunk = whole.mutable_chunk();
    chunk->set_index(header.index);
    chunk->set_layer(header.layer);
    chunk->set_token_begin(header.token_begin);
    chunk->set_token_count(header.token_count);
    chunk->set_kv_head_begin(header.kv_head_begin);
    chunk->set_kv_head_count(header.kv_head_count);
    chunk->set_crc32c(0xdeadbeef);
    chunk->set_data(data);
    EXPECT_EQ(ChunkFramePrefix(header, 0xdeadbeef, GetParam()) + data, whole.SerializeAsString());
  }
}

// Around the sizes at which a length needs one byte more.
INSTANTIATE_TEST_SUITE_P(Bytes, ChunkFrameSizeTest,
                         ::testing::Values(1, 90, 127, 128, 16383, 16384, 1 << 20, 2097152));

}  // namespace
}  // namespace headstart
