// A step is a value: what goes through the model's layers together. The scheduler makes it, the
// runner runs it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/request.h"
#include "engine/schedule/slot_state.h"
#include "engine/ship/host_pages.h"
#include "engine/ship/shipment.h"
#include "kernels/attention_params.h"

namespace headstart {

// Consecutive tokens of one request. What it points to lives until the step is finished.
struct Piece {
  uint64_t request = 0;  // the scheduler's key
  int32_t slot = 0;      // of the request's state on the device
  // None: nothing is computed, KV that was found in the prefix cache is copied out.
  absl::Span<const int32_t> token_ids;
  int64_t first_position = 0;       // a multiple of kBlockTokens
  bool ends_prompt = false;         // the last token's logits are wanted
  absl::Span<const int32_t> pages;  // of the whole prompt
  // The slot is new, or pages were exchanged: page table and state are to be written first.
  bool starts_slot = false;
  // With starts_slot: the state behind the tokens before first_position; null: as when a prompt
  // begins.
  std::shared_ptr<const SlotState> state;
  bool keep_state = false;  // the state behind this piece is wanted in its result
  const ProxyAttnOptions* attention = nullptr;
  const SamplingOptions* sampling = nullptr;
  int64_t prompt_tokens = 0;

  // Where the KV goes: chunks of every layer, in the order [layer][chunk]. They may begin before
  // first_position, with KV that was found. Without a shipment it goes nowhere.
  std::vector<TokenRange> chunks;
  std::vector<HostChunk> host;  // taken from by the runner
  std::shared_ptr<Shipment> shipment;

  // Set by whoever gives up on the request; the runner looks before each layer.
  const std::atomic<bool>* cancelled = nullptr;

  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
};

struct Step {
  std::vector<Piece> pieces;
  bool urgent = false;  // runs between two layers of another one
};

// In the order of the step's pieces.
struct PieceResult {
  // CANCELLED when the piece's flag was seen. NonFiniteError, RESOURCE_EXHAUSTED: the request is
  // lost, the runner is not. Any other: the runner is lost.
  absl::Status status;
  // Of the piece that ends a prompt: first token and counts of the whole prompt. Times are the
  // step's, without those of urgent steps inside it.
  PrefillResult result;
  std::shared_ptr<const SlotState> state;  // with keep_state
};

using StepResult = std::vector<PieceResult>;

// The status of a piece whose flag was seen.
inline absl::Status CancelledBefore(int32_t layer) {
  return absl::CancelledError("cancelled before layer " + std::to_string(layer));
}

}  // namespace headstart
