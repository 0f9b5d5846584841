// What a model comes to on a machine, before anything is loaded: one answer for everyone who asks.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/memory_plan.h"
#include "engine/model/model_config.h"
#include "engine/schedule/scheduler.h"
#include "engine/ship/kv_part.h"
#include "kernels/backend.h"
#include "kernels/base/machine.h"

namespace headstart {

struct EngineOptions {
  std::string model_dir;
  Links links = Links::kInside;
  std::string model_name;  // empty: the folder's name
  BackendOptions backend;
  int64_t max_prompt_tokens = 0;  // 0: the model's context, or what the KV pool holds if it is less
  // Most tokens that go through the layers at once; a multiple of kBlockTokens.
  int64_t piece_tokens = 8192;
  // See SchedulerOptions. 0: 2048, or a piece if that is less.
  int64_t batch_tokens = 0;
  // 0: one longest prompt, and four batches of short ones that run between its layers.
  int64_t kv_pool_tokens = 0;
  // KV on its way out. 0: what 8 longest prompts have, 2 GiB at most; but two pieces at least: one
  // is sent while the next one comes.
  int64_t host_kv_bytes = 0;

  // See SchedulerOptions.
  int64_t max_requests = 64;
  int64_t max_tokens = 1 << 20;
  absl::Duration ageing = absl::Seconds(10);
  absl::Duration default_lease = absl::Seconds(60);
  absl::Duration max_lease = absl::Minutes(10);
  absl::Duration stall_timeout = absl::Seconds(30);
};

struct ResolvedModel {
  EngineOptions options;  // no zeros left; max_prompt_tokens is what the KV pool holds, too
  ModelConfig config;
  KvGeometry geometry;
  int64_t prompt_limit = 0;  // the model's, or the operator's; the pool may hold less
  StepLimits limits;
  MemoryPlan plan;
};

// Reads config.json, loads nothing. INVALID_ARGUMENT: the model can't be run, on this backend or at
// all, or an option does not suit it.
absl::StatusOr<ResolvedModel> ResolveModel(const EngineOptions& options,
                                           const BackendPlan& backend);

// RESOURCE_EXHAUSTED says how many bytes are missing on the device, or on the host, which has
// `host` left: by default, this machine.
absl::Status CheckFits(const MemoryPlan& plan, const Backend& backend,
                       const std::optional<FreeMemory>& host = FindFreeMemory());

SchedulerOptions SchedulerOptionsOf(const ResolvedModel& model);

}  // namespace headstart
