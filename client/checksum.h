// The checksums of the wire format (proto/headstart/v1/prefill.proto), written from that text
// alone: what the sender computes in code of its own is checked here.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace headstart {

// CRC-32C of some bytes followed by `bytes`, given the CRC-32C of the former; 0 is that of nothing.
uint32_t ExtendCrc32c(uint32_t crc, absl::string_view bytes);

// CRC-32C of the 24 bytes that stand for a chunk's header: index, layer, token_begin, token_count,
// kv_head_begin, kv_head_count.
uint32_t ChunkHeaderCrc32c(const uint32_t (&fields)[6]);

// 32 bytes: SHA-256 over the ids as consecutive little-endian uint32.
std::string TokenHash(absl::Span<const uint32_t> token_ids);

}  // namespace headstart
