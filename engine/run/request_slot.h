// What the backend keeps of one request while it runs, beside its pages.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/model_config.h"
#include "engine/schedule/step.h"
#include "kernels/backend.h"

namespace headstart {

// What a request came to, by layer.
struct SlotTotals {
  std::vector<BlockCounts> counts;   // [num_layers]
  std::vector<float> budget_ratios;  // [num_layers][H], see AttentionSequence; 0: none estimated
};

// One stretch of backend memory, used by one request after the other.
class RequestSlot {
 public:
  // Of a slot for requests of up to `max_pages` pages.
  static int64_t Bytes(const ModelConfig& config, int64_t max_pages);
  // The backend must outlive the slot.
  static absl::StatusOr<RequestSlot> Create(const ModelConfig& config, int64_t max_pages,
                                            Backend& backend);

  // Begins a request whose token t lives in page pages[t / kBlockTokens]; at most max_pages. It
  // goes on from `state`, which Read gave of a slot of the same model; null: all that is counted
  // begins at 0. INTERNAL: a state of another size.
  absl::Status Start(absl::Span<const int32_t> pages, const SlotState* state);
  // The state behind the operations so far. Waits for them, once.
  absl::StatusOr<SlotState> Read() const;
  // What a state of Read says.
  SlotTotals TotalsOf(const SlotState& state) const;

  // Backend memory, for the arguments of operations.
  const int32_t* page_table() const;
  BlockCounts* counts(int32_t layer) const;
  float* budget_ratio(int32_t layer) const;  // [H]

 private:
  // Where the parts lie: the state (counts, then ratios), then the page table.
  struct Layout {
    explicit Layout(const ModelConfig& config);
    int64_t num_layers, num_heads;
    int64_t ratios, page_table;  // bytes from the start
  };
  explicit RequestSlot(const Layout& layout) : layout_(layout) {}

  std::byte* At(int64_t offset) const { return static_cast<std::byte*>(memory_.data()) + offset; }

  Layout layout_;
  Backend* backend_ = nullptr;
  Buffer memory_;
};

}  // namespace headstart
