// An engine over a tiny model, with a backend in which tests can meddle.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "kernels/base/status_macros.h"
#include "tests/testing/fault_backend.h"
#include "tests/testing/kv_collector.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {

// `count` ids below `vocab_size`, the same for the same seed.
inline std::vector<int32_t> RandomTokens(int64_t count, int32_t vocab_size = 256,
                                         uint32_t seed = 1) {
  std::vector<int32_t> ids;
  uint32_t state = seed;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;  // Numerical Recipes
    ids.push_back(static_cast<int32_t>((state >> 8) % static_cast<uint32_t>(vocab_size)));
  }
  return ids;
}

struct TestEngine {
  std::unique_ptr<Engine> engine;
  testing::FaultBackend* backend = nullptr;  // the engine's

  static absl::StatusOr<TestEngine> Create(const EngineOptions& options) {
    HEADSTART_ASSIGN_OR_RETURN(auto inner, MakeBackend(options.backend));
    auto backend = std::make_unique<testing::FaultBackend>(std::move(inner));
    TestEngine out;
    out.backend = backend.get();
    HEADSTART_ASSIGN_OR_RETURN(out.engine, testing::MakeEngine(options, std::move(backend)));
    return out;
  }

  const PagePool& pool() const { return engine->page_pool(); }
  std::vector<std::byte> Keys(const testing::KvCollector& sink, int32_t layer) const {
    return sink.Keys(layer, engine->config().heads.num_kv_heads, RowBytes());
  }
  std::vector<std::byte> Values(const testing::KvCollector& sink, int32_t layer) const {
    return sink.Values(layer, engine->config().heads.num_kv_heads, RowBytes());
  }
  int64_t RowBytes() const {
    return engine->config().heads.head_dim * DTypeBytes(engine->geometry().dtype);
  }
};

class EngineTest : public ::testing::Test {
 protected:
  // f32 and two threads: the same arithmetic on every machine.
  EngineOptions Options(const std::string& dir) const {
    EngineOptions options;
    options.model_dir = dir;
    options.backend.dtype = ComputeDType::kF32;
    options.backend.num_threads = 2;
    return options;
  }
  absl::StatusOr<TestEngine> MakeEngine(const testing::TinyModelOptions& model,
                                        int64_t piece_tokens = 8192, int32_t num_threads = 2) {
    HEADSTART_RETURN_IF_ERROR(testing::WriteTinyModel(dir_.path(), model));
    EngineOptions options = Options(dir_.path());
    options.piece_tokens = piece_tokens;
    options.backend.num_threads = num_threads;
    return TestEngine::Create(options);
  }

  testing::TempDir dir_;
};

}  // namespace headstart
