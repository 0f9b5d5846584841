// Engine::Create: a model of a folder on a machine.
#include <utility>

#include "engine/engine.h"
#include "engine/run/local_runner.h"
#include "kernels/base/status_macros.h"

namespace headstart {

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(ResolvedModel model,
                                                       std::unique_ptr<Backend> backend,
                                                       const LoadProgress& progress) {
  HEADSTART_RETURN_IF_ERROR(CheckFits(model.plan, *backend));
  const EngineOptions& options = model.options;
  HEADSTART_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(options.model_dir, options.links));
  HEADSTART_ASSIGN_OR_RETURN(ModelWeights weights,
                             LoadWeights(model.config, *files, *backend, options.max_prompt_tokens,
                                         progress, options.backend.num_threads));
  const std::string model_hash = weights.model_hash;
  const SchedulerOptions scheduling = SchedulerOptionsOf(model);
  LocalRunnerOptions running;
  running.geometry = model.geometry;
  running.num_pages = options.kv_pool_tokens / kBlockTokens;
  running.num_slots = model.limits.num_slots;
  running.max_rows = model.limits.max_rows;
  running.urgent_rows = model.limits.urgent_rows;
  running.max_pieces = model.limits.max_pieces;
  running.max_prompt_tokens = options.max_prompt_tokens;
  HEADSTART_ASSIGN_OR_RETURN(
      auto runner, LocalRunner::Create(model.config, std::move(weights), running, *backend));
  HEADSTART_ASSIGN_OR_RETURN(HostBuffer memory, backend->AllocateHost(options.host_kv_bytes));
  const int64_t chunk_bytes = model.geometry.chunk_bytes();
  auto pages = std::make_unique<PagePool>(running.num_pages);
  auto host = std::make_unique<HostPages>(std::move(memory), chunk_bytes,
                                          options.host_kv_bytes / chunk_bytes);
  return std::make_unique<Engine>(std::move(model), scheduling, model_hash, std::move(backend),
                                  std::move(pages), std::move(host), std::move(runner));
}

}  // namespace headstart
