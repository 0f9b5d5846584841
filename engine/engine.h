// One model on one machine: takes a prompt, hands out its KV cache layer by layer and the first
// token.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/memory_plan.h"
#include "engine/model/model_config.h"
#include "engine/model/weights.h"
#include "engine/prefill_job.h"
#include "engine/schedule/block_pool.h"
#include "engine/ship/kv_sink.h"
#include "kernels/backend.h"

namespace headstart {

struct EngineOptions {
  std::string model_dir;
  std::string model_name;  // empty: the folder's name
  BackendOptions backend;
  int64_t max_prompt_tokens =
      0;                        // 0: the model's context, or what the KV pool holds if that is less
  int64_t chunk_tokens = 8192;  // prefill chunk; multiple of kBlockTokens
  int64_t kv_pool_tokens = 0;   // 0: one longest prompt
};

class Engine {
 public:
  // What a model needs of the backend's memory; loads nothing. RESOURCE_EXHAUSTED says how many
  // bytes are missing.
  static absl::StatusOr<MemoryPlan> Plan(const EngineOptions& options, const Backend& backend);

  // Reads the model and prepares its weights. INVALID_ARGUMENT: the model can't be run (names file,
  // tensor or field). RESOURCE_EXHAUSTED: as Plan.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options,
                                                        const LoadProgress& progress);
  // With a backend of the caller's: tests.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options,
                                                        std::unique_ptr<Backend> backend,
                                                        const LoadProgress& progress);
  ~Engine();

  // Thread-safe; what can be said without running: prompt length, token ids, attention options,
  // sampling options. INVALID_ARGUMENT or FAILED_PRECONDITION, the field's name first in the
  // message.
  absl::Status Validate(const PrefillJob& job) const;

  // Runs one job on the calling thread; one at a time. The sink gets every chunk of every layer. On
  // error nothing of the job stays behind. CANCELLED, DEADLINE_EXCEEDED (seen between layers),
  // RESOURCE_EXHAUSTED, NonFiniteError (kernels/base/nonfinite.h), whatever the sink returned, or
  // another INTERNAL: then the backend is lost and the engine of no further use.
  absl::StatusOr<PrefillResult> RunPrefill(const PrefillJob& job, KvSink& sink);

  const EngineOptions& options() const;  // resolved: no zeros left
  const ModelConfig& config() const;
  const std::string& model_hash() const;
  const Backend& backend() const;
  const BlockPool& block_pool() const;
  DType kv_dtype() const;
  // Layers finished since the start, all jobs together: progress for health checks. Thread-safe.
  int64_t layers_done() const;

 private:
  struct State;
  explicit Engine(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace headstart
