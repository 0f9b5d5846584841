// The engine's forward pass against a model made of reference operations.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "tests/engine/engine_fixture.h"
#include "tests/engine/reference_model.h"
#include "tests/testing/tensor_compare.h"

namespace headstart {
namespace {

using testing::KvCollector;
using testing::TensorsMatch;
using testing::TinyModelOptions;
using testing::Tolerance;

// [heads][tokens][d] of `dtype` -> [tokens, heads * d] of float, the reference's order.
std::vector<float> ToRows(const std::vector<std::byte>& plane, const HeadShape& heads,
                          int64_t num_tokens, DType dtype) {
  const int64_t cols = int64_t{heads.num_kv_heads} * heads.head_dim;
  std::vector<float> rows(num_tokens * cols);
  for (int64_t h = 0; h < heads.num_kv_heads; ++h) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t i = 0; i < heads.head_dim; ++i) {
        const std::byte* source =
            plane.data() + ((h * num_tokens + t) * heads.head_dim + i) * DTypeBytes(dtype);
        float value = 0;
        if (dtype == DType::kF32) {
          std::memcpy(&value, source, sizeof(value));
        } else {
          BFloat16 small;
          std::memcpy(&small, source, sizeof(small));
          value = static_cast<float>(small);
        }
        rows[t * cols + h * heads.head_dim + i] = value;
      }
    }
  }
  return rows;
}

struct ForwardCase {
  std::string name;
  TinyModelOptions model;
  DType dtype = DType::kF32;
  int64_t num_tokens = 300;
  ProxyAttnOptions attention = {};
};

void PrintTo(const ForwardCase& param, std::ostream* out) { *out << param.name; }

TinyModelOptions Model(const std::string& architecture,
                       const std::function<void(TinyModelOptions&)>& change = {}) {
  TinyModelOptions model;
  model.architecture = architecture;
  model.num_layers = 3;
  if (change) change(model);
  return model;
}

class ForwardTest : public EngineTest, public ::testing::WithParamInterface<ForwardCase> {};

// Sparse at every length, with a gamma, floor and tail that leave something to choose.
ProxyAttnOptions Sparse(int32_t num_proxies, int32_t stride, BudgetRule budget) {
  ProxyAttnOptions options;
  options.enabled = true;
  options.num_proxies = num_proxies;
  options.stride = stride;
  options.budget = budget;
  options.gamma = 0.3f;
  options.floor_tokens = 256;
  options.dense_tail_blocks = 1;
  options.dense_below_tokens = 0;
  options.dense_above_density = 1.0f;
  return options;
}

TEST_P(ForwardTest, MatchesReference) {
  const ForwardCase& param = GetParam();
  ASSERT_OK(testing::WriteTinyModel(dir_.path(), param.model));
  EngineOptions engine_options = Options(dir_.path());
  const bool bf16 = param.dtype == DType::kBF16;
  engine_options.backend.dtype = bf16 ? ComputeDType::kBF16 : ComputeDType::kF32;
  if (bf16 && !MakeBackend(engine_options.backend).ok()) {
    GTEST_SKIP() << "this CPU does not multiply bf16";
  }
  ASSERT_OK_AND_ASSIGN(const TestEngine test, TestEngine::Create(engine_options));
  const HeadShape& heads = test.engine->config().heads;

  PrefillRequest job;
  job.token_ids = RandomTokens(param.num_tokens);
  job.attention = param.attention;
  ASSERT_OK_AND_ASSIGN(const ReferenceResult expected,
                       RunReference(dir_.path(), job.token_ids, job.attention, param.dtype));
  KvCollector sink;
  ASSERT_OK_AND_ASSIGN(const PrefillResult result, sink.Run(*test.engine, job));

  // fp32: a few hundred roundings in sums of up to 96 terms. bf16: each activation is rounded to 8
  // bits, at other places than in the reference where sums differ in the last bit.
  const Tolerance tolerance = bf16 ? Tolerance{.abs = 0.15, .rel = 0.05, .min_cosine = 0.999}
                                   : Tolerance{.abs = 2e-4, .rel = 1e-3, .min_cosine = 0.999999};
  for (int32_t layer = 0; layer < param.model.num_layers; ++layer) {
    SCOPED_TRACE(layer);
    EXPECT_TRUE(TensorsMatch(ToRows(test.Keys(sink, layer), heads, param.num_tokens, param.dtype),
                             expected.layers[layer].k.values, tolerance));
    EXPECT_TRUE(TensorsMatch(ToRows(test.Values(sink, layer), heads, param.num_tokens, param.dtype),
                             expected.layers[layer].v.values, tolerance));
    // Of the last layer only the prompt's last block runs, which the dense tail makes dense.
    const bool is_last = layer + 1 == param.model.num_layers;
    EXPECT_FLOAT_EQ(result.layer_density[layer], is_last ? 1.0 : expected.layer_density[layer]);
  }
  if (param.attention.enabled) {
    EXPECT_LT(result.layer_density[0], 0.8f);  // else this would test nothing
  }
  const double logprob = reference::LogProb(expected.logits, result.first_token.id);
  EXPECT_NEAR(result.first_token.logprob, logprob, bf16 ? 0.1 : 1e-3);
  if (!bf16) {
    EXPECT_EQ(
        result.first_token.id,
        std::max_element(expected.logits.begin(), expected.logits.end()) - expected.logits.begin());
  }
}

void TwoLayers(TinyModelOptions& model) { model.num_layers = 2; }

const char kLlama3Rope[] = R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 128})";
const char kYarnRope[] =
    R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})";

INSTANTIATE_TEST_SUITE_P(
    Dense, ForwardTest,
    ::testing::Values(
        ForwardCase{"Llama", Model("llama")}, ForwardCase{"Qwen2", Model("qwen2")},
        ForwardCase{"Qwen3", Model("qwen3")},
        ForwardCase{"Llama31Rope", Model("llama", [](auto& m) { m.rope_scaling = kLlama3Rope; })},
        ForwardCase{"QwenYarnRope", Model("qwen2", [](auto& m) { m.rope_scaling = kYarnRope; })},
        ForwardCase{"LlamaWithAllBiases",
                    Model("llama", [](auto& m) { m.attention_bias = m.mlp_bias = true; })},
        ForwardCase{"TiedEmbeddings",
                    Model("qwen3", [](auto& m) { m.tie_word_embeddings = true; })},
        ForwardCase{"F16Weights", Model("llama", [](auto& m) { m.dtype = DType::kF16; })},
        ForwardCase{"OneToken", Model("llama"), DType::kF32, 1},
        ForwardCase{"OneBlock", Model("llama"), DType::kF32, 128},
        ForwardCase{"LongerThanAnFfnSlice", Model("llama", TwoLayers), DType::kF32, 1100},
        ForwardCase{"LlamaBf16", Model("llama"), DType::kBF16},
        ForwardCase{"Qwen2Bf16", Model("qwen2"), DType::kBF16},
        ForwardCase{"Qwen3Bf16", Model("qwen3"), DType::kBF16}),
    [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(
    ProxyAttn, ForwardTest,
    ::testing::Values(ForwardCase{"Shared", Model("llama", TwoLayers), DType::kF32, 1300,
                                  Sparse(4, 16, BudgetRule::kShared)},
                      ForwardCase{"Own", Model("qwen2", TwoLayers), DType::kF32, 1300,
                                  Sparse(1, 4, BudgetRule::kOwn)},
                      ForwardCase{"Row", Model("qwen3", TwoLayers), DType::kF32, 1300,
                                  Sparse(2, 8, BudgetRule::kRow)}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace headstart
