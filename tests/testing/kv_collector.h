// Runs prompts through an engine and keeps the KV that they ship.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/ship/shipment.h"

namespace headstart::testing {

// An engine with this backend.
absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const EngineOptions& options,
                                                   std::unique_ptr<Backend> backend);

// Waits for the reader's events until it ends; `on_chunk` may be null.
absl::StatusOr<PrefillResult> Drain(
    ShipmentReader& reader, const std::function<void(const ShipmentReader::Chunk&)>& on_chunk);

struct CollectedChunk {
  int32_t layer = 0;
  TokenRange tokens;
  std::vector<std::byte> data;  // K, then V, each [kv_heads][tokens.count][head_dim]
};

class KvCollector {
 public:
  // When set, told of the submission before its KV is taken.
  std::function<void(const Submission&)> on_submitted;

  // Opens the engine, submits the request, takes its KV and ends it. Returns when everything of it
  // was given back.
  absl::StatusOr<PrefillResult> Run(Engine& engine, PrefillRequest request);

  const std::vector<CollectedChunk>& chunks() const { return chunks_; }

  // A layer's keys (values) of all tokens, put together from its chunks:
  // [num_kv_heads][num_tokens][head_dim]. `row_bytes` is head_dim elements. The chunks must cover
  // the tokens without gap or overlap; checked.
  std::vector<std::byte> Keys(int32_t layer, int32_t num_kv_heads, int64_t row_bytes) const;
  std::vector<std::byte> Values(int32_t layer, int32_t num_kv_heads, int64_t row_bytes) const;

 private:
  std::vector<std::byte> Plane(int32_t layer, int32_t num_kv_heads, int64_t row_bytes,
                               bool values) const;

  std::vector<CollectedChunk> chunks_;
};

}  // namespace headstart::testing
