// Time to the first token of the engine on random prompts: all KV in host memory, read there by
// nobody (or written to a file).
//
//   prefill_bench MODEL_DIR --tokens N … [--density D …] [--preset NAME …] [--gamma G …]
//                 [--piece N] [--host-bytes N] [--repeat N] [--device NAME] [--prompt FILE]
//                 [--dump FILE] [--trace FILE] [--at-once N] [--batch N] [--against N]
//                 [--fastest 1]
//
// A density of 0 is dense attention; others force every head's budget, with g = H, s = 16 (the
// selection itself runs in full). A preset runs as it is; a gamma is that of `balanced`. One JSON
// object a run on standard output. The prompt is the first tokens of FILE (int32 ids, as they lie
// in memory), or the ids (i * 7919 + 13) mod vocab_size. --trace: the last run once more, with what
// ran on the GPU written to FILE (kernel_trace.h). --fastest: with
// BackendOptions::fastest_products.
//
// --at-once: instead, N dense prompts of each --tokens, which the engine gets together, then one
// after the other, then as many tokens in one prompt of --against (8192): tokens/s of the three,
// and their ratios. A line a repeat. --batch: EngineOptions::batch_tokens.
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
#include "engine/stopwatch.h"
#include "kernels/base/status_macros.h"
#include "tests/bench/gpu/kernel_trace.h"
#include "tests/testing/kv_collector.h"

namespace headstart {
namespace {

// Writes chunks to a file: layer, first token, tokens (int64 each), then the bytes of its pages.
class KvDump {
 public:
  // An empty path: nothing is written.
  KvDump(const std::string& path, const KvGeometry& geometry) : geometry_(geometry) {
    if (!path.empty()) file_.open(path, std::ios::binary);
  }

  void Write(const KvChunk& chunk) {
    if (!file_.is_open()) return;
    const int64_t head[3] = {chunk.layer, chunk.tokens.begin, chunk.tokens.count};
    file_.write(reinterpret_cast<const char*>(head), sizeof(head));
    file_.write(
        reinterpret_cast<const char*>(chunk.memory->data()),
        static_cast<std::streamsize>(NumBlocks(chunk.tokens.count) * geometry_.page_bytes()));
  }
  absl::Status status() const {
    return file_.good() ? absl::OkStatus() : absl::DataLossError("could not write the dump");
  }

 private:
  const KvGeometry geometry_;
  std::ofstream file_;
};

// One way to run attention: a preset, perhaps with a gamma of its own, or a density that is forced.
struct Attention {
  std::string preset;
  float density = 0.0f;
  float gamma = 0.0f;
};

struct Arguments {
  std::string model_dir, dump_file, trace_file, prompt_file, device = "cuda";
  int64_t piece = 8192, host_bytes = 0, repeat = 1, at_once = 0, batch = 0, against = 8192;
  bool fastest = false;
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
    if (name == "--piece") arguments.piece = std::atoll(value);
    if (name == "--host-bytes") arguments.host_bytes = std::atoll(value);
    if (name == "--repeat") arguments.repeat = std::atoll(value);
    if (name == "--at-once") arguments.at_once = std::atoll(value);
    if (name == "--batch") arguments.batch = std::atoll(value);
    if (name == "--against") arguments.against = std::atoll(value);
    if (name == "--fastest") arguments.fastest = std::atoll(value) != 0;
    if (name == "--device") arguments.device = value;
    if (name == "--dump") arguments.dump_file = value;
    if (name == "--trace") arguments.trace_file = value;
    if (name == "--prompt") arguments.prompt_file = value;
    if (name == "--density") arguments.attentions.push_back({"", std::strtof(value, nullptr)});
    if (name == "--preset") arguments.attentions.push_back({value});
    if (name == "--gamma")
      arguments.attentions.push_back({"balanced", 0.0f, std::strtof(value, nullptr)});
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
    ProxyAttnOptions options = ResolvePreset(*preset, heads);
    if (attention.gamma > 0.0f) options.gamma = attention.gamma;
    return options;
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
  PrefillRequest request;
  HEADSTART_ASSIGN_OR_RETURN(request.token_ids, MakePrompt(arguments, tokens, config.vocab_size));
  HEADSTART_ASSIGN_OR_RETURN(request.attention, OptionsOf(attention, config.heads));
  KvDump dump(arguments.dump_file, engine.geometry());
  const Stopwatch stopwatch;
  HEADSTART_ASSIGN_OR_RETURN(const Submission submission, engine.Submit(std::move(request)));
  const auto result = testing::Drain(
      *submission.reader, [&dump](const ShipmentReader::Chunk& chunk) { dump.Write(chunk.chunk); });
  const double seconds = stopwatch.seconds();
  engine.End(submission.key, absl::CancelledError("measured"));
  if (!result.ok()) return result.status();
  HEADSTART_RETURN_IF_ERROR(dump.status());
  const auto executed = static_cast<double>(result->executed_blocks);
  std::printf(
      "{\"tokens\": %lld, \"piece\": %lld, \"preset\": \"%s\", \"gamma\": %g, \"asked_density\": "
      "%g, "
      "\"density\": %.4f, \"ttft_ms\": "
      "%.1f, \"attention_ms\": %.1f, \"selection_ms\": %.1f, \"device_gb\": %.2f, \"token\": %d, "
      "\"logprob\": %.4f}\n",
      static_cast<long long>(tokens), static_cast<long long>(arguments.piece),
      attention.preset.c_str(), attention.gamma, attention.density,
      executed / static_cast<double>(result->causal_blocks), seconds * 1e3,
      result->attention_seconds * 1e3, result->selection_seconds * 1e3, DeviceGigabytesInUse(),
      result->first_token.id, result->first_token.logprob);
  std::fflush(stdout);
  return absl::OkStatus();
}

// Submits `count` dense prompts together and waits for all. Returns tokens per second.
absl::StatusOr<double> RunTogether(Engine& engine, const Arguments& arguments, int64_t count,
                                   int64_t tokens) {
  std::vector<PrefillRequest> requests(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    PrefillRequest& request = requests[static_cast<size_t>(i)];
    HEADSTART_ASSIGN_OR_RETURN(request.token_ids,
                               MakePrompt(arguments, tokens, engine.config().vocab_size));
    request.token_ids[0] = static_cast<int32_t>(i);  // no prompt is the start of another
    request.request_id = absl::StrCat("prompt ", i);
  }
  const Stopwatch stopwatch;
  std::vector<Submission> submissions;
  for (PrefillRequest& request : requests) {
    HEADSTART_ASSIGN_OR_RETURN(submissions.emplace_back(), engine.Submit(std::move(request)));
  }
  for (const Submission& submission : submissions) {
    HEADSTART_RETURN_IF_ERROR(testing::Drain(*submission.reader, nullptr).status());
  }
  const double seconds = stopwatch.seconds();
  for (const Submission& submission : submissions) {
    engine.End(submission.key, absl::CancelledError("measured"));
  }
  return static_cast<double>(count * tokens) / seconds;
}

absl::Status RunAtOnce(Engine& engine, const Arguments& arguments, int64_t tokens) {
  const int64_t count = arguments.at_once;
  HEADSTART_ASSIGN_OR_RETURN(const double together, RunTogether(engine, arguments, count, tokens));
  const Stopwatch stopwatch;
  for (int64_t i = 0; i < count; ++i) {
    HEADSTART_RETURN_IF_ERROR(RunTogether(engine, arguments, 1, tokens).status());
  }
  const double alone = static_cast<double>(count * tokens) / stopwatch.seconds();
  HEADSTART_ASSIGN_OR_RETURN(const double one,
                             RunTogether(engine, arguments, 1, arguments.against));
  std::printf(
      "{\"prompts\": %lld, \"tokens\": %lld, \"piece\": %lld, \"against\": %lld, \"together\": "
      "%.0f, \"alone\": %.0f, \"one\": %.0f, \"together_over_alone\": %.3f, "
      "\"together_over_one\": %.3f}\n",
      static_cast<long long>(count), static_cast<long long>(tokens),
      static_cast<long long>(arguments.piece), static_cast<long long>(arguments.against), together,
      alone, one, together / alone, together / one);
  std::fflush(stdout);
  return absl::OkStatus();
}

absl::Status RunAllAtOnce(Engine& engine, const Arguments& arguments) {
  for (const int64_t tokens : arguments.tokens) {
    for (int64_t r = 0; r < arguments.repeat; ++r) {
      HEADSTART_RETURN_IF_ERROR(RunAtOnce(engine, arguments, tokens));
    }
  }
  return absl::OkStatus();
}

// What many prompts at once need beside what one needs.
void MakeRoomForAll(const Arguments& arguments, EngineOptions& options) {
  const int64_t longest = NumBlocks(options.max_prompt_tokens) * kBlockTokens;
  options.max_prompt_tokens = std::max(options.max_prompt_tokens, arguments.against);
  options.kv_pool_tokens = std::max(options.max_prompt_tokens, arguments.at_once * longest);
  options.max_requests = arguments.at_once;
}

absl::Status Run(const Arguments& arguments) {
  EngineOptions options;
  options.model_dir = arguments.model_dir;
  options.backend.device = arguments.device;
  options.max_prompt_tokens = *std::max_element(arguments.tokens.begin(), arguments.tokens.end());
  options.piece_tokens = arguments.piece;
  options.host_kv_bytes = arguments.host_bytes;
  options.backend.fastest_products = arguments.fastest;
  options.batch_tokens = arguments.batch;
  if (arguments.at_once > 0) MakeRoomForAll(arguments, options);
  HEADSTART_ASSIGN_OR_RETURN(auto backend, MakeBackend(options.backend));
  HEADSTART_ASSIGN_OR_RETURN(const auto engine, testing::MakeEngine(options, std::move(backend)));
  engine->Open();
  if (arguments.at_once > 0) return RunAllAtOnce(*engine, arguments);
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
        "[--gamma G ...] [--piece N] [--host-bytes N] [--repeat N] [--prompt FILE] [--dump FILE] "
        "[--trace FILE] [--at-once N [--batch N] [--against N]] [--fastest 1]\n");
    return 2;
  }
  const absl::Status status = headstart::Run(arguments);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
