// What a prompt gets does not depend on what runs beside it, before it or inside it: KV, logits and
// counts are those that it gets alone, bit for bit.
#include "engine/run/local_runner.h"

#include <vector>

#include "tests/engine/runner_fixture.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;

using LocalRunnerTest = RunnerTest;
INSTANTIATE_TEST_SUITE_P(DTypes, LocalRunnerTest,
                         ::testing::Values(ComputeDType::kF32, ComputeDType::kBF16),
                         [](const auto& info) {
                           return info.param == ComputeDType::kF32 ? "F32" : "BF16";
                         });

TEST_P(LocalRunnerTest, ABatchGivesEachWhatItGetsAlone) {
  std::vector<TestPrompt> prompts;
  for (const int64_t tokens : {1, 3, 127, 128, 129, 258, 300}) prompts.push_back(NewPrompt(tokens));
  prompts.push_back(NewPrompt(700, &sparse_));
  prompts.push_back(NewPrompt(511));  // two pieces
  std::vector<Outcome> alone;
  for (TestPrompt& prompt : prompts) alone.push_back(Alone(prompt));
  EXPECT_LT(alone[7].result.executed_blocks, alone[7].result.causal_blocks);

  Step step;
  for (TestPrompt& prompt : prompts) Renew(prompt);
  for (TestPrompt& prompt : prompts) step.pieces.push_back(LastPiece(prompt));
  backend_->logits.clear();
  const int64_t embeds = backend_->CountCalls("Embed");
  const StepResult results = runner_->Run(step, nullptr);
  EXPECT_EQ(backend_->CountCalls("Embed"), embeds + 1);
  const auto logits = backend_->logits;
  ASSERT_EQ(logits.size(), prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    SCOPED_TRACE(prompts[i].num_tokens());
    backend_->logits = {logits[i]};
    ExpectSame(OutcomeOf(prompts[i], results[i]), alone[i]);
  }
}

// Between any two layers of a step another one runs, with two prompts: all get what they get alone.
TEST_P(LocalRunnerTest, AnUrgentStepInsideAnotherChangesNeither) {
  TestPrompt sparse = NewPrompt(700, &sparse_), dense = NewPrompt(300), tiny = NewPrompt(2);
  const Outcome sparse_alone = Alone(sparse), dense_alone = Alone(dense), tiny_alone = Alone(tiny);
  for (int at = 0; at + 1 < kLayers; ++at) {
    SCOPED_TRACE(at);
    for (TestPrompt* prompt : {&sparse, &dense, &tiny}) Renew(*prompt);
    Step outer = StepOf(LastPiece(sparse));
    std::vector<Step> inner(2);
    inner[0].pieces.push_back(LastPiece(dense));
    inner[0].pieces.push_back(LastPiece(tiny));
    TestPrompt again = dense;
    Renew(again);
    inner[1].pieces.push_back(LastPiece(again));
    UrgentSteps urgent(at, std::move(inner));
    backend_->logits.clear();
    const int64_t layers = runner_->layers_done();
    const StepResult result = runner_->Run(outer, &urgent);
    EXPECT_EQ(runner_->layers_done(), layers + int64_t{3} * kLayers);
    EXPECT_EQ(urgent.questions, kLayers - 1 + 2);  // until there is none, and not before layer 0
    ASSERT_EQ(urgent.finished.size(), 2);
    const auto logits = backend_->logits;
    ASSERT_EQ(logits.size(), 4);
    const StepResult& first = urgent.finished[0].second;
    backend_->logits = {logits[0]};
    ExpectSame(OutcomeOf(dense, first[0]), dense_alone);
    backend_->logits = {logits[1]};
    ExpectSame(OutcomeOf(tiny, first[1]), tiny_alone);
    backend_->logits = {logits[2]};
    ExpectSame(OutcomeOf(again, urgent.finished[1].second[0]), dense_alone);
    backend_->logits = {logits[3]};
    ExpectSame(OutcomeOf(sparse, result[0]), sparse_alone);
  }
}

// What of the outer step is there goes out while the urgent one runs.
TEST_P(LocalRunnerTest, AnUrgentStepPublishesWhatIsThereOfTheOuterOne) {
  const TestPrompt outer = NewPrompt(300), inner = NewPrompt(100);
  std::vector<Step> steps;
  steps.push_back(StepOf(LastPiece(inner)));
  UrgentSteps urgent(1, std::move(steps));
  size_t pages_after = 0;
  urgent.after_step = [&] { pages_after = Shipped(outer).size(); };
  Step step = StepOf(LastPiece(outer));
  EXPECT_OK(runner_->Run(step, &urgent)[0].status);
  EXPECT_EQ(pages_after, 2 * 3);  // both layers that were under way
}

// The start of a dense prompt was found in the cache, any number of pages: KV of all of it goes out
// with what is computed, and the rest is as if all had been computed. So are the counts.
TEST_P(LocalRunnerTest, ADensePrefixMayEndAtAnyPage) {
  for (const int64_t tokens : {384, 386, 700}) {
    TestPrompt prompt = NewPrompt(tokens);
    const Outcome expected = Alone(prompt);
    const std::vector<int32_t> found = prompt.pages;
    for (int64_t hit = 128; hit < tokens; hit += 128) {
      SCOPED_TRACE(hit);
      Renew(prompt);
      std::copy_n(found.begin(), hit / 128, prompt.pages.begin());
      Piece piece = PieceOf(prompt, hit, tokens, /*ship_from=*/0);
      piece.starts_slot = true;
      Step step = StepOf(std::move(piece));
      const StepResult result = runner_->Run(step, nullptr);
      ExpectSame(OutcomeOf(prompt, result[0]), expected);
    }
  }
}

// A sparse prompt goes on where a piece ended, in another slot, from the state that was kept there.
TEST_P(LocalRunnerTest, ASparsePrefixGoesOnFromTheStateAtAPiecesEnd) {
  TestPrompt prompt = NewPrompt(1000, &sparse_);
  const Outcome expected = Alone(prompt);
  EXPECT_LT(expected.result.executed_blocks, expected.result.causal_blocks);
  Renew(prompt);
  std::vector<std::shared_ptr<const SlotState>> states;
  for (const int64_t begin : {0, 384}) {
    Piece piece = PieceOf(prompt, begin, begin + 384);
    piece.keep_state = true;
    Step step = StepOf(std::move(piece));
    const int64_t downloads = backend_->CountCalls("Download");
    const StepResult result = runner_->Run(step, nullptr);
    EXPECT_EQ(backend_->CountCalls("Download"), downloads + 1);  // whatever the number of layers
    ASSERT_OK(result[0].status);
    ASSERT_NE(result[0].state, nullptr);
    states.push_back(result[0].state);
  }
  const std::vector<int32_t> found = prompt.pages;
  for (const int64_t hit : {384, 768}) {
    SCOPED_TRACE(hit);
    prompt.slot = 15;
    Renew(prompt);
    std::copy_n(found.begin(), hit / 128, prompt.pages.begin());
    for (int64_t begin = hit; begin < 1000; begin += 384) {
      const int64_t end = std::min<int64_t>(begin + 384, 1000);
      Piece piece = PieceOf(prompt, begin, end, begin == hit ? 0 : begin);
      piece.starts_slot = begin == hit;
      piece.state = states[static_cast<size_t>(hit / 384 - 1)];
      Step step = StepOf(std::move(piece));
      const StepResult result = runner_->Run(step, nullptr);
      ASSERT_OK(result[0].status);
      if (end == 1000) ExpectSame(OutcomeOf(prompt, result[0]), expected);
    }
  }
}

// A piece without tokens only copies out, layer by layer, and no layer runs for it.
TEST_P(LocalRunnerTest, WhatWasFoundIsCopiedOutWithoutTheDecoder) {
  TestPrompt prompt = NewPrompt(700);
  const Outcome expected = Alone(prompt);
  prompt.shipment =
      std::make_shared<Shipment>(geometry_, Shipment::Keep::kUntilClosed, std::vector<KvPart>());
  std::map<std::string, int64_t> calls;
  for (const char* op : {"Embed", "RopeAndStoreKv", "Linear"}) calls[op] = backend_->CountCalls(op);
  const int64_t copies = backend_->CountCalls("CopyOut");
  Step step = StepOf(FoundPiece(prompt, 640));
  EXPECT_OK(runner_->Run(step, nullptr)[0].status);
  for (const auto& [op, count] : calls) EXPECT_EQ(backend_->CountCalls(op), count) << op;
  EXPECT_EQ(backend_->CountCalls("CopyOut"), copies + kLayers);
  const ShippedKv kv = Shipped(prompt);
  EXPECT_EQ(kv.size(), kLayers * 5);
  for (const auto& [place, bytes] : kv) EXPECT_TRUE(bytes == expected.kv.at(place));
  auto reader = prompt.shipment->Open(WholeKv(geometry_), 0);
  ASSERT_OK(reader);
  int32_t layer = 0;
  for (auto event = (*reader)->Next();; event = (*reader)->Next()) {
    const auto* chunk = std::get_if<ShipmentReader::Chunk>(&event);
    if (chunk == nullptr) break;
    EXPECT_GE(chunk->chunk.layer, layer);
    layer = chunk->chunk.layer;
  }
  EXPECT_EQ(layer, kLayers - 1);
}

// Beside pieces that compute, too.
TEST_P(LocalRunnerTest, FoundAndComputedPiecesRunTogether) {
  TestPrompt found = NewPrompt(512), computed = NewPrompt(300);
  const Outcome found_alone = Alone(found), computed_alone = Alone(computed);
  found.shipment =
      std::make_shared<Shipment>(geometry_, Shipment::Keep::kUntilClosed, std::vector<KvPart>());
  Renew(computed);
  Step step;
  step.pieces.push_back(FoundPiece(found, 512));
  step.pieces.push_back(LastPiece(computed));
  const StepResult results = runner_->Run(step, nullptr);
  EXPECT_OK(results[0].status);
  EXPECT_TRUE(Shipped(found) == found_alone.kv);
  ExpectSame(OutcomeOf(computed, results[1]), computed_alone);
}

// What the device counts without a hit is what the formula says with one.
TEST_P(LocalRunnerTest, DenseCountsAreWhatTheDeviceCounts) {
  ProxyAttnOptions by_rule = sparse_;  // runs dense, and the device counts it
  by_rule.dense_below_tokens = 4096;
  for (const int64_t tokens : {1, 128, 129, 700}) {
    SCOPED_TRACE(tokens);
    TestPrompt dense = NewPrompt(tokens), counted = NewPrompt(tokens, &by_rule);
    const PrefillResult formula = Alone(dense).result, device = Alone(counted).result;
    EXPECT_GT(device.causal_blocks, 0);
    EXPECT_EQ(formula.layer_executed_blocks, device.layer_executed_blocks);
    EXPECT_EQ(formula.layer_causal_blocks, device.layer_causal_blocks);
    EXPECT_EQ(formula.layer_predicted_blocks, device.layer_predicted_blocks);
    EXPECT_EQ(formula.layer_density, device.layer_density);
  }
}

// Every step has the time that the device spent on it, and the outer one none of the inner ones.
TEST_P(LocalRunnerTest, TimesAreOfTheStepItself) {
  const TestPrompt outer = NewPrompt(300), first = NewPrompt(10), second = NewPrompt(10);
  std::vector<Step> steps;
  steps.push_back(StepOf(LastPiece(first)));
  steps.push_back(StepOf(LastPiece(second)));
  UrgentSteps urgent(1, std::move(steps));
  Step step = StepOf(LastPiece(outer));
  backend_->next_time = 1;
  const StepResult result = runner_->Run(step, &urgent);
  // The outer one's before the first (1), the first's (2), none to speak of between them (4), the
  // second's (8), the outer one's rest (16).
  EXPECT_EQ(urgent.finished[0].second[0].result.attention_seconds, 2);
  EXPECT_EQ(urgent.finished[1].second[0].result.attention_seconds, 8);
  EXPECT_EQ(result[0].result.attention_seconds, 1 + 4 + 16);
  double inside = 0;
  for (const auto& [inner, results] : urgent.finished) {
    EXPECT_EQ(results[0].result.gave_way_seconds, 0);
    EXPECT_GT(results[0].result.compute_seconds, 0);
    inside += results[0].result.compute_seconds;
  }
  EXPECT_GE(result[0].result.gave_way_seconds, inside);
}

// A backend that learns shapes sees all of them at start: of rows, and of prompts that end.
TEST_P(LocalRunnerTest, WarmUpRunsEveryNumberOfRows) {
  backend_->SetLearnsShapes();
  backend_->head_rows.clear();
  ASSERT_NO_FATAL_FAILURE(MakeRunner());
  EXPECT_THAT(backend_->head_rows, ElementsAre(1, 2, 4, 8, 16));
}

TEST_P(LocalRunnerTest, AStateOfAnotherSizeIsRefused) {
  const TestPrompt prompt = NewPrompt(200);
  Piece piece = LastPiece(prompt);
  piece.state = std::make_shared<const SlotState>(3);
  Step step = StepOf(std::move(piece));
  EXPECT_THAT(runner_->Run(step, nullptr)[0].status,
              testing::StatusIs(absl::StatusCode::kInternal, ::testing::HasSubstr("3 bytes")));
}

}  // namespace
}  // namespace headstart
