// A LocalRunner over a tiny model, and prompts whose KV it ships.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/run/local_runner.h"
#include "tests/engine/engine_fixture.h"

namespace headstart {

// Notes the logits that are read, and tells times by a clock of its own.
class WatchedBackend : public testing::FaultBackend {
 public:
  WatchedBackend(std::unique_ptr<Backend> inner, int32_t vocab_size)
      : FaultBackend(std::move(inner)), logits_bytes_(vocab_size * int64_t{sizeof(float)}) {}

  absl::Status Download(const void* device, int64_t bytes, void* host) override {
    HEADSTART_RETURN_IF_ERROR(FaultBackend::Download(device, bytes, host));
    if (bytes != logits_bytes_) return absl::OkStatus();
    auto& row = logits.emplace_back(static_cast<size_t>(bytes));
    std::memcpy(row.data(), host, row.size());
    return absl::OkStatus();
  }
  absl::Status Linear(const LinearWeight& weight, Matrix in, Matrix out,
                      LinearOutput mode) override {
    if (out.cols * int64_t{sizeof(float)} == logits_bytes_) head_rows.insert(out.rows);
    return FaultBackend::Linear(weight, in, out, mode);
  }
  absl::StatusOr<BackendTimes> TakeTimes() override {
    HEADSTART_RETURN_IF_ERROR(FaultBackend::TakeTimes().status());
    // 1, 2, 4, ...: every sum tells what it is made of.
    return BackendTimes{.attention_seconds = std::exchange(next_time, 2 * next_time)};
  }

  std::vector<std::vector<std::byte>> logits;  // in the order of their reading
  std::set<int64_t> head_rows;                 // numbers of rows that the head had at once
  double next_time = 1;

 private:
  const int64_t logits_bytes_;
};

// A request as the scheduler would hold it.
struct TestPrompt {
  std::vector<int32_t> ids;
  const ProxyAttnOptions* attention = nullptr;
  int32_t slot = 0;
  std::vector<int32_t> pages;
  std::shared_ptr<Shipment> shipment;

  int64_t num_tokens() const { return static_cast<int64_t>(ids.size()); }
};

// By layer and page: the tokens that a prompt has there, plane by plane.
using ShippedKv = std::map<std::pair<int32_t, int64_t>, std::vector<std::byte>>;

// What a prompt came to.
struct Outcome {
  ShippedKv kv;
  std::vector<std::byte> logits;
  PrefillResult result;
};

// Gives one list of steps at the n-th question, and keeps what came of them.
class UrgentSteps : public UrgentWork {
 public:
  UrgentSteps(int at, std::vector<Step> steps) : at_(at), steps_(std::move(steps)) {}
  std::optional<Step> Next() override {
    if (questions++ < at_ || next_ == steps_.size()) return std::nullopt;
    if (before_step) before_step();
    return std::move(steps_[next_++]);
  }
  void Finish(Step step, StepResult result) override {
    finished.emplace_back(std::move(step), std::move(result));
    if (after_step) after_step();
  }

  int questions = 0;
  std::function<void()> before_step, after_step;
  std::vector<std::pair<Step, StepResult>> finished;

 private:
  const int at_;
  std::vector<Step> steps_;
  size_t next_ = 0;
};

class RunnerTest : public ::testing::TestWithParam<ComputeDType> {
 protected:
  static constexpr int32_t kLayers = 4;
  static constexpr int32_t kVocab = 251;
  static constexpr int64_t kPages = 64;
  static constexpr int64_t kPieceTokens = 384;

  void SetUp() override {
    testing::TinyModelOptions model;
    model.num_layers = kLayers;
    model.vocab_size = kVocab;
    ASSERT_OK(testing::WriteTinyModel(dir_.path(), model));
    ASSERT_OK_AND_ASSIGN(config_, ReadModelConfig(dir_.path()));
    auto inner = MakeBackend({.dtype = GetParam(), .num_threads = 2});
    if (!inner.ok()) GTEST_SKIP() << inner.status();
    backend_ = std::make_unique<WatchedBackend>(*std::move(inner), kVocab);
    ASSERT_NO_FATAL_FAILURE(MakeRunner());
    constexpr int64_t kChunks = 1024;
    ASSERT_OK_AND_ASSIGN(HostBuffer memory,
                         backend_->AllocateHost(kChunks * geometry_.chunk_bytes()));
    host_ = std::make_unique<HostPages>(std::move(memory), geometry_.chunk_bytes(), kChunks);
    sparse_.enabled = true;
    sparse_.num_proxies = 2;
    sparse_.stride = 4;
    sparse_.gamma = 0.3f;
    sparse_.floor_tokens = 128;
    sparse_.dense_tail_blocks = 1;
    sparse_.dense_below_tokens = 0;
    sparse_.dense_above_density = 1;
    sparse_.dense_layers = {1};
  }

  void MakeRunner() {
    runner_.reset();
    ASSERT_OK_AND_ASSIGN(const auto files, WeightFiles::Open(dir_.path()));
    ASSERT_OK_AND_ASSIGN(ModelWeights weights,
                         LoadWeights(config_, *files, *backend_, 2048, nullptr));
    LocalRunnerOptions options;
    options.geometry.num_layers = kLayers;
    options.geometry.heads = config_.heads;
    options.geometry.dtype = backend_->compute_dtype();
    options.geometry.chunk_pages = 2;
    options.num_pages = kPages;
    options.num_slots = 16;
    options.max_rows = 2048;
    options.urgent_rows = 1024;
    options.max_pieces = 16;
    options.max_prompt_tokens = 2048;
    geometry_ = options.geometry;
    ASSERT_OK_AND_ASSIGN(runner_,
                         LocalRunner::Create(config_, std::move(weights), options, *backend_));
  }

  // A prompt of other tokens than those of another slot, with pages in falling order.
  TestPrompt NewPrompt(int64_t num_tokens, const ProxyAttnOptions* attention = nullptr) {
    TestPrompt prompt;
    prompt.slot = next_slot_++ % 16;
    prompt.ids = RandomTokens(num_tokens, kVocab, static_cast<uint32_t>(next_slot_));
    prompt.attention = attention;
    Renew(prompt);
    return prompt;
  }
  // The same prompt once more: nothing of it was computed.
  void Renew(TestPrompt& prompt) {
    prompt.pages.clear();
    for (int64_t i = 0; i < NumBlocks(prompt.num_tokens()); ++i) {
      next_page_ = (next_page_ + kPages - 1) % kPages;
      prompt.pages.push_back(static_cast<int32_t>(next_page_));
    }
    prompt.shipment =
        std::make_shared<Shipment>(geometry_, Shipment::Keep::kUntilClosed, std::vector<KvPart>());
  }
  // Tokens [begin, end), whose KV goes out from `ship_from` on.
  Piece PieceOf(const TestPrompt& prompt, int64_t begin, int64_t end, int64_t ship_from) {
    Piece piece;
    piece.slot = prompt.slot;
    piece.token_ids = absl::MakeConstSpan(prompt.ids).subspan(begin, end - begin);
    piece.first_position = begin;
    piece.ends_prompt = end == prompt.num_tokens();
    piece.pages = prompt.pages;
    piece.starts_slot = begin == 0;
    piece.attention = prompt.attention;
    piece.sampling = &sampling_;
    piece.prompt_tokens = prompt.num_tokens();
    piece.shipment = prompt.shipment;
    piece.chunks = CutIntoChunks(ship_from, end - ship_from, 0, geometry_.chunk_pages);
    piece.host = host_->Take(kLayers * std::ssize(piece.chunks), 1);
    return piece;
  }
  Piece PieceOf(const TestPrompt& prompt, int64_t begin, int64_t end) {
    return PieceOf(prompt, begin, end, begin);
  }
  // Copies out what was found of a prompt: tokens [0, end).
  Piece FoundPiece(const TestPrompt& prompt, int64_t end) {
    Piece piece = PieceOf(prompt, 0, end);
    piece.token_ids = {};
    piece.ends_prompt = false;
    return piece;
  }
  static Step StepOf(Piece piece) {
    Step step;
    step.pieces.push_back(std::move(piece));
    return step;
  }
  // The whole prompt's last piece, after the others were run, one a step.
  Piece LastPiece(const TestPrompt& prompt) {
    int64_t begin = 0;
    for (; begin + kPieceTokens < prompt.num_tokens(); begin += kPieceTokens) {
      Step step = StepOf(PieceOf(prompt, begin, begin + kPieceTokens));
      EXPECT_OK(runner_->Run(step, nullptr)[0].status);
    }
    return PieceOf(prompt, begin, prompt.num_tokens());
  }

  // What was shipped so far.
  ShippedKv Shipped(const TestPrompt& prompt) {
    ShippedKv kv;
    auto reader = prompt.shipment->Open(WholeKv(geometry_), 0);
    EXPECT_OK(reader);
    for (auto event = (*reader)->Next();; event = (*reader)->Next()) {
      const auto* chunk = std::get_if<ShipmentReader::Chunk>(&event);
      if (chunk == nullptr) return kv;
      AddPages(chunk->chunk, kv);
    }
  }
  Outcome OutcomeOf(const TestPrompt& prompt, const PieceResult& result) {
    EXPECT_OK(result.status);
    Outcome outcome{Shipped(prompt), {}, result.result};
    if (!backend_->logits.empty()) outcome.logits = backend_->logits.back();
    return outcome;
  }
  // The prompt with nothing beside it, on pages of its own.
  Outcome Alone(TestPrompt& prompt) {
    Renew(prompt);
    Step step = StepOf(LastPiece(prompt));
    const StepResult result = runner_->Run(step, nullptr);
    return OutcomeOf(prompt, result[0]);
  }
  // Bit for bit, and all of it.
  void ExpectSame(const Outcome& got, const Outcome& expected) {
    EXPECT_EQ(got.kv.size(), expected.kv.size());
    EXPECT_TRUE(got.kv == expected.kv);
    EXPECT_TRUE(got.logits == expected.logits);
    EXPECT_EQ(got.result.first_token.id, expected.result.first_token.id);
    EXPECT_EQ(got.result.first_token.logprob, expected.result.first_token.logprob);
    EXPECT_EQ(got.result.layer_executed_blocks, expected.result.layer_executed_blocks);
    EXPECT_EQ(got.result.layer_causal_blocks, expected.result.layer_causal_blocks);
    EXPECT_EQ(got.result.layer_predicted_blocks, expected.result.layer_predicted_blocks);
    EXPECT_EQ(got.result.layer_density, expected.result.layer_density);
    EXPECT_EQ(got.result.executed_blocks, expected.result.executed_blocks);
    EXPECT_EQ(got.result.causal_blocks, expected.result.causal_blocks);
  }

  // Order matters: what lies in the backend's memory goes before the backend.
  testing::TempDir dir_;
  ModelConfig config_;
  KvGeometry geometry_;
  std::unique_ptr<WatchedBackend> backend_;
  std::unique_ptr<LocalRunner> runner_;
  std::unique_ptr<HostPages> host_;
  ProxyAttnOptions sparse_;
  const SamplingOptions sampling_ = {};

 private:
  void AddPages(const KvChunk& chunk, ShippedKv& kv) {
    const int64_t row_bytes = geometry_.heads.head_dim * DTypeBytes(geometry_.dtype);
    const int64_t end = chunk.tokens.begin + chunk.tokens.count;
    for (int64_t token = chunk.tokens.begin; token < end; token += kBlockTokens) {
      const int64_t used = std::min(kBlockTokens, end - token) * row_bytes;
      const std::byte* page = chunk.memory->data() +
                              (token - chunk.tokens.begin) / kBlockTokens * geometry_.page_bytes();
      std::vector<std::byte>& bytes = kv[{chunk.layer, token / kBlockTokens}];
      EXPECT_TRUE(bytes.empty()) << "layer " << chunk.layer << ", token " << token;
      for (int32_t plane = 0; plane < 2 * geometry_.heads.num_kv_heads; ++plane) {
        const std::byte* from = page + plane * kBlockTokens * row_bytes;
        bytes.insert(bytes.end(), from, from + used);
      }
    }
  }

  int32_t next_slot_ = 0;
  int64_t next_page_ = 0;
};

}  // namespace headstart
