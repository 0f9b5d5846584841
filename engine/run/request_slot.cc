#include "engine/run/request_slot.h"

#include <cstring>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace headstart {

RequestSlot::Layout::Layout(const ModelConfig& config)
    : num_layers(config.num_layers),
      num_heads(config.heads.num_heads),
      ratios(num_layers * int64_t{sizeof(BlockCounts)}),
      flags(ratios + num_layers * num_heads * int64_t{sizeof(float)}),
      page_table(flags + num_layers * int64_t{sizeof(uint32_t)}) {}

int64_t RequestSlot::Bytes(const ModelConfig& config, int64_t max_pages) {
  return Layout(config).page_table + max_pages * int64_t{sizeof(int32_t)};
}

absl::StatusOr<RequestSlot> RequestSlot::Create(const ModelConfig& config, int64_t max_pages,
                                                Backend& backend) {
  RequestSlot slot{Layout(config)};
  slot.backend_ = &backend;
  HEADSTART_ASSIGN_OR_RETURN(slot.memory_, backend.Allocate(Bytes(config, max_pages)));
  return slot;
}

absl::Status RequestSlot::Start(absl::Span<const int32_t> pages) {
  const auto table_bytes = static_cast<int64_t>(pages.size() * sizeof(int32_t));
  HEADSTART_CHECK(layout_.page_table + table_bytes <= memory_.bytes());
  std::vector<std::byte> start(static_cast<size_t>(layout_.page_table + table_bytes));
  std::memcpy(start.data() + layout_.page_table, pages.data(), static_cast<size_t>(table_bytes));
  return backend_->Upload(start.data(), static_cast<int64_t>(start.size()), memory_.data());
}

absl::StatusOr<SlotTotals> RequestSlot::Read() const {
  std::vector<std::byte> bytes(static_cast<size_t>(layout_.page_table));
  HEADSTART_RETURN_IF_ERROR(backend_->Download(memory_.data(), layout_.page_table, bytes.data()));
  const auto layers = static_cast<size_t>(layout_.num_layers);
  SlotTotals totals;
  totals.counts.resize(layers);
  totals.budget_ratios.resize(layers * static_cast<size_t>(layout_.num_heads));
  totals.not_finite.resize(layers);
  std::memcpy(totals.counts.data(), bytes.data(), layers * sizeof(BlockCounts));
  std::memcpy(totals.budget_ratios.data(), bytes.data() + layout_.ratios,
              totals.budget_ratios.size() * sizeof(float));
  std::memcpy(totals.not_finite.data(), bytes.data() + layout_.flags, layers * sizeof(uint32_t));
  return totals;
}

const int32_t* RequestSlot::page_table() const {
  return reinterpret_cast<const int32_t*>(At(layout_.page_table));
}
BlockCounts* RequestSlot::counts(int32_t layer) const {
  return reinterpret_cast<BlockCounts*>(At(0)) + layer;
}
float* RequestSlot::budget_ratio(int32_t layer) const {
  return reinterpret_cast<float*>(At(layout_.ratios)) + layer * layout_.num_heads;
}
uint32_t* RequestSlot::not_finite(int32_t layer) const {
  return reinterpret_cast<uint32_t*>(At(layout_.flags)) + layer;
}

}  // namespace headstart
