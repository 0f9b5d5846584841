#include "engine/memory_plan.h"

#include <gtest/gtest.h>

#include "engine/engine.h"
#include "engine/run/kv_staging.h"
#include "kernels/base/status_macros.h"
#include "tests/testing/fault_backend.h"
#include "tests/testing/kv_collector.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

TEST(MemoryPlanTest, KnowsLlama31) {
  ModelConfig config;
  config.hidden_size = 4096;
  config.num_layers = 32;
  config.heads = {.num_heads = 32, .num_kv_heads = 8, .head_dim = 128};
  config.intermediate_size = 14336;
  config.vocab_size = 128256;
  config.max_positions = 131072;
  const MemoryPlan plan = PlanMemory(
      config, DType::kBF16,
      {.max_rows = 8192, .urgent_rows = 2048, .max_pieces = 64, .num_slots = 64}, 131072);
  // 8.03 billion parameters, two bytes each but for the norms.
  const int64_t norms = (2 * 32 + 1) * 4096;
  EXPECT_EQ(plan.weight_bytes, 2 * (int64_t{8'030'261'248} - norms) + 4 * norms);
  EXPECT_EQ(plan.kv_bytes_per_token, 128 << 10);
  EXPECT_EQ(plan.kv_pool_bytes, int64_t{16} << 30);
  EXPECT_EQ(plan.total_bytes(), plan.weight_bytes + plan.kv_pool_bytes + plan.workspace_bytes);
}

TEST(MemoryPlanTest, PoolIsWholePages) {
  ModelConfig config;
  config.num_layers = 1;
  config.heads = {.num_heads = 1, .num_kv_heads = 1, .head_dim = 2};
  EXPECT_EQ(PlanMemory(config, DType::kF32, {.max_rows = 128}, 129).kv_pool_bytes,
            2 * 128 * 2 * 2 * 4);
}

// What an engine allocates outside of weights is what the plan says.
TEST(MemoryPlanTest, CountsWhatTheEngineAllocates) {
  testing::TempDir dir;
  testing::TinyModelOptions model;
  model.architecture = "qwen3";
  ASSERT_OK(testing::WriteTinyModel(dir.path(), model));
  BackendOptions backend_options;
  backend_options.dtype = ComputeDType::kF32;
  ASSERT_OK_AND_ASSIGN(auto inner, MakeBackend(backend_options));
  auto backend = std::make_unique<testing::FaultBackend>(std::move(inner));
  int64_t allocated = 0;
  backend->SetHook([&allocated](const testing::BackendCall& call) {
    if (call.op == "Allocate") allocated += call.bytes;
    return absl::OkStatus();
  });
  EngineOptions options;
  options.model_dir = dir.path();
  options.kv_pool_tokens = 1000;
  options.piece_tokens = 256;
  options.batch_tokens = 128;
  ASSERT_OK_AND_ASSIGN(const auto engine, testing::MakeEngine(options, std::move(backend)));
  const MemoryPlan plan =
      PlanMemory(engine->config(), DType::kF32,
                 {.max_rows = 256, .urgent_rows = 128, .max_pieces = 64, .num_slots = 64}, 1000);
  const int64_t rope_table = 1024 * 32 * 4;  // made by PrepareRope
  const int64_t staging = KvStaging::Bytes(engine->geometry(), 256);
  EXPECT_EQ(allocated, plan.kv_pool_bytes + plan.workspace_bytes - rope_table + staging);
}

absl::StatusOr<std::unique_ptr<testing::FaultBackend>> BackendWithFreeBytes(int64_t free_bytes) {
  HEADSTART_ASSIGN_OR_RETURN(auto inner, MakeBackend(BackendOptions()));
  auto backend = std::make_unique<testing::FaultBackend>(std::move(inner));
  backend->SetFreeBytes(free_bytes);
  return backend;
}

// The CPU's memory is the host's, for all of the plan; while weights are read they lie there twice.
TEST(MemoryPlanTest, IsComparedWithWhatTheHostHas) {
  ASSERT_OK_AND_ASSIGN(const auto cpu, MakeBackend(BackendOptions()));
  constexpr int64_t kProgram = 64 << 20;
  MemoryPlan plan;
  plan.weight_bytes = 1000;
  plan.kv_pool_bytes = 200;
  plan.host_kv_bytes = 30;
  plan.reading_bytes = 100;
  const auto refused = [](const char* text) {
    return testing::StatusIs(absl::StatusCode::kResourceExhausted, ::testing::HasSubstr(text));
  };
  EXPECT_OK(CheckFits(plan, *cpu, FreeMemory{kProgram + 1230, "a limit"}));
  EXPECT_THAT(CheckFits(plan, *cpu, FreeMemory{kProgram + 1223, "a limit"}),
              refused("a limit leaves 67110087: 7 are missing"));
  plan.reading_bytes = 900;
  EXPECT_OK(CheckFits(plan, *cpu, FreeMemory{kProgram + 1900, "a limit"}));
  EXPECT_THAT(CheckFits(plan, *cpu, FreeMemory{kProgram + 1899, "a limit"}),
              refused("1 are missing"));
  EXPECT_OK(CheckFits(plan, *cpu, std::nullopt));
}

// What does not fit is refused before a weight is loaded, with the bytes that are missing.
TEST(MemoryPlanTest, RefusesWhatDoesNotFit) {
  testing::TempDir dir;
  ASSERT_OK(testing::WriteTinyModel(dir.path(), testing::TinyModelOptions()));
  EngineOptions options;
  options.model_dir = dir.path();
  ASSERT_OK_AND_ASSIGN(auto roomy, BackendWithFreeBytes(int64_t{1} << 40));
  ASSERT_OK_AND_ASSIGN(const ResolvedModel model, ResolveModel(options, *roomy));
  EXPECT_GT(model.plan.scratch_bytes, 0);
  EXPECT_EQ(model.plan.staging_bytes, KvStaging::Bytes(model.geometry, model.limits.max_rows));
  EXPECT_OK(CheckFits(model.plan, *roomy));

  ASSERT_OK_AND_ASSIGN(auto exact, BackendWithFreeBytes(model.plan.total_bytes()));
  EXPECT_OK(CheckFits(model.plan, *exact));

  ASSERT_OK_AND_ASSIGN(auto tight, BackendWithFreeBytes(model.plan.total_bytes() - 1234));
  const auto refused = testing::StatusIs(absl::StatusCode::kResourceExhausted,
                                         ::testing::HasSubstr("1234 are missing"));
  EXPECT_THAT(CheckFits(model.plan, *tight), refused);
  testing::FaultBackend* const calls = tight.get();
  int64_t allocations = 0;
  calls->SetHook([&allocations](const testing::BackendCall& call) {
    allocations += call.op == "Allocate";
    return absl::OkStatus();
  });
  EXPECT_THAT(testing::MakeEngine(options, std::move(tight)), refused);
  EXPECT_EQ(allocations, 0);
}

}  // namespace
}  // namespace headstart
