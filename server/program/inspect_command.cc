#include "server/program/inspect_command.h"

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_format.h"
#include "engine/model/memory_plan.h"
#include "engine/model/model_config.h"
#include "engine/model/safetensors.h"
#include "kernels/backend.h"
#include "kernels/base/status_macros.h"
#include "server/program/exit_code.h"
#include "server/program/flags.h"

namespace headstart {
namespace {

struct InspectFlags {
  ServerOptions options;
  bool json = false;
};

struct Inspection {
  ModelConfig config;
  int64_t stored_weight_bytes = 0;  // in the model's files
  DType kv_dtype = DType::kBF16;
  int64_t max_prompt_tokens = 0;
  int64_t chunk_tokens = 0;
  int64_t kv_pool_tokens = 0;
  MemoryPlan memory;
};

// What the machine adds to what the model's config says.
absl::Status PlanForDevice(const BackendOptions& options, Inspection* out) {
  std::unique_ptr<Backend> backend;
  if (options.device == "cuda") {  // a plan can be made without a GPU at hand
    out->kv_dtype = options.dtype == ComputeDType::kF32 ? DType::kF32 : DType::kBF16;
  } else {
    HEADSTART_ASSIGN_OR_RETURN(backend, MakeBackend(options));
    out->kv_dtype = backend->compute_dtype();
  }
  out->memory = PlanMemory(out->config, out->kv_dtype, out->chunk_tokens, out->kv_pool_tokens);
  if (backend != nullptr) {
    out->memory.scratch_bytes =
        backend->PlanScratchBytes(out->config.heads, out->chunk_tokens, out->max_prompt_tokens);
  }
  return absl::OkStatus();
}

absl::StatusOr<Inspection> Inspect(const ServerOptions& options) {
  Inspection out;
  HEADSTART_ASSIGN_OR_RETURN(out.config, ReadModelConfig(options.model_dir));
  HEADSTART_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(options.model_dir));
  out.stored_weight_bytes = files->total_bytes();
  out.max_prompt_tokens =
      options.max_prompt_tokens == 0 ? out.config.max_positions : options.max_prompt_tokens;
  const int64_t pool_tokens =
      options.kv_pool_tokens == 0 ? out.max_prompt_tokens : options.kv_pool_tokens;
  out.kv_pool_tokens = NumBlocks(pool_tokens) * kBlockTokens;
  out.chunk_tokens = std::min(options.chunk_tokens, out.max_prompt_tokens);
  HEADSTART_RETURN_IF_ERROR(PlanForDevice(options.backend, &out));
  return out;
}

nlohmann::ordered_json ToJson(const Inspection& i) {
  const ModelConfig& c = i.config;
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
          {"max_prompt_tokens", i.max_prompt_tokens},
          {"stored_weight_bytes", i.stored_weight_bytes},
          {"kv_dtype", DTypeName(i.kv_dtype)},
          {"kv_bytes_per_token", i.memory.kv_bytes_per_token},
          {"prefill_chunk_tokens", i.chunk_tokens},
          {"kv_pool_tokens", i.kv_pool_tokens},
          {"memory_bytes",
           {{"weights", i.memory.weight_bytes},
            {"kv_pool", i.memory.kv_pool_bytes},
            {"workspace", i.memory.workspace_bytes},
            {"scratch", i.memory.scratch_bytes},
            {"total", i.memory.total_bytes()}}}};
}

double MiB(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

void PrintText(const Inspection& i) {
  const ModelConfig& c = i.config;
  std::cout << absl::StrFormat(
      "architecture        %s, %d layers, hidden %d, ffn %d, vocabulary %d\n"
      "attention           %d query heads, %d KV heads, head_dim %d, rope %s\n"
      "longest context     %d tokens\n"
      "longest prompt      %d tokens\n"
      "KV cache            %s, %d bytes a token, %.1f MiB for the longest prompt\n"
      "memory, weights     %.1f MiB (%.1f MiB in the files)\n"
      "memory, KV pool     %.1f MiB (%d tokens)\n"
      "memory, workspace   %.1f MiB (chunks of %d tokens)\n"
      "memory, scratch     %.1f MiB (attention and selection, at most)\n"
      "memory, in all      %.1f MiB\n",
      c.architecture, c.num_layers, c.hidden_size, c.intermediate_size, c.vocab_size,
      c.heads.num_heads, c.heads.num_kv_heads, c.heads.head_dim, RopeTypeName(c.rope.type),
      c.max_positions, i.max_prompt_tokens, std::string(DTypeName(i.kv_dtype)),
      i.memory.kv_bytes_per_token, MiB(i.memory.kv_bytes_per_token * i.max_prompt_tokens),
      MiB(i.memory.weight_bytes), MiB(i.stored_weight_bytes), MiB(i.memory.kv_pool_bytes),
      i.kv_pool_tokens, MiB(i.memory.workspace_bytes), i.chunk_tokens, MiB(i.memory.scratch_bytes),
      MiB(i.memory.total_bytes()));
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
