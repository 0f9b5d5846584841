#include "server/program/inspect_command.h"

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_format.h"
#include "engine/error.h"
#include "engine/model/model_tensors.h"
#include "engine/model/safetensors.h"
#include "engine/resolve.h"
#include "kernels/backend.h"
#include "kernels/base/status_macros.h"
#include "server/program/exit_code.h"
#include "server/program/flags.h"
#include "server/server.h"

namespace headstart {
namespace {

struct InspectFlags {
  ServerOptions options;
  bool json = false;
};

struct Inspection {
  ResolvedModel model;
  int64_t stored_weight_bytes = 0;  // in the model's files
};

absl::StatusOr<Inspection> Inspect(const ServerOptions& options) {
  Inspection out;
  absl::StatusOr<std::unique_ptr<BackendPlan>> backend = MakeBackendPlan(options.backend);
  if (!backend.ok()) return AsUsageError(backend.status());
  const EngineOptions engine_options = ToEngineOptions(options);
  HEADSTART_ASSIGN_OR_RETURN(out.model, ResolveModel(engine_options, **backend));
  HEADSTART_ASSIGN_OR_RETURN(const auto files,
                             WeightFiles::Open(options.model_dir, engine_options.links));
  HEADSTART_RETURN_IF_ERROR(FindModelTensors(out.model.config, *files).status());
  out.stored_weight_bytes = files->total_bytes();
  return out;
}

nlohmann::ordered_json ToJson(const Inspection& i) {
  const ModelConfig& c = i.model.config;
  const EngineOptions& options = i.model.options;
  const MemoryPlan& plan = i.model.plan;
  return {{"architecture", c.architecture},
          {"num_layers", c.num_layers},
          {"hidden_size", c.hidden_size},
          {"num_heads", c.heads.num_heads},
          {"num_kv_heads", c.heads.num_kv_heads},
          {"head_dim", c.heads.head_dim},
          {"intermediate_size", c.intermediate_size},
          {"vocab_size", c.vocab_size},
          {"rope_type", std::string(RopeTypeName(c.rope.type))},
          {"max_context_tokens", c.max_positions},
          {"max_prompt_tokens", options.max_prompt_tokens},
          {"stored_weight_bytes", i.stored_weight_bytes},
          {"kv_dtype", DTypeName(i.model.geometry.dtype)},
          {"kv_bytes_per_token", plan.kv_bytes_per_token},
          {"piece_tokens", i.model.limits.max_rows},
          {"batch_tokens", i.model.limits.urgent_rows},
          {"kv_pool_tokens", options.kv_pool_tokens},
          {"host_kv_bytes", options.host_kv_bytes},
          {"memory_bytes",
           {{"weights", plan.weight_bytes},
            {"kv_pool", plan.kv_pool_bytes},
            {"workspace", plan.workspace_bytes},
            {"scratch", plan.scratch_bytes},
            {"staging", plan.staging_bytes},
            {"total", plan.total_bytes()}}}};
}

double MiB(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

void PrintText(const Inspection& i) {
  const ModelConfig& c = i.model.config;
  const EngineOptions& options = i.model.options;
  const MemoryPlan& plan = i.model.plan;
  std::cout << absl::StrFormat(
      "architecture        %s, %d layers, hidden %d, ffn %d, vocabulary %d\n"
      "attention           %d query heads, %d KV heads, head_dim %d, rope %s\n"
      "longest context     %d tokens\n"
      "longest prompt      %d tokens\n"
      "KV cache            %s, %d bytes a token, %.1f MiB for the longest prompt\n"
      "memory, weights     %.1f MiB (%.1f MiB in the files)\n"
      "memory, KV pool     %.1f MiB (%d tokens)\n"
      "memory, workspace   %.1f MiB (pieces of %d tokens)\n"
      "memory, scratch     %.1f MiB (attention and selection, at most)\n"
      "memory, staging     %.1f MiB (KV that is shipped as fp8)\n"
      "memory, in all      %.1f MiB\n"
      "host memory for KV  %.1f MiB\n",
      c.architecture, c.num_layers, c.hidden_size, c.intermediate_size, c.vocab_size,
      c.heads.num_heads, c.heads.num_kv_heads, c.heads.head_dim, RopeTypeName(c.rope.type),
      c.max_positions, options.max_prompt_tokens, std::string(DTypeName(i.model.geometry.dtype)),
      plan.kv_bytes_per_token, MiB(plan.kv_bytes_per_token * options.max_prompt_tokens),
      MiB(plan.weight_bytes), MiB(i.stored_weight_bytes), MiB(plan.kv_pool_bytes),
      options.kv_pool_tokens, MiB(plan.workspace_bytes), i.model.limits.max_rows,
      MiB(plan.scratch_bytes), MiB(plan.staging_bytes), MiB(plan.total_bytes()),
      MiB(options.host_kv_bytes));
}

int RunInspect(const InspectFlags& flags) {
  if (flags.options.model_dir.empty()) {
    std::cerr << "headstart inspect: --model is required\n";
    return kExitUsage;
  }
  const absl::StatusOr<Inspection> inspection = Inspect(flags.options);
  if (!inspection.ok()) {
    std::cerr << "headstart inspect: " << inspection.status().message() << "\n";
    return ExitCodeOf(inspection.status());
  }
  if (flags.json) {
    std::cout << ToJson(*inspection).dump(2) << "\n";
  } else {
    PrintText(*inspection);
  }
  return kExitOk;
}

}  // namespace

void AddInspectCommand(CLI::App& app, std::function<void(int)> set_exit_code) {
  auto flags = std::make_shared<InspectFlags>();
  CLI::App* command = app.add_subcommand(
      "inspect", "Say what a model is and what it needs, without loading its weights");
  AddModelOptions(command, &flags->options);
  command->add_flag("--json", flags->json, "Print JSON");
  command->final_callback(
      [flags, set_exit_code = std::move(set_exit_code)] { set_exit_code(RunInspect(*flags)); });
}

}  // namespace headstart
