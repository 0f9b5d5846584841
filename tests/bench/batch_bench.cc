// Many short prompts through the runner: in steps of several, one at a time, and as many tokens in
// one prompt. KV goes to host memory, read there by nobody.
//
//   batch_bench MODEL_DIR [--device cpu] [--dtype auto|bf16|f32] [--threads N] [--prompts 16]
//               [--tokens 256] [--batch 16] [--long N] [--repeat 5] [--idle 1]
//
// The ways take turns, `repeat` times; a line of JSON on standard output for each way: tokens/s
// (the median, and the best), how many times those of one at a time, and the same ratio of the CPU
// time of all threads, which a busy machine disturbs less. --long: a prompt of so many tokens, too.
// --idle: operations of the backend do nothing; what is left is what the host does, in CPU
// microseconds a layer of a step.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "engine/resolve.h"
#include "engine/run/local_runner.h"
#include "engine/stopwatch.h"
#include "kernels/base/status_macros.h"
#include "tests/testing/backend_wrapper.h"

namespace headstart {
namespace {

struct Arguments {
  std::string model_dir;
  BackendOptions backend;
  int64_t prompts = 16, tokens = 256, batch = 16, long_tokens = 0, repeat = 5;
  bool idle = false;
};

Arguments Parse(int argc, char** argv) {
  Arguments arguments;
  if (argc > 1) arguments.model_dir = argv[1];
  for (int i = 2; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--device") arguments.backend.device = value;
    if (name == "--dtype" && value == "bf16") arguments.backend.dtype = ComputeDType::kBF16;
    if (name == "--dtype" && value == "f32") arguments.backend.dtype = ComputeDType::kF32;
    if (name == "--threads") arguments.backend.num_threads = std::atoi(value.c_str());
    if (name == "--prompts") arguments.prompts = std::atoll(value.c_str());
    if (name == "--tokens") arguments.tokens = std::atoll(value.c_str());
    if (name == "--batch") arguments.batch = std::atoll(value.c_str());
    if (name == "--long") arguments.long_tokens = std::atoll(value.c_str());
    if (name == "--repeat") arguments.repeat = std::atoll(value.c_str());
    if (name == "--idle") arguments.idle = value != "0";
  }
  return arguments;
}

// Does nothing, at once.
class IdleBackend : public testing::BackendWrapper {
 public:
  using BackendWrapper::BackendWrapper;

  absl::Status Embed(absl::Span<const int32_t>, const Buffer&, Matrix) override {
    return absl::OkStatus();
  }
  absl::Status RmsNorm(Matrix, const Buffer&, float, Matrix) override { return absl::OkStatus(); }
  absl::Status Linear(const LinearWeight&, Matrix, Matrix, LinearOutput) override {
    return absl::OkStatus();
  }
  absl::Status RopeAndStoreKv(const RopeArgs&) override { return absl::OkStatus(); }
  absl::Status Attention(const AttentionArgs&) override { return absl::OkStatus(); }
  absl::Status SwiGlu(Matrix, Matrix) override { return absl::OkStatus(); }
  absl::StatusOr<std::unique_ptr<PendingCopy>> CopyOut(absl::Span<const HostCopy> copies) override {
    // The last one says what is not finite: nothing.
    std::memset(copies.back().to, 0, static_cast<size_t>(copies.back().bytes));
    return std::make_unique<Arrived>();
  }
  absl::Status Download(const void*, int64_t bytes, void* host) override {
    std::memset(host, 0, static_cast<size_t>(bytes));
    return absl::OkStatus();
  }

 private:
  class Arrived : public PendingCopy {
    bool Ready() override { return true; }
    absl::Status Wait() override { return absl::OkStatus(); }
  };
};

struct Cost {
  double seconds = 0, cpu_seconds = 0;
};

double CpuSeconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

class Bench {
 public:
  static absl::StatusOr<std::unique_ptr<Bench>> Create(const Arguments& arguments) {
    std::unique_ptr<Bench> bench(new Bench);
    HEADSTART_ASSIGN_OR_RETURN(bench->backend_, MakeBackend(arguments.backend));
    bench->idle_ = arguments.idle;
    if (arguments.idle) {
      bench->backend_ = std::make_unique<IdleBackend>(std::move(bench->backend_));
    }
    HEADSTART_RETURN_IF_ERROR(bench->Load(arguments));
    return bench;
  }

  // `prompts` prompts of `tokens` tokens each, `batch` of them in a step. What it costs.
  absl::StatusOr<Cost> Run(int64_t prompts, int64_t tokens, int64_t batch) {
    Cost cost;
    for (int64_t done = 0; done < prompts; done += batch) {
      const int64_t count = std::min(batch, prompts - done);
      for (int64_t begin = 0; begin < tokens; begin += max_rows_ / count) {
        HEADSTART_RETURN_IF_ERROR(RunStep(count, tokens, begin, cost));
      }
    }
    return cost;
  }

  int32_t num_layers() const { return model_.config.num_layers; }

 private:
  absl::Status Load(const Arguments& arguments) {
    EngineOptions options;
    options.model_dir = arguments.model_dir;
    max_rows_ = NumBlocks(std::max(arguments.batch * arguments.tokens, arguments.long_tokens)) *
                kBlockTokens;
    max_rows_ = std::min<int64_t>(max_rows_, 8192);
    options.piece_tokens = max_rows_;
    options.kv_pool_tokens = std::max(arguments.batch * NumBlocks(arguments.tokens) * kBlockTokens,
                                      arguments.long_tokens);
    options.max_prompt_tokens = std::max(arguments.tokens, arguments.long_tokens);
    HEADSTART_ASSIGN_OR_RETURN(model_, ResolveModel(options, *backend_));
    HEADSTART_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(options.model_dir));
    HEADSTART_ASSIGN_OR_RETURN(
        ModelWeights weights,
        LoadWeights(model_.config, *files, *backend_, model_.options.max_prompt_tokens, nullptr));
    LocalRunnerOptions running;
    running.geometry = model_.geometry;
    running.num_pages = model_.options.kv_pool_tokens / kBlockTokens;
    running.num_slots = static_cast<int32_t>(arguments.batch);
    running.max_pieces = arguments.batch;
    running.max_rows = max_rows_;
    running.max_prompt_tokens = model_.options.max_prompt_tokens;
    HEADSTART_ASSIGN_OR_RETURN(
        runner_, LocalRunner::Create(model_.config, std::move(weights), running, *backend_));
    const int64_t chunks = (running.num_pages + arguments.batch) * num_layers();
    HEADSTART_ASSIGN_OR_RETURN(HostBuffer memory,
                               backend_->AllocateHost(chunks * model_.geometry.chunk_bytes()));
    host_ = std::make_unique<HostPages>(std::move(memory), model_.geometry.chunk_bytes(), chunks);
    for (int64_t i = 0; i < std::max(arguments.tokens, arguments.long_tokens); ++i) {
      ids_.push_back(static_cast<int32_t>((i * 7919 + 13) % model_.config.vocab_size));
    }
    pages_.resize(static_cast<size_t>(running.num_pages));
    std::iota(pages_.begin(), pages_.end(), 0);
    return absl::OkStatus();
  }

  // The tokens from `begin` on, as many as go into a step.
  absl::Status RunStep(int64_t count, int64_t tokens, int64_t begin, Cost& cost) {
    Step step;
    const int64_t pages = NumBlocks(tokens), end = std::min(begin + max_rows_ / count, tokens);
    for (int64_t i = 0; i < count; ++i) {
      Piece& piece = step.pieces.emplace_back();
      piece.slot = static_cast<int32_t>(i);
      piece.token_ids = absl::MakeConstSpan(ids_).subspan(begin, end - begin);
      piece.first_position = begin;
      piece.ends_prompt = end == tokens && !idle_;  // idle logits are none
      piece.pages = absl::MakeConstSpan(pages_).subspan(i * pages, pages);
      piece.starts_slot = begin == 0;
      piece.sampling = &sampling_;
      piece.prompt_tokens = tokens;
      piece.chunks = CutIntoChunks(begin, end - begin, 0, model_.geometry.chunk_pages);
      piece.host = host_->Take(std::ssize(piece.chunks) * num_layers(), 1);
      piece.shipment = std::make_shared<Shipment>(model_.geometry, Shipment::Keep::kUntilClosed,
                                                  std::vector<KvPart>());
    }
    const Stopwatch stopwatch;
    const double cpu_seconds = CpuSeconds();
    const StepResult results = runner_->Run(step, nullptr);
    cost.seconds += stopwatch.seconds();
    cost.cpu_seconds += CpuSeconds() - cpu_seconds;
    for (const PieceResult& result : results) HEADSTART_RETURN_IF_ERROR(result.status);
    return absl::OkStatus();
  }

  // Order matters: what lies in the backend's memory goes before the backend.
  std::unique_ptr<Backend> backend_;
  ResolvedModel model_;
  std::unique_ptr<LocalRunner> runner_;
  std::unique_ptr<HostPages> host_;
  bool idle_ = false;
  int64_t max_rows_ = 0;
  std::vector<int32_t> ids_, pages_;
  const SamplingOptions sampling_ = {};
};

struct Way {
  const char* name;
  int64_t prompts, tokens, batch;
  std::vector<double> seconds = {}, cpu_seconds = {};

  double TokensPerSecond(double s) const { return static_cast<double>(prompts * tokens) / s; }
  double Median() const { return TokensPerSecond(seconds[seconds.size() / 2]); }
  double CpuMedian() const { return TokensPerSecond(cpu_seconds[cpu_seconds.size() / 2]); }
};

absl::Status Run(const Arguments& arguments) {
  HEADSTART_ASSIGN_OR_RETURN(const auto bench, Bench::Create(arguments));
  std::vector<Way> ways = {{"one at a time", arguments.prompts, arguments.tokens, 1},
                           {"batches", arguments.prompts, arguments.tokens, arguments.batch}};
  if (arguments.long_tokens > 0) ways.push_back({"one prompt", 1, arguments.long_tokens, 1});
  for (int64_t r = -1; r < arguments.repeat; ++r) {  // the first is not counted
    for (Way& way : ways) {
      HEADSTART_ASSIGN_OR_RETURN(const Cost cost, bench->Run(way.prompts, way.tokens, way.batch));
      if (r < 0) continue;
      way.seconds.push_back(cost.seconds);
      way.cpu_seconds.push_back(cost.cpu_seconds);
    }
  }
  for (Way& way : ways) {
    std::sort(way.seconds.begin(), way.seconds.end());
    std::sort(way.cpu_seconds.begin(), way.cpu_seconds.end());
  }
  for (const Way& way : ways) {
    const int64_t steps = (way.prompts + way.batch - 1) / way.batch;
    std::printf(
        "{\"way\": \"%s\", \"prompts\": %lld, \"tokens\": %lld, \"batch\": %lld, "
        "\"tokens_per_s\": %.0f, \"best\": %.0f, \"ratio\": %.3f, \"cpu_ratio\": %.3f, "
        "\"cpu_us_per_layer\": %.1f}\n",
        way.name, static_cast<long long>(way.prompts), static_cast<long long>(way.tokens),
        static_cast<long long>(way.batch), way.Median(), way.TokensPerSecond(way.seconds[0]),
        way.Median() / ways[0].Median(), way.CpuMedian() / ways[0].CpuMedian(),
        way.cpu_seconds[way.cpu_seconds.size() / 2] /
            static_cast<double>(steps * bench->num_layers()) * 1e6);
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace headstart

int main(int argc, char** argv) {
  const headstart::Arguments arguments = headstart::Parse(argc, argv);
  if (arguments.model_dir.empty() || arguments.prompts < 1 || arguments.tokens < 1 ||
      arguments.batch < 1 || arguments.repeat < 1) {
    std::fprintf(
        stderr,
        "usage: batch_bench MODEL_DIR [--device cpu] [--dtype auto|bf16|f32] [--threads N] "
        "[--prompts N] [--tokens N] [--batch N] [--long N] [--repeat N] [--idle 1]\n");
    return 2;
  }
  const absl::Status status = headstart::Run(arguments);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
