#include "engine/run/request_slot.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace headstart {

RequestSlot::Layout::Layout(const ModelConfig& config)
    : num_layers(config.num_layers),
      num_heads(config.heads.num_heads),
      ratios(num_layers * int64_t{sizeof(BlockCounts)}),
      page_table(ratios + num_layers * num_heads * int64_t{sizeof(float)}) {}

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

absl::Status RequestSlot::Start(absl::Span<const int32_t> pages, const SlotState* state) {
  const auto table_bytes = static_cast<int64_t>(pages.size() * sizeof(int32_t));
  HEADSTART_CHECK(layout_.page_table + table_bytes <= memory_.bytes());
  std::vector<std::byte> start(static_cast<size_t>(layout_.page_table + table_bytes));
  if (state != nullptr) {
    if (static_cast<int64_t>(state->size()) != layout_.page_table) {
      return absl::InternalError(absl::StrCat("the state of a request has ", state->size(),
                                              " bytes, must have ", layout_.page_table));
    }
    std::copy(state->begin(), state->end(), start.begin());
  }
  std::memcpy(start.data() + layout_.page_table, pages.data(), static_cast<size_t>(table_bytes));
  return backend_->Upload(start.data(), static_cast<int64_t>(start.size()), memory_.data());
}

absl::StatusOr<SlotState> RequestSlot::Read() const {
  SlotState state(static_cast<size_t>(layout_.page_table));
  HEADSTART_RETURN_IF_ERROR(backend_->Download(memory_.data(), layout_.page_table, state.data()));
  return state;
}

SlotTotals RequestSlot::TotalsOf(const SlotState& state) const {
  HEADSTART_CHECK(static_cast<int64_t>(state.size()) == layout_.page_table);
  SlotTotals totals;
  totals.counts.resize(static_cast<size_t>(layout_.num_layers));
  totals.budget_ratios.resize(static_cast<size_t>(layout_.num_layers * layout_.num_heads));
  std::memcpy(totals.counts.data(), state.data(), static_cast<size_t>(layout_.ratios));
  std::memcpy(totals.budget_ratios.data(), state.data() + layout_.ratios,
              totals.budget_ratios.size() * sizeof(float));
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

}  // namespace headstart
