#include "engine/engine.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cpu/reference_ops.h"
#include "tests/engine/engine_fixture.h"
#include "tests/testing/tensor_compare.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::KvCollector;
using testing::StatusIs;
using testing::TinyModelOptions;

class EngineCreateTest : public EngineTest {
 protected:
  void SetUp() override { ASSERT_OK(testing::WriteTinyModel(dir_ / "tiny", model_)); }
  absl::Status CreateWith(const std::function<void(EngineOptions&)>& change) {
    EngineOptions options = Options(dir_ / "tiny");
    change(options);
    return TestEngine::Create(options).status();
  }
  TinyModelOptions model_;
};

TEST_F(EngineCreateTest, ResolvesZerosFromTheModel) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, TestEngine::Create(Options(dir_ / "tiny")));
  const EngineOptions& options = test.engine->options();
  EXPECT_EQ(options.model_name, "tiny");
  EXPECT_EQ(options.max_prompt_tokens, 2048);
  EXPECT_EQ(options.batch_tokens, 2048);
  EXPECT_EQ(options.kv_pool_tokens, 5 * 2048);
  EXPECT_EQ(test.pool().num_pages(), 5 * 16);
  EXPECT_EQ(test.engine->geometry().dtype, DType::kF32);
  EXPECT_EQ(test.engine->model_hash().size(), 64);
}

TEST_F(EngineCreateTest, NamesTheModelAfterItsFolder) {
  EngineOptions options = Options((dir_ / "tiny") + "/");
  ASSERT_OK_AND_ASSIGN(const TestEngine slash, TestEngine::Create(options));
  EXPECT_EQ(slash.engine->options().model_name, "tiny");
  options.model_name = "chosen";
  ASSERT_OK_AND_ASSIGN(const TestEngine chosen, TestEngine::Create(options));
  EXPECT_EQ(chosen.engine->options().model_name, "chosen");
}

TEST_F(EngineCreateTest, ThePoolBoundsThePrompt) {
  EngineOptions options = Options(dir_ / "tiny");
  options.kv_pool_tokens = 300;
  ASSERT_OK_AND_ASSIGN(const TestEngine test, TestEngine::Create(options));
  EXPECT_EQ(test.engine->options().kv_pool_tokens, 384);  // whole pages
  EXPECT_EQ(test.engine->options().max_prompt_tokens, 384);
}

TEST_F(EngineCreateTest, RefusesOptionsByName) {
  const auto is = [](const char* message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  EXPECT_THAT(CreateWith([](auto& o) { o.piece_tokens = 100; }),
              is("piece_tokens=100 is not a positive multiple of 128"));
  EXPECT_THAT(CreateWith([](auto& o) { o.piece_tokens = 0; }), is("piece_tokens=0"));
  EXPECT_THAT(CreateWith([](auto& o) { o.max_prompt_tokens = 2049; }),
              is("max_prompt_tokens=2049 is not in [1, 2048]"));
  EXPECT_THAT(CreateWith([](auto& o) { o.max_prompt_tokens = -1; }), is("max_prompt_tokens=-1"));
  EXPECT_THAT(CreateWith([](auto& o) { o.kv_pool_tokens = -1; }), is("kv_pool_tokens=-1"));
  EXPECT_THAT(CreateWith([](auto& o) { o.kv_pool_tokens = std::numeric_limits<int64_t>::max(); }),
              is("kv_pool_tokens=9223372036854775807"));
}

class EngineRunTest : public EngineTest {
 protected:
  // A prompt of `num_tokens`, run; its KV is in the sink.
  absl::StatusOr<PrefillResult> Run(const TestEngine& test, int64_t num_tokens, KvCollector& sink) {
    PrefillRequest job;
    job.token_ids = RandomTokens(num_tokens);
    return sink.Run(*test.engine, job);
  }
  // Keys and values of all layers, one behind the other.
  static std::vector<std::byte> AllKv(const TestEngine& test, const KvCollector& sink) {
    std::vector<std::byte> all;
    for (int32_t layer = 0; layer < test.engine->config().num_layers; ++layer) {
      for (const auto& plane : {test.Keys(sink, layer), test.Values(sink, layer)}) {
        all.insert(all.end(), plane.begin(), plane.end());
      }
    }
    return all;
  }
};

TEST_F(EngineRunTest, ValidatesJobs) {
  ASSERT_OK(testing::WriteTinyModel(dir_.path(), {}));
  EngineOptions options = Options(dir_.path());
  options.max_prompt_tokens = 1024;
  options.kv_pool_tokens = 512;
  ASSERT_OK_AND_ASSIGN(const TestEngine test, TestEngine::Create(options));
  const auto check = [&](const std::function<void(PrefillRequest&)>& change) {
    PrefillRequest job;
    job.token_ids = {1, 2, 3};
    change(job);
    KvCollector sink;
    const absl::Status valid = test.engine->Validate(job);
    EXPECT_EQ(sink.Run(*test.engine, job).status(), valid);
    return valid;
  };
  const auto is = [](const char* message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  EXPECT_OK(check([](PrefillRequest&) {}));
  EXPECT_OK(check([](PrefillRequest& j) { j.token_ids.assign(512, 255); }));
  EXPECT_THAT(check([](PrefillRequest& j) { j.token_ids.clear(); }), is("token_ids is empty"));
  EXPECT_THAT(check([](PrefillRequest& j) { j.token_ids[2] = 256; }),
              is("token_ids[2]=256 is not below vocab_size 256"));
  EXPECT_THAT(check([](PrefillRequest& j) { j.token_ids[1] = -1; }),
              is("token_ids[1]=-1 is negative"));
  EXPECT_THAT(check([](PrefillRequest& j) { j.token_ids.assign(1025, 0); }),
              is("token_ids has 1025 ids, limit 1024"));
  EXPECT_THAT(check([](PrefillRequest& j) { j.token_ids.assign(513, 0); }),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("token_ids has 513 ids, the KV pool holds 512")));
  EXPECT_THAT(check([](PrefillRequest& j) { j.skip_tokens = 3; }),
              is("skip_tokens=3 is not below the 3 token_ids"));
  EXPECT_THAT(check([](PrefillRequest& j) { j.attention.stride = 3; }), is("attention.stride=3"));
  EXPECT_THAT(check([](PrefillRequest& j) {
                j.attention.dense_layers = {1, 2};
              }),
              is("attention.dense_layers=2 is not below the 2 layers"));
  EXPECT_THAT(check([](PrefillRequest& j) { j.sampling.top_p = 2; }), is("sampling.top_p=2"));
}

TEST_F(EngineRunTest, ShipsEveryLayerInOrderAndWholePages) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}, /*piece_tokens=*/256));
  KvCollector sink;
  ASSERT_OK(Run(test, 600, sink));
  std::vector<std::vector<int64_t>> chunks;
  for (const testing::CollectedChunk& chunk : sink.chunks()) {
    chunks.push_back({chunk.layer, chunk.tokens.begin, chunk.tokens.count});
    EXPECT_EQ(chunk.data.size(), 2 * 2 * 32 * 4 * chunk.tokens.count);
  }
  using Chunk = std::vector<int64_t>;
  EXPECT_THAT(chunks, ElementsAre(Chunk{0, 0, 256}, Chunk{1, 0, 256}, Chunk{0, 256, 256},
                                  Chunk{1, 256, 256}, Chunk{0, 512, 88}, Chunk{1, 512, 88}));
  EXPECT_EQ(test.engine->layers_done(), 6);
}

TEST_F(EngineRunTest, ChunksStayBelowAMebibyte) {
  TinyModelOptions model;
  model.num_kv_heads = 4;
  model.head_dim = 64;  // a page has 2 * 4 * 128 * 64 * 4 bytes = 256 KiB
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine(model));
  KvCollector sink;
  ASSERT_OK(Run(test, 128 * 9 + 1, sink));
  std::vector<int64_t> counts;
  for (const testing::CollectedChunk& chunk : sink.chunks()) {
    EXPECT_LE(chunk.data.size(), 1 << 20);
    counts.push_back(chunk.tokens.count);
  }
  EXPECT_THAT(counts, ElementsAre(512, 512, 129, 512, 512, 129));
}

TEST_F(EngineRunTest, APageLargerThanAMebibyteIsAChunk) {
  TinyModelOptions model;
  model.num_heads = model.num_kv_heads = 8;
  model.head_dim = 192;  // a page has 1.5 MiB
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine(model));
  KvCollector sink;
  ASSERT_OK(Run(test, 130, sink));
  std::vector<int64_t> counts;
  for (const testing::CollectedChunk& chunk : sink.chunks()) counts.push_back(chunk.tokens.count);
  EXPECT_THAT(counts, ElementsAre(128, 2, 128, 2));
}

TEST_F(EngineRunTest, ReportsWhatItDid) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}));
  KvCollector sink;
  ASSERT_OK_AND_ASSIGN(const PrefillResult result, Run(test, 300, sink));
  EXPECT_THAT(result.layer_density, ElementsAre(1.0f, 1.0f));
  // Four heads: six causal blocks in the first layer, the last row's three in the last.
  EXPECT_EQ(result.causal_blocks, 4 * (6 + 3));
  EXPECT_EQ(result.executed_blocks, result.causal_blocks);
  EXPECT_THAT(result.layer_predicted_blocks, ElementsAre(4 * 6, 4 * 3));  // no budget: what ran
  EXPECT_EQ(result.dense_fallbacks, 0);
  EXPECT_GT(result.attention_seconds, 0);
  EXPECT_EQ(result.room_wait_seconds, 0);
  EXPECT_GT(result.compute_seconds, result.attention_seconds);
}

TEST_F(EngineRunTest, RequestAfterRequestGivesTheSameBytes) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}, 256));
  std::vector<std::byte> first;
  for (int round = 0; round < 3; ++round) {
    KvCollector sink;
    PrefillRequest job;
    job.token_ids = RandomTokens(500);
    job.attention.enabled = round == 1;  // something else in between
    job.attention.dense_below_tokens = 0;
    ASSERT_OK(sink.Run(*test.engine, job));
    if (round == 0) first = AllKv(test, sink);
    if (round == 2) {
      EXPECT_EQ(AllKv(test, sink), first);
    }
  }
}

TEST_F(EngineRunTest, SparseRequestsRepeatToo) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}, 512));
  PrefillRequest job;
  job.token_ids = RandomTokens(1300);
  job.attention.enabled = true;
  job.attention.gamma = 0.3f;
  job.attention.floor_tokens = 256;
  job.attention.dense_below_tokens = 0;
  job.attention.dense_above_density = 1.0f;
  KvCollector first, second;
  ASSERT_OK_AND_ASSIGN(const PrefillResult a, first.Run(*test.engine, job));
  ASSERT_OK_AND_ASSIGN(const PrefillResult b, second.Run(*test.engine, job));
  EXPECT_LT(a.layer_density[0], 0.9f);
  EXPECT_EQ(AllKv(test, second), AllKv(test, first));
  EXPECT_EQ(b.layer_density, a.layer_density);
  EXPECT_EQ(b.first_token.id, a.first_token.id);
}

// Dense results do not depend on how the prompt is cut or on how many threads share the work. Sums
// are taken in another order where a matrix product sees other shapes, so this is about fp32
// rounding, not about bits.
TEST_F(EngineRunTest, DenseResultsDependNeitherOnChunkSizeNorOnThreads) {
  std::vector<float> whole;
  SampledToken whole_token;
  for (const auto& [piece_tokens, threads] : std::vector<std::pair<int64_t, int32_t>>{
           {2048, 2}, {512, 2}, {128, 2}, {2048, 1}, {512, 5}}) {
    ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}, piece_tokens, threads));
    KvCollector sink;
    ASSERT_OK_AND_ASSIGN(const PrefillResult result, Run(test, 1500, sink));
    const std::vector<std::byte> bytes = AllKv(test, sink);
    std::vector<float> kv(bytes.size() / sizeof(float));
    std::memcpy(kv.data(), bytes.data(), bytes.size());
    if (whole.empty()) {
      whole = kv;
      whole_token = result.first_token;
    }
    EXPECT_TRUE(
        testing::TensorsMatch(kv, whole, {.abs = 1e-4, .rel = 1e-4, .min_cosine = 1 - 1e-9}))
        << piece_tokens << " tokens a chunk, " << threads << " threads";
    EXPECT_EQ(result.first_token.id, whole_token.id);
    EXPECT_NEAR(result.first_token.logprob, whole_token.logprob, 1e-4);
  }
}

TEST_F(EngineRunTest, FullBudgetEqualsDenseBitForBit) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}, 512));
  KvCollector dense;
  ASSERT_OK(Run(test, 1000, dense));
  PrefillRequest job;
  job.token_ids = RandomTokens(1000);
  job.attention.enabled = true;
  job.attention.gamma = 1.0f;
  job.attention.dense_below_tokens = 0;
  KvCollector full;
  ASSERT_OK(full.Run(*test.engine, job));
  EXPECT_EQ(AllKv(test, full), AllKv(test, dense));
}

TEST_F(EngineRunTest, DenseLayersStayDense) {
  TinyModelOptions model;
  model.num_layers = 3;
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine(model));
  PrefillRequest job;
  job.token_ids = RandomTokens(1300);
  job.attention.enabled = true;
  job.attention.gamma = 0.3f;
  job.attention.floor_tokens = 256;
  job.attention.dense_below_tokens = 0;
  job.attention.dense_above_density = 1.0f;
  job.attention.dense_layers = {1};
  KvCollector sink;
  ASSERT_OK_AND_ASSIGN(const PrefillResult result, sink.Run(*test.engine, job));
  EXPECT_LT(result.layer_density[0], 0.9f);
  EXPECT_EQ(result.layer_density[1], 1.0f);
}

class PredictedBlocksTest : public EngineRunTest {
 protected:
  // 11 query blocks, sparse as their budgets say: no dense tail, no fallback.
  void SetUp() override {
    job_.token_ids = RandomTokens(1300);
    job_.attention.enabled = true;
    job_.attention.gamma = 0.3f;
    job_.attention.floor_tokens = 256;
    job_.attention.dense_below_tokens = 0;
    job_.attention.dense_above_density = 1.0f;
    job_.attention.dense_tail_blocks = 0;
  }
  absl::StatusOr<PrefillResult> RunJob(const TestEngine& test) {
    KvCollector sink;
    return sink.Run(*test.engine, job_);
  }

  PrefillRequest job_;
};

TEST_F(PredictedBlocksTest, AreThoseThatRunWhenOnlyBudgetsDecide) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}));
  ASSERT_OK_AND_ASSIGN(const PrefillResult result, RunJob(test));
  EXPECT_LT(result.layer_executed_blocks[0], result.layer_causal_blocks[0]);
  EXPECT_LT(result.layer_executed_blocks[1], result.layer_causal_blocks[1]);
  EXPECT_EQ(result.layer_predicted_blocks, result.layer_executed_blocks);
}

TEST_F(PredictedBlocksTest, CountNeitherTheDenseTailNorAFallback) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}));
  job_.attention.dense_tail_blocks = 1;
  ASSERT_OK_AND_ASSIGN(const PrefillResult tail, RunJob(test));
  EXPECT_LT(tail.layer_predicted_blocks[0], tail.layer_executed_blocks[0]);
  EXPECT_LT(tail.layer_executed_blocks[0], tail.layer_causal_blocks[0]);
  job_.attention.dense_above_density = 0.0f;
  ASSERT_OK_AND_ASSIGN(const PrefillResult fallback, RunJob(test));
  EXPECT_EQ(fallback.layer_executed_blocks, fallback.layer_causal_blocks);
  EXPECT_EQ(fallback.layer_predicted_blocks[0], tail.layer_predicted_blocks[0]);
}

// The last chunk's budgets speak for the whole prompt. Here all are the floor.
TEST_F(PredictedBlocksTest, CoverAllChunksOfAPrompt) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}, 512));
  job_.attention.gamma = 0.01f;
  job_.attention.floor_tokens = 512;
  ASSERT_OK_AND_ASSIGN(const PrefillResult result, RunJob(test));
  // Four heads with four blocks each: 1 + 2 + 3 + 8 * 4, and the last row's.
  EXPECT_THAT(result.layer_predicted_blocks, ElementsAre(4 * 38, 4 * 4));
  EXPECT_EQ(result.layer_predicted_blocks, result.layer_executed_blocks);
}

TEST_F(PredictedBlocksTest, AreThoseThatRunWithoutBudgets) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}));
  job_.attention.budget = BudgetRule::kRow;
  ASSERT_OK_AND_ASSIGN(const PrefillResult result, RunJob(test));
  EXPECT_LT(result.executed_blocks, result.causal_blocks);
  EXPECT_EQ(result.layer_predicted_blocks, result.layer_executed_blocks);
}

TEST_F(EngineRunTest, SamplesTheFirstToken) {
  ASSERT_OK_AND_ASSIGN(const TestEngine test, MakeEngine({}));
  PrefillRequest job;
  job.token_ids = RandomTokens(50);
  job.sampling.temperature = 1.0f;
  std::set<int32_t> ids;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    job.sampling.seed = seed;
    KvCollector a, b;
    ASSERT_OK_AND_ASSIGN(const PrefillResult once, a.Run(*test.engine, job));
    ASSERT_OK_AND_ASSIGN(const PrefillResult twice, b.Run(*test.engine, job));
    EXPECT_EQ(once.first_token.id, twice.first_token.id);
    ids.insert(once.first_token.id);
  }
  EXPECT_GT(ids.size(), 5);
}

// A backend that searches for algorithms sees a prompt of every size, halved from the largest chunk
// on, at start.
TEST_F(EngineTest, WarmsUpABackendThatLearnsShapes) {
  ASSERT_OK(testing::WriteTinyModel(dir_.path(), testing::TinyModelOptions()));
  EngineOptions options = Options(dir_.path());
  options.piece_tokens = 256;
  for (const bool learns : {false, true}) {
    ASSERT_OK_AND_ASSIGN(auto inner, MakeBackend(options.backend));
    auto backend = std::make_unique<testing::FaultBackend>(std::move(inner));
    if (learns) backend->SetLearnsShapes();
    testing::FaultBackend* const calls = backend.get();
    ASSERT_OK_AND_ASSIGN(const auto engine, testing::MakeEngine(options, std::move(backend)));
    EXPECT_EQ(calls->CountCalls("Embed"), learns ? 9 : 0);  // 256, 128, …, 1
    EXPECT_EQ(engine->page_pool().free_pages(), engine->page_pool().num_pages());
  }
}

}  // namespace
}  // namespace headstart
