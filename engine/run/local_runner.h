// Runs steps on this machine's backend.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/model_config.h"
#include "engine/model/weights.h"
#include "engine/run/copy_out.h"
#include "engine/run/decoder.h"
#include "engine/run/kv_cache.h"
#include "engine/run/request_slot.h"
#include "engine/run/runner.h"
#include "engine/ship/kv_part.h"
#include "kernels/backend.h"

namespace headstart {

struct LocalRunnerOptions {
  KvGeometry geometry;
  int64_t num_pages = 0;  // of the KV pool
  int32_t num_slots = 1;
  int64_t max_rows = 0;  // tokens of a step
  int64_t max_prompt_tokens = 0;
};

class LocalRunner : public Runner {
 public:
  // Takes all memory, and makes the runs that the backend learns from. `config` and `backend` must
  // outlive the runner.
  static absl::StatusOr<std::unique_ptr<LocalRunner>> Create(const ModelConfig& config,
                                                             ModelWeights weights,
                                                             const LocalRunnerOptions& options,
                                                             Backend& backend);

  StepResult Run(Step& step) override;

  const std::string& model_hash() const { return weights_.model_hash; }
  // Since the start. Thread-safe.
  int64_t layers_done() const { return layers_done_.load(std::memory_order_relaxed); }

 private:
  LocalRunner(const ModelConfig& config, ModelWeights weights, const LocalRunnerOptions& options,
              Backend& backend)
      : config_(config), weights_(std::move(weights)), options_(options), backend_(backend) {}
  absl::Status Allocate();
  // Runs prompts of every size that the backend tells apart.
  absl::Status WarmUp();

  // The pieces as the decoder takes them; those that start a prompt get their slot ready.
  absl::StatusOr<std::vector<DecoderInput>> Prepare(const Step& step);
  absl::Status RunLayers(Step& step, StepResult& results);
  // First tokens and counts of the prompts that end.
  absl::Status ReadOutcomes(const Step& step, StepResult& results);
  absl::Status AddTotals(const Piece& piece, PrefillResult& result) const;

  const ModelConfig& config_;
  const ModelWeights weights_;
  const LocalRunnerOptions options_;
  Backend& backend_;
  KvCache kv_;
  std::vector<RequestSlot> slots_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<CopyOut> copy_out_;
  std::atomic<int64_t> layers_done_{0};
};

}  // namespace headstart
