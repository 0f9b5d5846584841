#include "client/kv_destination.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "absl/container/flat_hash_set.h"
#include "absl/numeric/int128.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// Indices into page_table of the pages that are written.
struct PageRange {
  int64_t begin = 0;
  int64_t end = 0;
};

PageRange WrittenPages(const KvDestination& destination, const KvShape& shape) {
  const int64_t first = shape.token_begin - destination.token_begin;
  return {.begin = first / destination.page_tokens,
          .end = (first + shape.num_tokens - 1) / destination.page_tokens + 1};
}

absl::Status CheckPageTable(const KvDestination& destination, const PageRange& pages) {
  if (static_cast<int64_t>(destination.page_table.size()) < pages.end) {
    return absl::InvalidArgumentError(absl::StrCat("page_table has ", destination.page_table.size(),
                                                   " pages, the prompt needs ", pages.end));
  }
  absl::flat_hash_set<int32_t> seen;
  for (int64_t i = pages.begin; i < pages.end; ++i) {
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

// Bytes from a plane's base to the end of the furthest row that may be written, without overflow.
absl::int128 ReachedBytes(const KvDestination& destination, const KvShape& shape,
                          const PageRange& pages) {
  const KvStrides& strides = destination.strides;
  const int64_t slots =
      std::min(destination.page_tokens, shape.token_end() - destination.token_begin);
  const auto table = destination.page_table.begin();
  const int64_t last_page = *std::max_element(table + pages.begin, table + pages.end);
  return absl::int128(last_page) * strides.page +
         absl::int128(shape.num_kv_heads - 1) * strides.head +
         absl::int128(slots - 1) * strides.token + shape.row_bytes();
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
                            .strides = PackedStrides(shape, PageLayout::kHnd, shape.num_tokens),
                            .token_begin = shape.token_begin};
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
  if (destination.token_begin < 0 || destination.token_begin > shape.token_begin) {
    return absl::InvalidArgumentError(absl::StrCat("token_begin=", destination.token_begin,
                                                   ", but the KV comes from token ",
                                                   shape.token_begin, " on"));
  }
  const PageRange pages = WrittenPages(destination, shape);
  HEADSTART_RETURN_IF_ERROR(CheckPageTable(destination, pages));
  if (ReachedBytes(destination, shape, pages) > destination.plane_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the KV would be written beyond plane_bytes=", destination.plane_bytes));
  }
  return absl::OkStatus();
}

ChunkScatter::ChunkScatter(const KvDestination& destination, const KvShape& shape,
                           const KvRange& range)
    : destination_(destination),
      shape_(shape),
      range_(range),
      token_(range.token_begin),
      page_begin_(range.token_begin) {}

void ChunkScatter::NextRuns() {
  const KvStrides& strides = destination_.strides;
  const KvDestination::Layer& layer = destination_.layers[range_.layer];
  const int64_t slot = (token_ - destination_.token_begin) % destination_.page_tokens;
  const int64_t page = (token_ - destination_.token_begin) / destination_.page_tokens;
  run_ = (plane_ == 0 ? layer.k : layer.v) + destination_.page_table[page] * strides.page +
         head_ * strides.head + slot * strides.token;
  const int64_t page_end =
      std::min((page_begin_ / shape_.block_tokens + 1) * shape_.block_tokens, range_.token_end());
  const int64_t tokens = std::min(page_end - token_, destination_.page_tokens - slot);
  const bool rows_touch = strides.token == shape_.row_bytes();
  num_runs_ = rows_touch ? 1 : tokens;
  run_bytes_ = (rows_touch ? tokens : 1) * shape_.row_bytes();
  token_ += tokens;
  if (token_ < page_end) return;
  token_ = page_begin_;
  if (++head_ < shape_.num_kv_heads) return;
  head_ = 0;
  if (++plane_ < 2) return;
  plane_ = 0;
  token_ = page_begin_ = page_end;
}

void ChunkScatter::Write(absl::string_view piece) {
  const auto take = [&piece](std::byte* to, int64_t bytes) {
    std::memcpy(to, piece.data(), bytes);
    piece.remove_prefix(bytes);
  };
  while (!piece.empty()) {
    if (rest_bytes_ > 0) {
      const int64_t bytes = std::min<int64_t>(piece.size(), rest_bytes_);
      take(rest_, bytes);
      rest_ += bytes;
      rest_bytes_ -= bytes;
      continue;
    }
    if (num_runs_ == 0) NextRuns();
    for (; num_runs_ > 0 && static_cast<int64_t>(piece.size()) >= run_bytes_; --num_runs_) {
      take(run_, run_bytes_);
      run_ += destination_.strides.token;
    }
    if (num_runs_ == 0) continue;
    // The run that is cut by the piece's end.
    rest_ = run_;
    rest_bytes_ = run_bytes_;
    run_ += destination_.strides.token;
    --num_runs_;
  }
}

}  // namespace headstart
