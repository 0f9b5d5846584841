#include "server/rpc/chunk_frame.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

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

TEST(ChunkFrameTest, ChecksumCoversHeaderThenData) {
  const ChunkHeader header = {5, 1, 128, 64, 0, 3};
  const std::string data = SomeBytes(1000);
  std::string summed;
  for (const uint32_t field : {5, 1, 128, 64, 0, 3}) summed += LittleEndian(field);
  EXPECT_EQ(ChunkCrc32c(header, AsBytes(data)), SlowCrc32c(summed + data));
}

// Numbers as they are in prefill.proto, and each in its place.
TEST(ChunkFrameTest, ChecksumOfACompletionIsLittleEndianNumbersInOrder) {
  v1::Completed completed;
  completed.mutable_first_token()->set_id(0x01020304);
  completed.mutable_first_token()->set_logprob(-0.5f);  // 0xbf000000
  completed.set_num_chunks(5);
  completed.set_kv_bytes(uint64_t{6} << 32);
  completed.mutable_statistics()->set_dense_fallbacks(7);
  completed.mutable_statistics()->set_executed_blocks(8);
  completed.mutable_statistics()->set_causal_blocks(9);
  completed.mutable_manifest()->add_layer_density(0.25f);  // 0x3e800000
  std::string summed;
  for (const uint32_t word :
       {0x01020304u, 0xbf000000u, 5u, 7u, 0u, 6u, 8u, 0u, 9u, 0u, 0x3e800000u})
    summed += LittleEndian(word);
  EXPECT_EQ(CompletedCrc32c(completed), SlowCrc32c(summed));
}

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
