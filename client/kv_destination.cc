#include "client/kv_destination.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "absl/container/flat_hash_set.h"
#include "absl/numeric/int128.h"
#include "absl/strings/str_cat.h"

namespace headstart {
namespace {

// Bytes from a plane's base to the end of its last row, without overflow.
absl::int128 ReachedBytes(const KvDestination& destination, const KvShape& shape,
                          int64_t num_pages) {
  const KvStrides& strides = destination.strides;
  const int64_t tokens = std::min(destination.page_tokens, shape.num_tokens);
  const int64_t last_page =
      *std::max_element(destination.page_table.begin(), destination.page_table.begin() + num_pages);
  return absl::int128(last_page) * strides.page +
         absl::int128(shape.num_kv_heads - 1) * strides.head +
         absl::int128(tokens - 1) * strides.token + shape.row_bytes();
}

absl::Status CheckPageTable(const KvDestination& destination, int64_t num_pages) {
  if (static_cast<int64_t>(destination.page_table.size()) < num_pages) {
    return absl::InvalidArgumentError(absl::StrCat("page_table has ", destination.page_table.size(),
                                                   " pages, the prompt needs ", num_pages));
  }
  absl::flat_hash_set<int32_t> seen;
  for (int64_t i = 0; i < num_pages; ++i) {
    const int32_t page = destination.page_table[i];
    if (page < 0)
      return absl::InvalidArgumentError(absl::StrCat("page_table[", i, "]=", page, " is negative"));
    if (!seen.insert(page).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("page_table[", i, "]=", page, " is there twice"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

KvStrides PackedStrides(const KvShape& shape, PageLayout layout, int64_t page_tokens) {
  const int64_t row = shape.row_bytes();
  const int64_t page = shape.num_kv_heads * page_tokens * row;
  if (layout == PageLayout::kHnd) return {.page = page, .head = page_tokens * row, .token = row};
  return {.page = page, .head = row, .token = shape.num_kv_heads * row};
}

absl::StatusOr<KvDestination> ContiguousKv(const KvShape& shape, absl::Span<std::byte> memory) {
  if (static_cast<int64_t>(memory.size()) != shape.total_bytes()) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory has ", memory.size(), " bytes, the KV is ", shape.total_bytes()));
  }
  const int64_t plane = shape.plane_bytes();
  KvDestination destination{.layers = {},
                            .plane_bytes = plane,
                            .page_tokens = shape.num_tokens,
                            .page_table = {0},
                            .strides = PackedStrides(shape, PageLayout::kHnd, shape.num_tokens)};
  destination.layers.reserve(shape.num_layers);
  for (int64_t l = 0; l < shape.num_layers; ++l) {
    std::byte* layer = memory.data() + 2 * l * plane;
    destination.layers.push_back({.k = layer, .v = layer + plane});
  }
  return destination;
}

absl::StatusOr<KvBuffer> AllocateKv(const KvShape& shape) {
  KvBuffer buffer{.data = nullptr, .bytes = shape.total_bytes()};
  buffer.data.reset(new (std::nothrow) std::byte[buffer.bytes]);
  if (buffer.data == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", buffer.bytes, " bytes of KV"));
  }
  return buffer;
}

absl::Status CheckDestination(const KvDestination& destination, const KvShape& shape) {
  if (static_cast<int64_t>(destination.layers.size()) != shape.num_layers) {
    return absl::InvalidArgumentError(absl::StrCat("layers has ", destination.layers.size(),
                                                   " entries, the model ", shape.num_layers));
  }
  for (const KvDestination::Layer& layer : destination.layers) {
    if (layer.k == nullptr || layer.v == nullptr)
      return absl::InvalidArgumentError("a layer has no memory");
  }
  const KvStrides& strides = destination.strides;
  if (destination.page_tokens < 1 || strides.page < 0 || strides.head < 0 ||
      strides.token < shape.row_bytes()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "page_tokens=", destination.page_tokens, ", strides {", strides.page, ", ", strides.head,
        ", ", strides.token, "} can't hold rows of ", shape.row_bytes(), " bytes"));
  }
  const int64_t num_pages = (shape.num_tokens - 1) / destination.page_tokens + 1;
  if (absl::Status status = CheckPageTable(destination, num_pages); !status.ok()) return status;
  if (ReachedBytes(destination, shape, num_pages) > destination.plane_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the KV would be written beyond plane_bytes=", destination.plane_bytes));
  }
  return absl::OkStatus();
}

ChunkScatter::ChunkScatter(const KvDestination& destination, const KvShape& shape,
                           const KvRange& range)
    : destination_(destination), range_(range), row_bytes_(shape.row_bytes()) {}

void ChunkScatter::NextRun() {
  const KvStrides& strides = destination_.strides;
  const int64_t token = range_.token_begin + token_;
  const int64_t slot = token % destination_.page_tokens;
  const KvDestination::Layer& layer = destination_.layers[range_.layer];
  run_ = (plane_ == 0 ? layer.k : layer.v) +
         destination_.page_table[token / destination_.page_tokens] * strides.page +
         (range_.head_begin + head_) * strides.head + slot * strides.token;
  const bool rows_touch = strides.token == row_bytes_;
  const int64_t tokens =
      rows_touch ? std::min(range_.token_count - token_, destination_.page_tokens - slot) : 1;
  run_bytes_ = tokens * row_bytes_;
  token_ += tokens;
  if (token_ < range_.token_count) return;
  token_ = 0;
  if (++head_ < range_.head_count) return;
  head_ = 0;
  ++plane_;
}

void ChunkScatter::Write(absl::string_view piece) {
  while (!piece.empty()) {
    if (run_bytes_ == 0) NextRun();
    const size_t bytes = std::min(piece.size(), static_cast<size_t>(run_bytes_));
    std::memcpy(run_, piece.data(), bytes);
    run_ += bytes;
    run_bytes_ -= static_cast<int64_t>(bytes);
    piece.remove_prefix(bytes);
  }
}

}  // namespace headstart
