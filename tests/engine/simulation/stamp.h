// What pretended KV consists of: a number that says what a page's KV depends on, and in host memory
// a chunk's stamp, made of the numbers of its pages.
#pragma once

#include <cstdint>
#include <cstring>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/ship/host_pages.h"
#include "engine/ship/shipment.h"
#include "kernels/attention_params.h"

namespace headstart::simulation {

inline constexpr int64_t kStampBytes = sizeof(uint64_t);

// Never zero, which is the content of nothing.
inline uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15 + b;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return (x ^ (x >> 31)) | 1;
}

inline uint64_t Mix(uint64_t a, absl::string_view text) {
  for (const char c : text) a = Mix(a, static_cast<uint64_t>(c));
  return a;
}

// The way in which a piece is computed, as far as its KV depends on it: sparse KV of the last piece
// depends on where the prompt ends.
inline uint64_t WayOf(bool is_sparse, bool ends_prompt, int64_t prompt_tokens) {
  if (!is_sparse) return 1;
  return ends_prompt ? 2 + static_cast<uint64_t>(prompt_tokens) : 2;
}

// Of a page with these tokens, behind one with the content `before`.
inline uint64_t ContentBehind(uint64_t before, absl::Span<const int32_t> token_ids, uint64_t way) {
  uint64_t content = Mix(before, way);
  for (const int32_t id : token_ids) content = content * 31 + static_cast<uint64_t>(id);
  return Mix(content, static_cast<uint64_t>(token_ids.size()));
}

// `content_of(i)`: of page i of the prompt.
template <typename ContentOf>
uint64_t StampOf(const KvChunk& chunk, const ContentOf& content_of) {
  uint64_t stamp = Mix(static_cast<uint64_t>(chunk.layer), chunk.tokens.begin);
  const int64_t end = NumBlocks(chunk.tokens.begin + chunk.tokens.count);
  for (int64_t page = chunk.tokens.begin / kBlockTokens; page < end; ++page) {
    stamp = Mix(stamp, content_of(page));
  }
  return stamp;
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
