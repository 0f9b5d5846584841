// Time to the first token of the engine on random prompts, with a sink that throws the KV away (or
// writes it to a file).
//
//   prefill_bench MODEL_DIR --tokens N … [--density D …] [--preset NAME …] [--chunk N] [--repeat N]
//                 [--prompt FILE] [--dump FILE] [--trace FILE]
//
// A density of 0 is dense attention; others force every head's budget, with g = H, s = 16 (the
// selection itself runs in full). A preset runs as it is. One JSON object a run on standard output.
// The prompt is the first tokens of FILE (int32 ids, as they lie in memory), or the ids
// (i * 7919 + 13) mod vocab_size. --trace: the last run once more, with what ran on the GPU written
// to FILE (kernel_trace.h).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "kernels/base/status_macros.h"
#include "tests/bench/gpu/kernel_trace.h"

namespace headstart {
namespace {

// Writes chunks to a file: layer, first token, tokens (int64 each), then the bytes.
class DumpingSink : public DiscardingSink {
 public:
  explicit DumpingSink(const std::string& path) : file_(path, std::ios::binary) {}

  absl::StatusOr<absl::Span<std::byte>> Reserve(const KvChunkInfo& chunk, int64_t bytes) override {
    const int64_t head[3] = {chunk.layer, chunk.token_begin, chunk.token_count};
    file_.write(reinterpret_cast<const char*>(head), sizeof(head));
    return DiscardingSink::Reserve(chunk, bytes);
  }
  absl::Status Commit() override {
    file_.write(reinterpret_cast<const char*>(memory().data()),
                static_cast<std::streamsize>(memory().size()));
    return file_.good() ? absl::OkStatus() : absl::DataLossError("could not write the dump");
  }

 private:
  std::ofstream file_;
};

std::unique_ptr<KvSink> MakeSink(const std::string& dump_file) {
  if (dump_file.empty()) return std::make_unique<DiscardingSink>();
  return std::make_unique<DumpingSink>(dump_file);
}

// One way to run attention: a preset, or a density that is forced.
struct Attention {
  std::string preset;
  float density = 0.0f;
};

struct Arguments {
  std::string model_dir, dump_file, trace_file, prompt_file;
  int64_t chunk = 8192, repeat = 1;
  std::vector<int64_t> tokens;
  std::vector<Attention> attentions;
};

Arguments Parse(int argc, char** argv) {
  Arguments arguments;
  if (argc > 1) arguments.model_dir = argv[1];
  for (int i = 2; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const char* value = argv[i + 1];
    if (name == "--tokens") arguments.tokens.push_back(std::atoll(value));
    if (name == "--chunk") arguments.chunk = std::atoll(value);
    if (name == "--repeat") arguments.repeat = std::atoll(value);
    if (name == "--dump") arguments.dump_file = value;
    if (name == "--trace") arguments.trace_file = value;
    if (name == "--prompt") arguments.prompt_file = value;
    if (name == "--density") arguments.attentions.push_back({"", std::strtof(value, nullptr)});
    if (name == "--preset") arguments.attentions.push_back({value, 0.0f});
  }
  if (arguments.attentions.empty()) arguments.attentions = {Attention()};
  return arguments;
}

absl::StatusOr<std::vector<int32_t>> MakePrompt(const Arguments& arguments, int64_t tokens,
                                                int32_t vocab_size) {
  std::vector<int32_t> ids(tokens);
  if (arguments.prompt_file.empty()) {
    for (int64_t i = 0; i < tokens; ++i) {
      ids[i] = static_cast<int32_t>((i * 7919 + 13) % vocab_size);
    }
    return ids;
  }
  std::ifstream file(arguments.prompt_file, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(tokens * sizeof(int32_t));
  if (!file.read(reinterpret_cast<char*>(ids.data()), bytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat(arguments.prompt_file, " has less than ", tokens, " token ids"));
  }
  return ids;
}

absl::StatusOr<ProxyAttnOptions> OptionsOf(const Attention& attention, const HeadShape& heads) {
  if (!attention.preset.empty()) {
    const auto preset = ParseAttentionPreset(attention.preset);
    if (!preset.ok()) return preset.status();
    return ResolvePreset(*preset, heads);
  }
  if (attention.density == 0.0f) return ProxyAttnOptions();
  ProxyAttnOptions options = ResolvePreset(AttentionPreset::kBalanced, heads);
  options.forced_density = attention.density;
  options.dense_above_density = 1.0f;
  return options;
}

double DeviceGigabytesInUse() {
  size_t free_bytes = 0, total_bytes = 0;
  cudaMemGetInfo(&free_bytes, &total_bytes);
  return static_cast<double>(total_bytes - free_bytes) / 1e9;
}

absl::Status RunOnce(Engine& engine, const Arguments& arguments, int64_t tokens,
                     const Attention& attention) {
  const ModelConfig& config = engine.config();
  PrefillJob job;
  HEADSTART_ASSIGN_OR_RETURN(job.token_ids, MakePrompt(arguments, tokens, config.vocab_size));
  HEADSTART_ASSIGN_OR_RETURN(job.attention, OptionsOf(attention, config.heads));
  const std::unique_ptr<KvSink> sink = MakeSink(arguments.dump_file);
  const auto result = engine.RunPrefill(job, *sink);
  if (!result.ok()) return result.status();
  const auto executed = static_cast<double>(result->executed_blocks);
  std::printf(
      "{\"tokens\": %lld, \"chunk\": %lld, \"preset\": \"%s\", \"asked_density\": %g, "
      "\"density\": %.4f, \"ttft_ms\": "
      "%.1f, \"attention_ms\": %.1f, \"selection_ms\": %.1f, \"device_gb\": %.2f, \"token\": %d, "
      "\"logprob\": %.4f}\n",
      static_cast<long long>(tokens), static_cast<long long>(arguments.chunk),
      attention.preset.c_str(), attention.density,
      executed / static_cast<double>(result->causal_blocks), result->total_seconds * 1e3,
      result->attention_seconds * 1e3, result->selection_seconds * 1e3, DeviceGigabytesInUse(),
      result->first_token.id, result->first_token.logprob);
  std::fflush(stdout);
  return absl::OkStatus();
}

absl::Status Run(const Arguments& arguments) {
  EngineOptions options;
  options.model_dir = arguments.model_dir;
  options.backend.device = "cuda";
  options.max_prompt_tokens = *std::max_element(arguments.tokens.begin(), arguments.tokens.end());
  options.chunk_tokens = arguments.chunk;
  HEADSTART_ASSIGN_OR_RETURN(const auto engine, Engine::Create(options, [](int64_t, int64_t) {}));
  for (const int64_t tokens : arguments.tokens) {
    for (const Attention& attention : arguments.attentions) {
      for (int64_t r = 0; r < arguments.repeat; ++r) {
        HEADSTART_RETURN_IF_ERROR(RunOnce(*engine, arguments, tokens, attention));
      }
    }
  }
  if (arguments.trace_file.empty()) return absl::OkStatus();
  HEADSTART_RETURN_IF_ERROR(StartKernelTrace());
  HEADSTART_RETURN_IF_ERROR(
      RunOnce(*engine, arguments, arguments.tokens.back(), arguments.attentions.back()));
  return WriteKernelTrace(arguments.trace_file);
}

}  // namespace
}  // namespace headstart

int main(int argc, char** argv) {
  const headstart::Arguments arguments = headstart::Parse(argc, argv);
  if (arguments.tokens.empty()) {
    std::fprintf(
        stderr,
        "usage: prefill_bench MODEL_DIR --tokens N ... [--density D ...] [--preset NAME ...] "
        "[--chunk N] [--repeat N] [--prompt FILE] [--dump FILE] [--trace FILE]\n");
    return 2;
  }
  const absl::Status status = headstart::Run(arguments);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
