#include "engine/run/request_slot.h"

#include <gtest/gtest.h>

#include "tests/testing/fault_backend.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

constexpr int32_t kSlotLayers = 3;
constexpr int32_t kHeads = 4;

class RequestSlotTest : public ::testing::Test {
 protected:
  void SetUp() override {
    config_.num_layers = kSlotLayers;
    config_.heads = {.num_heads = kHeads, .num_kv_heads = 2, .head_dim = 16};
    ASSERT_OK_AND_ASSIGN(auto inner, MakeBackend(BackendOptions()));
    backend_ = std::make_unique<testing::FaultBackend>(std::move(inner));
  }
  template <typename T>
  void Write(const T& value, T* to) {
    ASSERT_OK(backend_->Upload(&value, sizeof(value), to));
  }

  ModelConfig config_;
  std::unique_ptr<testing::FaultBackend> backend_;
};

// What operations write of each layer is what Read says of it, and nothing lies on something else.
TEST_F(RequestSlotTest, ReadsWhatOperationsWrote) {
  ASSERT_OK_AND_ASSIGN(RequestSlot slot, RequestSlot::Create(config_, 5, *backend_));
  const std::vector<int32_t> pages = {7, 3, 9};
  ASSERT_OK(slot.Start(pages, nullptr));
  for (int32_t layer = 0; layer < kSlotLayers; ++layer) {
    const auto value = static_cast<uint64_t>(layer);
    Write(BlockCounts{10 + value, 20 + value, 30 + value}, slot.counts(layer));
    for (int32_t h = 0; h < kHeads; ++h) {
      Write(static_cast<float>(100 * layer + h), slot.budget_ratio(layer) + h);
    }
  }
  const int64_t downloads = backend_->CountCalls("Download");
  ASSERT_OK_AND_ASSIGN(const SlotState state, slot.Read());
  const SlotTotals totals = slot.TotalsOf(state);
  EXPECT_EQ(backend_->CountCalls("Download"), downloads + 1);
  ASSERT_EQ(totals.counts.size(), kSlotLayers);
  for (int32_t layer = 0; layer < kSlotLayers; ++layer) {
    EXPECT_EQ(totals.counts[layer].executed_blocks, 10 + layer);
    EXPECT_EQ(totals.counts[layer].causal_blocks, 20 + layer);
    EXPECT_EQ(totals.counts[layer].dense_fallbacks, 30 + layer);
  }
  EXPECT_THAT(totals.budget_ratios,
              ElementsAre(0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203));
  std::vector<int32_t> table(pages.size());
  ASSERT_OK(backend_->Download(slot.page_table(), 3 * sizeof(int32_t), table.data()));
  EXPECT_EQ(table, pages);
}

TEST_F(RequestSlotTest, StartForgetsTheRequestBefore) {
  ASSERT_OK_AND_ASSIGN(RequestSlot slot, RequestSlot::Create(config_, 2, *backend_));
  ASSERT_OK(slot.Start({1, 0}, nullptr));
  Write(BlockCounts{1, 2, 3}, slot.counts(kSlotLayers - 1));
  Write(0.5f, slot.budget_ratio(0));
  ASSERT_OK(slot.Start({0}, nullptr));
  ASSERT_OK_AND_ASSIGN(const SlotState state, slot.Read());
  const SlotTotals totals = slot.TotalsOf(state);
  EXPECT_THAT(totals.budget_ratios, Each(0));
  for (const BlockCounts& counts : totals.counts) {
    EXPECT_EQ(counts.executed_blocks + counts.causal_blocks + counts.dense_fallbacks, 0);
  }
}

// What one slot was read behind, another goes on from; a state of another model is refused.
TEST_F(RequestSlotTest, GoesOnFromAState) {
  ASSERT_OK_AND_ASSIGN(RequestSlot slot, RequestSlot::Create(config_, 2, *backend_));
  ASSERT_OK(slot.Start({1, 0}, nullptr));
  Write(BlockCounts{1, 2, 3}, slot.counts(kSlotLayers - 1));
  Write(0.5f, slot.budget_ratio(1) + 2);
  ASSERT_OK_AND_ASSIGN(SlotState state, slot.Read());
  ASSERT_OK_AND_ASSIGN(RequestSlot other, RequestSlot::Create(config_, 3, *backend_));
  const std::vector<int32_t> pages = {4, 2, 6};
  ASSERT_OK(other.Start(pages, &state));
  ASSERT_OK_AND_ASSIGN(const SlotState got, other.Read());
  EXPECT_EQ(got, state);
  EXPECT_EQ(other.TotalsOf(got).counts[kSlotLayers - 1].causal_blocks, 2);
  EXPECT_EQ(other.TotalsOf(got).budget_ratios[kHeads + 2], 0.5f);
  std::vector<int32_t> table(pages.size());
  ASSERT_OK(backend_->Download(other.page_table(), 3 * sizeof(int32_t), table.data()));
  EXPECT_EQ(table, pages);

  state.pop_back();
  EXPECT_THAT(other.Start(pages, &state),
              testing::StatusIs(absl::StatusCode::kInternal, ::testing::HasSubstr("must have")));
}

TEST_F(RequestSlotTest, BytesAreWhatCreateAllocates) {
  int64_t allocated = 0;
  backend_->SetHook([&](const testing::BackendCall& call) {
    if (call.op == "Allocate") allocated += call.bytes;
    return absl::OkStatus();
  });
  ASSERT_OK_AND_ASSIGN(const RequestSlot slot, RequestSlot::Create(config_, 5, *backend_));
  EXPECT_EQ(allocated, RequestSlot::Bytes(config_, 5));
}

}  // namespace
}  // namespace headstart
