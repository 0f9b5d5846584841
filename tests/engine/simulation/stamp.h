// What pretended KV consists of: a chunk's name, in its first bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "engine/ship/host_pages.h"
#include "engine/ship/shipment.h"

namespace headstart::simulation {

inline constexpr int64_t kStampBytes = sizeof(uint64_t);

// Not zero.
inline uint64_t StampOf(uint64_t request, const KvChunk& chunk) {
  return (request << 32) + (static_cast<uint64_t>(chunk.layer) << 24) +
         static_cast<uint64_t>(chunk.tokens.begin);
}

inline void WriteStamp(uint64_t stamp, const HostChunk& chunk) {
  std::memcpy(chunk.data(), &stamp, sizeof stamp);
}

inline uint64_t ReadStamp(const HostChunk& chunk) {
  uint64_t stamp = 0;
  std::memcpy(&stamp, chunk.data(), sizeof stamp);
  return stamp;
}

}  // namespace headstart::simulation
