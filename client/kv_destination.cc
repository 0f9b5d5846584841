#include "client/kv_destination.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "absl/container/flat_hash_set.h"
#include "absl/numeric/int128.h"
#include "absl/strings/str_cat.h"
#include "client/fp8.h"
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

absl::Status CheckValues(const KvDestination& destination, const KvShape& shape) {
  const auto num_scales = static_cast<int64_t>(destination.scales.size());
  if (destination.values == KvValues::kAsSent && num_scales != shape.num_scales()) {
    return absl::InvalidArgumentError(
        absl::StrCat("scales has ", num_scales, " values, the KV ", shape.num_scales()));
  }
  if (destination.values == KvValues::kAsSent || shape.has_scales()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("values: the KV has elements of ",
                                                 shape.element_bytes,
                                                 " bytes; only fp8 is multiplied out"));
}

absl::Status CheckArrived(const KvDestination& destination, const KvShape& shape) {
  const auto size = static_cast<int64_t>(destination.arrived.size());
  if (size == 0 || size == shape.num_pages()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("arrived has ", size, " entries, the KV ", shape.num_pages(), " pages"));
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

KvShape ShapeOfValues(KvShape shape, KvValues values) {
  if (values == KvValues::kBF16) shape.element_bytes = 2;
  if (values == KvValues::kF32) shape.element_bytes = 4;
  return shape;
}

KvStrides PackedStrides(const KvShape& shape, PageLayout layout, int64_t page_tokens) {
  const int64_t row = shape.row_bytes();
  const int64_t page = shape.num_kv_heads * page_tokens * row;
  if (layout == PageLayout::kHnd) return {.page = page, .head = page_tokens * row, .token = row};
  return {.page = page, .head = row, .token = shape.num_kv_heads * row};
}

absl::StatusOr<KvDestination> ContiguousKv(const KvShape& sent, absl::Span<std::byte> memory,
                                           KvValues values) {
  const KvShape shape = ShapeOfValues(sent, values);
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
                            .token_begin = shape.token_begin,
                            .values = values};
  destination.layers.reserve(shape.num_layers);
  for (int64_t l = 0; l < shape.num_layers; ++l) {
    std::byte* layer = memory.data() + 2 * l * plane;
    destination.layers.push_back({.k = layer, .v = layer + plane});
  }
  return destination;
}

absl::StatusOr<KvBuffer> AllocateKv(const KvShape& shape, KvValues values) {
  KvBuffer buffer{.data = nullptr, .bytes = ShapeOfValues(shape, values).total_bytes()};
  buffer.data.reset(new (std::nothrow) std::byte[buffer.bytes]);
  if (buffer.data == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", buffer.bytes, " bytes of KV"));
  }
  return buffer;
}

absl::Status CheckDestination(const KvDestination& destination, const KvShape& sent) {
  HEADSTART_RETURN_IF_ERROR(CheckValues(destination, sent));
  HEADSTART_RETURN_IF_ERROR(CheckArrived(destination, sent));
  const KvShape shape = ShapeOfValues(sent, destination.values);
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

void MarkArrived(const KvDestination& destination, const KvShape& shape, const KvRange& range) {
  if (destination.arrived.empty()) return;
  const int64_t layer_pages = shape.num_pages(shape.token_begin, shape.token_end());
  uint8_t* page = &destination.arrived[range.layer * layer_pages + shape.PageOf(range.token_begin)];
  const uint8_t* end = page + shape.num_pages(range.token_begin, range.token_end());
  for (; page != end; ++page) std::atomic_ref(*page).store(1, std::memory_order_release);
}

ChunkScatter::ChunkScatter(const KvDestination& destination, const KvShape& shape,
                           const KvRange& range)
    : destination_(destination),
      shape_(shape),
      value_bytes_(ShapeOfValues(shape, destination.values).element_bytes),
      range_(range),
      token_(range.token_begin),
      page_begin_(range.token_begin),
      scales_(static_cast<size_t>(shape.page_scales())),
      scale_bytes_missing_(shape.page_scales() * int64_t{sizeof(float)}) {}

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
  const bool rows_touch = strides.token == shape_.head_dim * value_bytes_;
  if (!scales_.empty()) run_scale_ = scales_[plane_ * shape_.num_kv_heads + head_];
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
  scale_bytes_missing_ = static_cast<int64_t>(scales_.size() * sizeof(float));
}

void ChunkScatter::TakeScales(absl::string_view& piece) {
  const auto all = static_cast<int64_t>(scales_.size() * sizeof(float));
  const int64_t bytes = std::min<int64_t>(piece.size(), scale_bytes_missing_);
  std::memcpy(reinterpret_cast<char*>(scales_.data()) + all - scale_bytes_missing_, piece.data(),
              bytes);
  piece.remove_prefix(bytes);
  scale_bytes_missing_ -= bytes;
  if (scale_bytes_missing_ > 0 || destination_.values != KvValues::kAsSent) return;
  const int64_t pages = shape_.num_pages(shape_.token_begin, shape_.token_end());
  const int64_t page = range_.layer * pages + shape_.PageOf(page_begin_);
  std::copy(scales_.begin(), scales_.end(),
            destination_.scales.begin() + page * shape_.page_scales());
}

std::byte* ChunkScatter::Put(absl::string_view& piece, int64_t bytes, std::byte* to) const {
  switch (destination_.values) {
    case KvValues::kAsSent:
      std::memcpy(to, piece.data(), bytes);
      break;
    case KvValues::kBF16:
      MultiplyOutToBF16(piece.data(), bytes, run_scale_, to);
      break;
    case KvValues::kF32:
      MultiplyOutToF32(piece.data(), bytes, run_scale_, to);
      break;
  }
  piece.remove_prefix(bytes);
  // In this order: what is kept as sent may be cut inside an element.
  return to + bytes * value_bytes_ / shape_.element_bytes;
}

void ChunkScatter::Write(absl::string_view piece) {
  while (!piece.empty()) {
    if (rest_bytes_ > 0) {
      const int64_t bytes = std::min<int64_t>(piece.size(), rest_bytes_);
      rest_ = Put(piece, bytes, rest_);
      rest_bytes_ -= bytes;
      continue;
    }
    if (num_runs_ == 0 && scale_bytes_missing_ > 0) {
      TakeScales(piece);
      continue;
    }
    if (num_runs_ == 0) NextRuns();
    for (; num_runs_ > 0 && static_cast<int64_t>(piece.size()) >= run_bytes_; --num_runs_) {
      Put(piece, run_bytes_, run_);
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
