#include "client/checksum.h"

#include <isa-l/crc.h>
#include <openssl/sha.h>

#include <algorithm>
#include <bit>
#include <climits>

namespace headstart {
namespace {

static_assert(std::endian::native == std::endian::little,
              "ids and header fields are hashed as they lie in memory");

template <typename T>
void AppendNumber(T number, std::string* bytes) {
  bytes->append(reinterpret_cast<const char*>(&number), sizeof(number));
}

}  // namespace

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

uint32_t ExpectedCrc32c(const v1::Completed& completed) {
  const v1::PrefillStatistics& statistics = completed.statistics();
  std::string bytes;
  AppendNumber<uint32_t>(completed.first_token().id(), &bytes);
  AppendNumber<float>(completed.first_token().logprob(), &bytes);
  AppendNumber<uint32_t>(completed.num_chunks(), &bytes);
  AppendNumber<uint32_t>(statistics.dense_fallbacks(), &bytes);
  AppendNumber<uint64_t>(completed.kv_bytes(), &bytes);
  AppendNumber<uint64_t>(statistics.executed_blocks(), &bytes);
  AppendNumber<uint64_t>(statistics.causal_blocks(), &bytes);
  for (const float density : completed.manifest().layer_density()) AppendNumber(density, &bytes);
  return ExtendCrc32c(0, bytes);
}

std::string TokenHash(absl::Span<const uint32_t> token_ids) {
  std::string hash(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(token_ids.data()),
         token_ids.size() * sizeof(uint32_t), reinterpret_cast<unsigned char*>(hash.data()));
  return hash;
}

}  // namespace headstart
