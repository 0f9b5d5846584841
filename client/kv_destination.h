// Memory for the KV of one prompt, or of a part of it: contiguous or paged, in any order of heads
// and tokens.
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

// The KV that comes: of all layers and heads, or of those of a part.
struct KvShape {
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t num_tokens = 0;
  int64_t element_bytes = 0;  // on the wire; 1: fp8, with scales
  int64_t token_begin = 0;    // the first token that comes: the manifest's skip_tokens
  int64_t block_tokens = 0;   // of a KV page on the wire

  int64_t token_end() const { return token_begin + num_tokens; }
  int64_t row_bytes() const { return head_dim * element_bytes; }
  // K and V of one token in one layer.
  int64_t token_bytes() const { return 2 * num_kv_heads * row_bytes(); }
  // K or V of one layer.
  int64_t plane_bytes() const { return num_kv_heads * num_tokens * row_bytes(); }
  // Without scales.
  int64_t total_bytes() const { return 2 * num_layers * plane_bytes(); }

  // Scales of a page on the wire, float32 [K, V][num_kv_heads]; none but of fp8.
  bool has_scales() const { return element_bytes == 1; }
  int64_t page_scales() const { return has_scales() ? 2 * num_kv_heads : 0; }
  // Pages on the wire that hold tokens [begin, end), and the number of a token's.
  int64_t num_pages(int64_t begin, int64_t end) const {
    return PageOf(end - 1) - PageOf(begin) + 1;
  }
  int64_t PageOf(int64_t token) const { return token / block_tokens - token_begin / block_tokens; }
  // Of all layers.
  int64_t num_pages() const { return num_layers * num_pages(token_begin, token_end()); }
  int64_t num_scales() const { return num_pages() * page_scales(); }
  // Of all layers on the wire, scales included.
  int64_t wire_bytes() const { return total_bytes() + num_scales() * int64_t{sizeof(float)}; }
};

// How the KV lies in a destination: as it is sent, or fp8 multiplied out.
enum class KvValues : uint8_t { kAsSent, kBF16, kF32 };

// The shape of these values: its rows, planes and total are those of a destination that holds them.
KvShape ShapeOfValues(KvShape shape, KvValues values);

// Distances in bytes. Elements of a row (one head of one token) always lie side by side.
struct KvStrides {
  int64_t page = 0;
  int64_t head = 0;
  int64_t token = 0;
};

// With t' = t - token_begin, the row of (head h, token t) of K starts at
//   layers[l].k + page_table[t' / page_tokens] * strides.page + h * strides.head
//   + (t' % page_tokens) * strides.token
// and V's the same way from layers[l].v. Layers and heads count from the first one of the part,
// tokens from the beginning of the prompt. The memory is the caller's.
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
  // The token in the first slot of page_table[0]; not behind the first one that comes. Pages that
  // hold only tokens before that are not looked at.
  int64_t token_begin = 0;
  KvValues values = KvValues::kAsSent;
  // Of fp8 as it is sent: [layers][pages on the wire][K, V][num_kv_heads]. The first page is that
  // of the first token that comes. What a byte stands for is its E4M3 number times the scale.
  absl::Span<float> scales = {};
  // [layers][pages on the wire], or empty: set to 1 when all heads of the page have come and their
  // checksum was right. Who reads it while the call runs (std::atomic_ref, memory_order_acquire)
  // may read the page then.
  absl::Span<uint8_t> arrived = {};
};

enum class PageLayout : uint8_t { kHnd, kNhd };  // [heads][tokens][dim], [tokens][heads][dim]

// Strides of pages of K alone (or V alone) that lie back to back. Where K and V of a page are
// neighbours, double `page`.
KvStrides PackedStrides(const KvShape& shape, PageLayout layout, int64_t page_tokens);

// [layer][K, V][kv_heads][num_tokens][head_dim]. INVALID_ARGUMENT when `memory` is not exactly the
// total_bytes() of the values. The scales of fp8 that is kept as it is sent are the caller's to
// add.
absl::StatusOr<KvDestination> ContiguousKv(const KvShape& shape, absl::Span<std::byte> memory,
                                           KvValues values = KvValues::kAsSent);

// Memory for a contiguous destination, not initialised. RESOURCE_EXHAUSTED when there is not
// enough.
struct KvBuffer {
  std::unique_ptr<std::byte[]> data;
  int64_t bytes = 0;

  absl::Span<std::byte> span() const { return {data.get(), static_cast<size_t>(bytes)}; }
};
absl::StatusOr<KvBuffer> AllocateKv(const KvShape& shape, KvValues values = KvValues::kAsSent);

// INVALID_ARGUMENT when the shape would be written outside of plane_bytes, a page is used twice,
// fp8 is to be kept without room for its scales, other KV is to be multiplied out, `arrived` is not
// of the pages that come, or a field makes no sense. Whether rows overlap through small strides is
// the caller's business.
absl::Status CheckDestination(const KvDestination& destination, const KvShape& shape);

// What a chunk carries: all heads of some tokens. `layer` counts from the first one of the part.
struct KvRange {
  int64_t layer = 0;
  int64_t token_begin = 0;
  int64_t token_count = 0;

  int64_t token_end() const { return token_begin + token_count; }
};

// Notes in `arrived`, where that is asked for, that the range has come. Pages are not shared by
// ranges.
void MarkArrived(const KvDestination& destination, const KvShape& shape, const KvRange& range);

// On the wire, scales included. Pages are not shared by ranges.
inline int64_t RangeBytes(const KvShape& shape, const KvRange& range) {
  const int64_t pages = shape.num_pages(range.token_begin, range.token_end());
  return range.token_count * shape.token_bytes() +
         pages * shape.page_scales() * int64_t{sizeof(float)};
}

// Spreads the bytes of one chunk over a destination: page after page of the wire, each the scales
// of fp8, K, then V, each [heads][tokens of the page][head_dim]. The bytes may come in pieces of
// any size. The destination was checked, the range lies inside the shape, and both outlive this
// object.
class ChunkScatter {
 public:
  ChunkScatter(const KvDestination& destination, const KvShape& shape, const KvRange& range);

  // REQUIRES: all pieces together are not longer than the range.
  void Write(absl::string_view piece);

 private:
  // Goes on to the tokens that share a page of the wire and one of the destination.
  void NextRuns();
  // Takes what is missing of the page's scales from the front of the piece.
  void TakeScales(absl::string_view& piece);
  // The next `bytes` of the piece, to where they belong; returns what is behind them there.
  std::byte* Put(absl::string_view& piece, int64_t bytes, std::byte* to) const;

  const KvDestination& destination_;
  const KvShape& shape_;
  const int64_t value_bytes_;  // of an element of the destination
  const KvRange range_;
  // What NextRuns begins with: K (0) or V (1), head and token; the page of the wire starts at
  // page_begin_.
  int64_t plane_ = 0;
  int64_t head_ = 0;
  int64_t token_;
  int64_t page_begin_;
  // A run is a stretch of bytes that lie side by side here and there: a row, or where rows touch
  // many of them. `num_runs_` of `run_bytes_` each have not begun, the next one at `run_`.
  std::byte* run_ = nullptr;
  int64_t num_runs_ = 0;
  int64_t run_bytes_ = 0;  // on the wire, as rest_bytes_
  float run_scale_ = 1;
  // What is left of the run that has begun.
  std::byte* rest_ = nullptr;
  int64_t rest_bytes_ = 0;
  std::vector<float> scales_;  // of the page
  int64_t scale_bytes_missing_ = 0;
};

}  // namespace headstart
