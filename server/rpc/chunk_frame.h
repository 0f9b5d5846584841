// The bytes of a KvChunk on the wire, made so that the KV itself is never copied: a PrefillResponse
// whose last field is left to be appended. And the checksums of the stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/types/span.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// The fields of headstart.v1.KvChunk before `crc32c`.
struct ChunkHeader {
  uint32_t index = 0;
  uint32_t layer = 0;
  uint32_t token_begin = 0;
  uint32_t token_count = 0;
  uint32_t kv_head_begin = 0;
  uint32_t kv_head_count = 0;
};

// CRC-32C of the header's 24 bytes and `data`, as prefill.proto says.
uint32_t ChunkCrc32c(const ChunkHeader& header, absl::Span<const std::byte> data);

// The value of `crc32c` that belongs to the other fields.
uint32_t CompletedCrc32c(const v1::Completed& completed);

// What comes before `data_bytes` bytes of KV: both together are a serialised PrefillResponse.
std::string ChunkFramePrefix(const ChunkHeader& header, uint32_t crc32c, int64_t data_bytes);

}  // namespace headstart
