#include "engine/ship/kv_part.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;
constexpr int32_t kMaxStripes = 64;
constexpr size_t kMaxReaders = 64;

absl::Status CheckRange(absl::string_view what, int64_t begin, int64_t count, int64_t limit) {
  if (begin >= 0 && count > 0 && begin + count <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, "_begin=", begin, ", ", what,
                                                 "_count=", count, " is not inside the ", limit,
                                                 " of the model"));
}

// Whether some readers of the layer and the head, cut alike, have all of its stripes.
bool IsCovered(int32_t layer, int32_t head, absl::Span<const KvPart> readers) {
  const auto has_it = [&](const KvPart& part) {
    return part.HasLayer(layer) && head >= part.head_begin &&
           head < part.head_begin + part.head_count;
  };
  for (const KvPart& part : readers) {
    if (!has_it(part) || part.stripe_index != 0) continue;
    int32_t next = 1;
    while (next < part.stripe_count &&
           std::any_of(readers.begin(), readers.end(), [&](const KvPart& other) {
             return has_it(other) && other.stripe_index == next &&
                    other.stripe_count == part.stripe_count &&
                    other.layer_begin == part.layer_begin && other.layer_count == part.layer_count;
           })) {
      ++next;
    }
    if (next == part.stripe_count) return true;
  }
  return false;
}

}  // namespace

int64_t ChunkPages(int64_t page_bytes) { return std::max<int64_t>(1, kChunkBytes / page_bytes); }

KvPart WholeKv(const KvGeometry& geometry) {
  return {.layer_count = geometry.num_layers, .head_count = geometry.heads.num_kv_heads};
}

absl::Status CheckPart(const KvPart& part, const KvGeometry& geometry) {
  HEADSTART_RETURN_IF_ERROR(
      CheckRange("layer", part.layer_begin, part.layer_count, geometry.num_layers));
  HEADSTART_RETURN_IF_ERROR(
      CheckRange("kv_head", part.head_begin, part.head_count, geometry.heads.num_kv_heads));
  if (part.stripe_count > 0 && part.stripe_count <= kMaxStripes && part.stripe_index >= 0 &&
      part.stripe_index < part.stripe_count) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("stripe_index=", part.stripe_index,
                                                 " of stripe_count=", part.stripe_count,
                                                 "; at most ", kMaxStripes, " stripes"));
}

absl::Status CheckCoverage(absl::Span<const KvPart> readers, const KvGeometry& geometry) {
  if (readers.size() > kMaxReaders) {
    return absl::InvalidArgumentError(
        absl::StrCat("readers has ", readers.size(), " parts, limit ", kMaxReaders));
  }
  for (size_t i = 0; i < readers.size(); ++i) {
    HEADSTART_RETURN_IF_ERROR(CheckPart(readers[i], geometry));
    const auto first = std::find(readers.begin(), readers.end(), readers[i]);
    if (first != readers.begin() + i) {
      return absl::InvalidArgumentError(
          absl::StrCat("readers[", i, "] is the same part as readers[", first - readers.begin(),
                       "]: nobody could tell their acknowledgements apart"));
    }
  }
  for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
    for (int32_t head = 0; head < geometry.heads.num_kv_heads; ++head) {
      if (IsCovered(layer, head, readers)) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("readers do not cover layer ", layer, ", KV head ", head));
    }
  }
  return absl::OkStatus();
}

std::vector<TokenRange> CutIntoChunks(int64_t first_position, int64_t num_tokens,
                                      int64_t skip_tokens, int64_t chunk_pages) {
  HEADSTART_CHECK(first_position % kBlockTokens == 0 && chunk_pages > 0);
  std::vector<TokenRange> chunks;
  const int64_t end = first_position + num_tokens;
  const int64_t chunk_tokens = chunk_pages * kBlockTokens;
  for (int64_t begin = first_position; begin < end; begin += chunk_tokens) {
    const int64_t from = std::max(begin, skip_tokens);
    const int64_t to = std::min(begin + chunk_tokens, end);
    if (from < to) chunks.push_back({from, to - from});
  }
  return chunks;
}

}  // namespace headstart
