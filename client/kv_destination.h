// Memory for the KV of one prompt: contiguous or paged, in any order of heads and tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace headstart {

// What a manifest promises.
struct KvShape {
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t num_tokens = 0;
  int64_t element_bytes = 0;

  int64_t row_bytes() const { return head_dim * element_bytes; }
  // K or V of one layer.
  int64_t plane_bytes() const { return num_kv_heads * num_tokens * row_bytes(); }
  int64_t total_bytes() const { return 2 * num_layers * plane_bytes(); }
};

// Distances in bytes. Elements of a row (one head of one token) always lie side by side.
struct KvStrides {
  int64_t page = 0;
  int64_t head = 0;
  int64_t token = 0;
};

// The row of (head h, token t) of K starts at
//   layers[l].k + page_table[t / page_tokens] * strides.page + h * strides.head + (t % page_tokens)
//   * strides.token
// and V's the same way from layers[l].v. The memory is the caller's.
struct KvDestination {
  struct Layer {
    std::byte* k = nullptr;
    std::byte* v = nullptr;
  };
  std::vector<Layer> layers;
  int64_t plane_bytes = 0;  // that may be written from each `k` and from each `v` on
  int64_t page_tokens = 0;
  std::vector<int32_t> page_table;
  KvStrides strides;
};

enum class PageLayout : uint8_t { kHnd, kNhd };  // [heads][tokens][dim], [tokens][heads][dim]

// Strides of pages of K alone (or V alone) that lie back to back. Where K and V of a page are
// neighbours, double `page`.
KvStrides PackedStrides(const KvShape& shape, PageLayout layout, int64_t page_tokens);

// [layer][K, V][kv_heads][num_tokens][head_dim]. INVALID_ARGUMENT when `memory` is not exactly
// shape.total_bytes().
absl::StatusOr<KvDestination> ContiguousKv(const KvShape& shape, absl::Span<std::byte> memory);

// Memory for a contiguous destination, not initialised. RESOURCE_EXHAUSTED when there is not
// enough.
struct KvBuffer {
  std::unique_ptr<std::byte[]> data;
  int64_t bytes = 0;

  absl::Span<std::byte> span() const { return {data.get(), static_cast<size_t>(bytes)}; }
};
absl::StatusOr<KvBuffer> AllocateKv(const KvShape& shape);

// INVALID_ARGUMENT when the shape would be written outside of plane_bytes, a page is used twice, or
// a field makes no sense. Whether rows overlap through small strides is the caller's business.
absl::Status CheckDestination(const KvDestination& destination, const KvShape& shape);

// A part of one layer, as a chunk carries it.
struct KvRange {
  int64_t layer = 0;
  int64_t head_begin = 0;
  int64_t head_count = 0;
  int64_t token_begin = 0;
  int64_t token_count = 0;
};

// Spreads the bytes of one chunk, K then V, each [heads][tokens][head_dim], over a destination. The
// bytes may come in pieces of any size. The destination was checked, the range lies inside the
// shape, and both outlive this object.
class ChunkScatter {
 public:
  ChunkScatter(const KvDestination& destination, const KvShape& shape, const KvRange& range);

  // REQUIRES: all pieces together are not longer than the range.
  void Write(absl::string_view piece);

 private:
  void NextRun();

  const KvDestination& destination_;
  const KvRange range_;
  const int64_t row_bytes_;
  // Where the next run starts.
  int64_t plane_ = 0;  // 0: K, 1: V
  int64_t head_ = 0;   // relative to the range, as is token_
  int64_t token_ = 0;
  // What is left of the run being written.
  std::byte* run_ = nullptr;
  int64_t run_bytes_ = 0;
};

}  // namespace headstart
