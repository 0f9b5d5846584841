// Pieces of several requests in one pass through the layers.
#include "engine/run/decoder.h"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "engine/run/predicted_blocks.h"
#include "tests/engine/engine_fixture.h"

namespace headstart {
namespace {

constexpr int64_t kPages = 24;

// A decoder over a tiny model, and slots for three requests with pages of their own.
class DecoderTest : public EngineTest {
 protected:
  void SetUp() override {
    testing::TinyModelOptions model;
    model.num_layers = 3;
    model.vocab_size = 251;
    ASSERT_OK(testing::WriteTinyModel(dir_.path(), model));
    ASSERT_OK_AND_ASSIGN(config_, ReadModelConfig(dir_.path()));
    ASSERT_OK_AND_ASSIGN(backend_, MakeBackend(Options(dir_.path()).backend));
    ASSERT_OK_AND_ASSIGN(const auto files, WeightFiles::Open(dir_.path()));
    ASSERT_OK_AND_ASSIGN(weights_, LoadWeights(config_, *files, *backend_, 2048, nullptr));
    ASSERT_OK_AND_ASSIGN(kv_, KvCache::Create(config_, kPages, *backend_));
    ASSERT_OK_AND_ASSIGN(decoder_, Decoder::Create(config_, weights_, kv_, 1024, 3, *backend_));
    sparse_.enabled = true;
    sparse_.num_proxies = 2;
    sparse_.stride = 4;
    sparse_.gamma = 0.3f;
    sparse_.floor_tokens = 128;
    sparse_.dense_tail_blocks = 1;
    sparse_.dense_below_tokens = 0;
    sparse_.dense_above_density = 1;
    sparse_.dense_layers = {1};
    for (int32_t i = 0; i < 3; ++i) {
      ASSERT_OK_AND_ASSIGN(RequestSlot slot, RequestSlot::Create(config_, 8, *backend_));
      slots_.push_back(std::move(slot));
      tokens_.push_back(RandomTokens(700, config_.vocab_size, static_cast<uint32_t>(i + 1)));
    }
  }

  // Every request from its start, its pages in falling order.
  void Restart() {
    for (int32_t i = 0; i < 3; ++i) {
      std::vector<int32_t> pages;
      for (int32_t p = 0; p < 8; ++p) pages.push_back(8 * i + 7 - p);
      ASSERT_OK(slots_[i].Start(pages, nullptr));
    }
  }
  DecoderInput PieceOf(int32_t request, int64_t begin, int64_t end, bool ends_prompt) {
    DecoderInput piece;
    piece.token_ids = absl::MakeConstSpan(tokens_[request]).subspan(begin, end - begin);
    piece.first_position = begin;
    piece.ends_prompt = ends_prompt;
    piece.proxy_attn = request == 1 ? &sparse_ : nullptr;
    piece.slot = &slots_[request];
    return piece;
  }
  void Run(const std::vector<DecoderInput>& pieces) {
    ASSERT_OK(decoder_->Embed(pieces));
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      ASSERT_OK(decoder_->RunLayer(layer, pieces));
    }
    ASSERT_OK(decoder_->RunHead(pieces));
  }
  std::vector<float> Logits(int64_t prompt) {
    const auto logits = decoder_->Logits(prompt);
    EXPECT_OK(logits);
    return {logits->begin(), logits->end()};
  }
  // K and V of tokens [0, count) of a request in a layer, page by page.
  std::vector<float> Kv(int32_t request, int32_t layer, int64_t count) {
    const KvPages kv = kv_.Layer(layer);
    const int64_t planes = int64_t{2} * config_.heads.num_kv_heads;
    std::vector<float> values, page(kv.page_elements());
    for (int64_t begin = 0; begin < count; begin += kBlockTokens) {
      const int64_t index = 8 * request + 7 - begin / kBlockTokens;
      EXPECT_OK(backend_->Download(static_cast<const float*>(kv.pages) + index * kv.page_elements(),
                                   kv.page_elements() * int64_t{sizeof(float)}, page.data()));
      const int64_t used = std::min(kBlockTokens, count - begin) * config_.heads.head_dim;
      for (int64_t plane = 0; plane < planes; ++plane) {
        const float* from = page.data() + plane * kBlockTokens * config_.heads.head_dim;
        values.insert(values.end(), from, from + used);
      }
    }
    return values;
  }

  // Order matters: what lies in the backend's memory goes before the backend.
  ModelConfig config_;
  std::unique_ptr<Backend> backend_;
  ModelWeights weights_;
  KvCache kv_;
  std::unique_ptr<Decoder> decoder_;
  std::vector<RequestSlot> slots_;
  std::vector<std::vector<int32_t>> tokens_;
  ProxyAttnOptions sparse_;
};

// Of three requests one ends, one ends behind an earlier piece, with ProxyAttn, and one goes on:
// each gets what it gets alone, bit for bit.
TEST_F(DecoderTest, PiecesOfSeveralRequestsGetWhatTheyGetAlone) {
  const DecoderInput before = PieceOf(1, 0, 384, false);
  const DecoderInput whole = PieceOf(0, 0, 301, true), last = PieceOf(1, 384, 700, true),
                     first = PieceOf(2, 0, 256, false);
  const int64_t counts[] = {301, 700, 256};
  ASSERT_NO_FATAL_FAILURE(Restart());
  ASSERT_NO_FATAL_FAILURE(Run({before}));
  std::vector<std::vector<float>> logits;
  for (const DecoderInput& piece : {whole, last, first}) {
    ASSERT_NO_FATAL_FAILURE(Run({piece}));
    if (piece.ends_prompt) logits.push_back(Logits(0));
  }
  std::vector<std::vector<float>> kv;
  std::vector<SlotTotals> totals;
  for (int32_t i = 0; i < 3; ++i) {
    for (int32_t layer = 0; layer < 3; ++layer) kv.push_back(Kv(i, layer, counts[i]));
    ASSERT_OK_AND_ASSIGN(const SlotState state, slots_[i].Read());
    totals.push_back(slots_[i].TotalsOf(state));
  }
  EXPECT_LT(totals[1].counts[0].executed_blocks, totals[1].counts[0].causal_blocks);

  ASSERT_NO_FATAL_FAILURE(Restart());
  ASSERT_NO_FATAL_FAILURE(Run({before}));
  ASSERT_NO_FATAL_FAILURE(Run({whole, last, first}));
  EXPECT_EQ(Logits(0), logits[0]);
  EXPECT_EQ(Logits(1), logits[1]);
  for (int32_t i = 0; i < 3; ++i) {
    for (int32_t layer = 0; layer < 3; ++layer) {
      EXPECT_EQ(Kv(i, layer, counts[i]), kv[3 * i + layer])
          << "request " << i << ", layer " << layer;
    }
    ASSERT_OK_AND_ASSIGN(const SlotState state, slots_[i].Read());
    const SlotTotals got = slots_[i].TotalsOf(state);
    EXPECT_EQ(got.budget_ratios, totals[i].budget_ratios);
    for (int32_t layer = 0; layer < 3; ++layer) {
      EXPECT_EQ(got.counts[layer].executed_blocks, totals[i].counts[layer].executed_blocks);
      EXPECT_EQ(got.counts[layer].causal_blocks, totals[i].counts[layer].causal_blocks);
    }
  }
  // Layer 1 is one of dense_layers; of the last layer only a prompt's last block attends.
  EXPECT_EQ(totals[1].counts[1].executed_blocks, totals[1].counts[1].causal_blocks);
  EXPECT_EQ(totals[1].budget_ratios[1 * config_.heads.num_heads], 0);
  EXPECT_EQ(totals[0].counts[2].causal_blocks, config_.heads.num_heads * 3);
  const std::vector<int64_t> causal = CausalBlocks(3, config_.heads.num_heads, counts[0]);
  for (int32_t layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(totals[0].counts[layer].causal_blocks, causal[layer]);
    EXPECT_EQ(totals[0].counts[layer].executed_blocks, causal[layer]);
    uint32_t not_finite[3];
    ASSERT_OK(backend_->Download(decoder_->not_finite(layer), sizeof(not_finite), not_finite));
    EXPECT_THAT(not_finite, ::testing::Each(0));
  }
  EXPECT_EQ(totals[2].counts[2].causal_blocks, 0);
}

}  // namespace
}  // namespace headstart
