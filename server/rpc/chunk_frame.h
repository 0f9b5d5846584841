// The bytes of a KvChunk on the wire, made so that the KV itself is never copied: the message is a
// few bytes of our own and slices of the host memory that the device copied to. And the checksums
// of the stream.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/ship/kv_part.h"
#include "engine/ship/shipment.h"

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

// Memory that lies in one piece.
using ByteRun = absl::Span<const std::byte>;

// The part's heads of tokens `tokens`, whose pages lie at `memory` (see KvChunk), in the order of
// KvChunk.data and in as few runs as possible: one for whole pages with all heads, two a page for a
// range of heads, two a head for a page that is cut; and scales, where they are not neighbours.
std::vector<ByteRun> ChunkRuns(const std::byte* memory, const TokenRange& tokens,
                               const KvPart& part, const KvGeometry& geometry);

// CRC-32C of the header's 24 bytes and the data, as prefill.proto says.
uint32_t ChunkCrc32c(const ChunkHeader& header, absl::Span<const ByteRun> data);

uint32_t Crc32c(absl::string_view bytes);

// What comes before `data_bytes` bytes of KV: both together are a serialised PrefillResponse.
std::string ChunkFramePrefix(const ChunkHeader& header, uint32_t crc32c, int64_t data_bytes);

// A PrefillResponse, and how much KV is in it.
struct StreamMessage {
  grpc::ByteBuffer bytes;
  int64_t kv_bytes = 0;
};

// Its slices hold the chunk's memory until the network has let them go.
StreamMessage ChunkMessage(const ShipmentReader::Chunk& chunk, const KvPart& part,
                           const KvGeometry& geometry);

}  // namespace headstart
