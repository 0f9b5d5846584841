// Runs steps on this machine's backend.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
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
  int64_t max_rows = 0;     // tokens of a step
  int64_t urgent_rows = 0;  // of a step inside another; 0: there are none
  int64_t max_pieces = 1;   // of a step
  int64_t max_prompt_tokens = 0;
};

class LocalRunner : public Runner {
 public:
  // Takes all memory, and makes the runs that the backend learns from. `backend` must
  // outlive the runner.
  static absl::StatusOr<std::unique_ptr<LocalRunner>> Create(const ModelConfig& config,
                                                             ModelWeights weights,
                                                             const LocalRunnerOptions& options,
                                                             Backend& backend);

  // An error of the backend, in this step or in an urgent one inside it, ends both. An outer
  // piece's gave_way_seconds are those of the urgent steps.
  StepResult Run(Step& step, UrgentWork* urgent) override;

  // Since the start. Thread-safe.
  int64_t layers_done() const override { return layers_done_.load(std::memory_order_relaxed); }

 private:
  // Where a step runs: steps inside others have memory of their own.
  struct Lane {
    std::unique_ptr<Decoder> decoder;
    HostBuffer flags;  // u32 [num_layers][max_pieces]: Decoder::not_finite, as it is copied out
  };
  struct Running;

  LocalRunner(const ModelConfig& config, ModelWeights weights, const LocalRunnerOptions& options,
              Backend& backend)
      : config_(config), weights_(std::move(weights)), options_(options), backend_(backend) {}
  absl::Status Allocate();
  absl::StatusOr<Lane> MakeLane(int64_t max_rows);
  // Runs steps of every size that the backend tells apart.
  absl::Status WarmUp();
  absl::Status WarmUpWith(int64_t num_rows);

  // Fills in the results of a step. Returns, and says in all results, an error of the backend.
  absl::Status RunStep(Running& run, UrgentWork* urgent);
  // The pieces as decoder and copies take them; those that begin get their slot ready.
  absl::Status Prepare(Running& run);
  absl::Status RunLayers(Running& run, UrgentWork* urgent);
  absl::Status RunLayer(int32_t layer, Running& run);
  // Runs what is urgent between two layers of `outer`.
  absl::Status GiveWay(UrgentWork& urgent, Running& outer);
  absl::Status TakeTimes(Running& run);
  // First tokens, totals and states.
  absl::Status ReadOutcomes(Running& run);
  absl::Status ReadOutcome(const Piece& piece, PieceResult& result);

  const ModelConfig config_;
  const ModelWeights weights_;
  const LocalRunnerOptions options_;
  Backend& backend_;
  KvCache kv_;
  std::vector<RequestSlot> slots_;
  Lane main_, urgent_;
  std::optional<CopyOut> copy_out_;
  std::atomic<int64_t> layers_done_{0};
};

}  // namespace headstart
