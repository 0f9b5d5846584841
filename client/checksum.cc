#include "client/checksum.h"

#include <isa-l/crc.h>
#include <openssl/sha.h>

#include <bit>
#include <climits>

namespace headstart {

static_assert(std::endian::native == std::endian::little,
              "ids and header fields are hashed as they lie in memory");

uint32_t ExtendCrc32c(uint32_t crc, absl::string_view bytes) {
  // ISA-L leaves both inversions to the caller, and takes non-const bytes that it only reads.
  crc = ~crc;
  while (!bytes.empty()) {
    const auto piece = bytes.substr(0, INT_MAX);
    auto* data = reinterpret_cast<unsigned char*>(const_cast<char*>(piece.data()));
    crc = crc32_iscsi(data, static_cast<int>(piece.size()), crc);
    bytes.remove_prefix(piece.size());
  }
  return ~crc;
}

uint32_t ChunkHeaderCrc32c(const uint32_t (&fields)[6]) {
  return ExtendCrc32c(0, {reinterpret_cast<const char*>(fields), sizeof(fields)});
}

std::string TokenHash(absl::Span<const uint32_t> token_ids) {
  std::string hash(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(token_ids.data()),
         token_ids.size() * sizeof(uint32_t), reinterpret_cast<unsigned char*>(hash.data()));
  return hash;
}

}  // namespace headstart
