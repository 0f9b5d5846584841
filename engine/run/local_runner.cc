#include "engine/run/local_runner.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

#include "engine/run/predicted_blocks.h"
#include "engine/run/sampling.h"
#include "engine/stopwatch.h"
#include "kernels/base/check.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// Layers whose KV is on its way to the host while the next ones compute: how far the host may be
// ahead of the device.
constexpr size_t kLayersUnderWay = 2;

// Marks the pieces whose flag is set. Says whether nobody wants what the step would go on to
// compute.
bool AllOver(const Step& step, int32_t layer, StepResult& results) {
  bool all_over = true;
  for (size_t i = 0; i < results.size(); ++i) {
    const std::atomic<bool>* cancelled = step.pieces[i].cancelled;
    absl::Status& status = results[i].status;
    if (status.ok() && cancelled != nullptr && cancelled->load(std::memory_order_relaxed)) {
      status = CancelledBefore(layer);
    }
    all_over = all_over && !status.ok();
  }
  return all_over;
}

// What the device counts of a dense prompt, whatever of it was found in the prefix cache.
SlotTotals DenseTotals(const ModelConfig& config, int64_t num_tokens) {
  SlotTotals totals;
  for (const int64_t blocks : CausalBlocks(config.num_layers, config.heads.num_heads, num_tokens)) {
    const auto count = static_cast<uint64_t>(blocks);
    totals.counts.push_back({.executed_blocks = count, .causal_blocks = count});
  }
  totals.budget_ratios.resize(totals.counts.size() * static_cast<size_t>(config.heads.num_heads));
  return totals;
}

void AddTotals(const SlotTotals& totals, const std::vector<int64_t>& predicted,
               PrefillResult& result) {
  for (size_t layer = 0; layer < totals.counts.size(); ++layer) {
    const auto executed = static_cast<int64_t>(totals.counts[layer].executed_blocks);
    const auto causal = static_cast<int64_t>(totals.counts[layer].causal_blocks);
    result.layer_predicted_blocks.push_back(predicted[layer] > 0 ? predicted[layer] : executed);
    result.layer_density.push_back(
        causal == 0 ? 1.0f : static_cast<float>(executed) / static_cast<float>(causal));
    result.layer_executed_blocks.push_back(executed);
    result.layer_causal_blocks.push_back(causal);
    result.executed_blocks += executed;
    result.causal_blocks += causal;
    result.dense_fallbacks += static_cast<int64_t>(totals.counts[layer].dense_fallbacks);
  }
}

}  // namespace

// A step on its way through the layers.
struct LocalRunner::Running {
  Step& step;
  const Lane& lane;
  StepResult results = StepResult(step.pieces.size());
  std::vector<DecoderInput> inputs = {};     // the pieces that compute
  std::vector<OutgoingPiece> outgoing = {};  // all pieces
  BackendTimes times = {};
  double gave_way_seconds = 0;
};

absl::StatusOr<std::unique_ptr<LocalRunner>> LocalRunner::Create(const ModelConfig& config,
                                                                 ModelWeights weights,
                                                                 const LocalRunnerOptions& options,
                                                                 Backend& backend) {
  std::unique_ptr<LocalRunner> runner(
      new LocalRunner(config, std::move(weights), options, backend));
  HEADSTART_RETURN_IF_ERROR(runner->Allocate());
  if (backend.LearnsShapes()) HEADSTART_RETURN_IF_ERROR(runner->WarmUp());
  return runner;
}

absl::Status LocalRunner::Allocate() {
  HEADSTART_ASSIGN_OR_RETURN(kv_, KvCache::Create(config_, options_.num_pages, backend_));
  for (int32_t i = 0; i < options_.num_slots; ++i) {
    HEADSTART_ASSIGN_OR_RETURN(
        RequestSlot slot,
        RequestSlot::Create(config_, NumBlocks(options_.max_prompt_tokens), backend_));
    slots_.push_back(std::move(slot));
  }
  HEADSTART_ASSIGN_OR_RETURN(main_, MakeLane(options_.max_rows));
  if (options_.urgent_rows > 0) {
    HEADSTART_ASSIGN_OR_RETURN(urgent_, MakeLane(options_.urgent_rows));
  }
  HEADSTART_ASSIGN_OR_RETURN(KvStaging staging,
                             KvStaging::Create(options_.geometry, options_.max_rows, backend_));
  copy_out_.emplace(kv_, std::move(staging), backend_);
  return backend_.ReserveScratch(config_.heads, options_.max_rows, options_.max_prompt_tokens);
}

absl::StatusOr<LocalRunner::Lane> LocalRunner::MakeLane(int64_t max_rows) {
  Lane lane;
  HEADSTART_ASSIGN_OR_RETURN(lane.decoder, Decoder::Create(config_, weights_, kv_, max_rows,
                                                           options_.max_pieces, backend_));
  HEADSTART_ASSIGN_OR_RETURN(
      lane.flags,
      backend_.AllocateHost(config_.num_layers * options_.max_pieces * int64_t{sizeof(uint32_t)}));
  return lane;
}

absl::Status LocalRunner::WarmUp() {
  for (int64_t rows = options_.max_rows; rows > 0; rows /= 2) {
    HEADSTART_RETURN_IF_ERROR(WarmUpWith(rows));
  }
  return absl::OkStatus();
}

// In as many prompts as go, so that the head learns its numbers of rows, too. They share pages:
// what they come to is of no interest.
absl::Status LocalRunner::WarmUpWith(int64_t num_rows) {
  const int64_t prompts = std::min({num_rows, options_.max_pieces, int64_t{options_.num_slots}});
  const int64_t longest = std::min((num_rows + prompts - 1) / prompts, options_.max_prompt_tokens);
  std::vector<int32_t> pages(static_cast<size_t>(NumBlocks(longest)));
  std::iota(pages.begin(), pages.end(), 0);
  const std::vector<int32_t> ids(static_cast<size_t>(longest), 0);
  const SamplingOptions greedy;
  Step step;
  for (int64_t rows = num_rows; rows > 0 && std::ssize(step.pieces) < prompts; rows -= longest) {
    Piece piece;
    piece.slot = static_cast<int32_t>(step.pieces.size());
    piece.token_ids = absl::MakeConstSpan(ids).first(std::min(rows, longest));
    piece.prompt_tokens = piece.num_tokens();
    piece.ends_prompt = true;
    piece.pages = pages;
    piece.starts_slot = true;
    piece.sampling = &greedy;
    step.pieces.push_back(std::move(piece));
  }
  Running run{step, main_};
  return RunStep(run, nullptr);
}

StepResult LocalRunner::Run(Step& step, UrgentWork* urgent) {
  Running run{step, main_};
  RunStep(run, urgent).IgnoreError();  // every result says it
  return std::move(run.results);
}

absl::Status LocalRunner::RunStep(Running& run, UrgentWork* urgent) {
  const Stopwatch stopwatch;
  absl::Status status = RunLayers(run, urgent);
  if (status.ok()) status = ReadOutcomes(run);
  if (!status.ok()) copy_out_->Abandon();
  status.Update(TakeTimes(run));
  const double seconds = stopwatch.seconds() - run.gave_way_seconds;
  for (PieceResult& piece : run.results) {
    if (piece.status.ok()) piece.status = status;
    if (!piece.status.ok()) continue;
    piece.result.selection_seconds = run.times.selection_seconds;
    piece.result.attention_seconds = run.times.attention_seconds;
    piece.result.compute_seconds = seconds;
    piece.result.gave_way_seconds = run.gave_way_seconds;
  }
  return status;
}

absl::Status LocalRunner::Prepare(Running& run) {
  for (size_t i = 0; i < run.results.size(); ++i) {
    Piece& piece = run.step.pieces[i];
    OutgoingPiece& outgoing = run.outgoing.emplace_back();
    outgoing.piece = &piece;
    outgoing.result = &run.results[i];
    RequestSlot& slot = slots_[static_cast<size_t>(piece.slot)];
    if (piece.starts_slot) {
      HEADSTART_RETURN_IF_ERROR(slot.Start(piece.pages, piece.state.get()));
    }
    HEADSTART_CHECK(!piece.ends_prompt || !piece.token_ids.empty());
    if (piece.token_ids.empty()) continue;
    outgoing.flag = std::ssize(run.inputs);
    DecoderInput& input = run.inputs.emplace_back();
    input.token_ids = piece.token_ids;
    input.first_position = piece.first_position;
    input.ends_prompt = piece.ends_prompt;
    input.proxy_attn = piece.attention;
    input.slot = &slot;
  }
  return absl::OkStatus();
}

absl::Status LocalRunner::RunLayers(Running& run, UrgentWork* urgent) {
  HEADSTART_RETURN_IF_ERROR(Prepare(run));
  if (!run.inputs.empty()) HEADSTART_RETURN_IF_ERROR(run.lane.decoder->Embed(run.inputs));
  for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
    // Not before the first: whoever made this step chose it a moment ago.
    if (layer > 0 && urgent != nullptr) HEADSTART_RETURN_IF_ERROR(GiveWay(*urgent, run));
    if (AllOver(run.step, layer, run.results)) break;
    HEADSTART_RETURN_IF_ERROR(RunLayer(layer, run));
    layers_done_.fetch_add(1, std::memory_order_relaxed);
  }
  return copy_out_->Publish(0);
}

absl::Status LocalRunner::RunLayer(int32_t layer, Running& run) {
  Decoder& decoder = *run.lane.decoder;
  std::optional<HostCopy> flags;
  if (!run.inputs.empty()) {
    HEADSTART_RETURN_IF_ERROR(decoder.RunLayer(layer, run.inputs));
    const int64_t row_bytes = options_.max_pieces * int64_t{sizeof(uint32_t)};
    flags = HostCopy{decoder.not_finite(layer), run.lane.flags.get() + layer * row_bytes,
                     std::ssize(run.inputs) * int64_t{sizeof(uint32_t)}};
  }
  HEADSTART_RETURN_IF_ERROR(copy_out_->Take(layer, run.outgoing, flags));
  if (layer + 1 == config_.num_layers && !run.inputs.empty()) {
    HEADSTART_RETURN_IF_ERROR(decoder.RunHead(run.inputs));
  }
  return copy_out_->Publish(kLayersUnderWay);
}

absl::Status LocalRunner::GiveWay(UrgentWork& urgent, Running& outer) {
  HEADSTART_CHECK(urgent_.decoder != nullptr);
  while (std::optional<Step> step = urgent.Next()) {
    Running run{*step, urgent_};
    absl::Status status = TakeTimes(outer);
    const Stopwatch stopwatch;
    if (status.ok()) {
      status = RunStep(run, nullptr);
    } else {
      for (PieceResult& result : run.results) result.status = status;
    }
    outer.gave_way_seconds += stopwatch.seconds();
    StepResult results = std::move(run.results);
    urgent.Finish(*std::move(step), std::move(results));
    HEADSTART_RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

// What the device spent since the last time goes to this step.
absl::Status LocalRunner::TakeTimes(Running& run) {
  HEADSTART_ASSIGN_OR_RETURN(const BackendTimes times, backend_.TakeTimes());
  run.times.selection_seconds += times.selection_seconds;
  run.times.attention_seconds += times.attention_seconds;
  return absl::OkStatus();
}

absl::Status LocalRunner::ReadOutcomes(Running& run) {
  int64_t prompt = 0;
  for (size_t i = 0; i < run.results.size(); ++i) {
    const Piece& piece = run.step.pieces[i];
    PieceResult& result = run.results[i];
    const int64_t place = piece.ends_prompt ? prompt++ : 0;
    if (!result.status.ok()) continue;
    if (piece.ends_prompt) {
      HEADSTART_ASSIGN_OR_RETURN(const absl::Span<const float> logits,
                                 run.lane.decoder->Logits(place));
      const absl::StatusOr<SampledToken> token = SampleToken(logits, *piece.sampling);
      result.status = token.status();
      if (!token.ok()) continue;
      result.result.first_token = *token;
    }
    HEADSTART_RETURN_IF_ERROR(ReadOutcome(piece, result));
  }
  return absl::OkStatus();
}

absl::Status LocalRunner::ReadOutcome(const Piece& piece, PieceResult& result) {
  const bool is_sparse = piece.attention != nullptr;
  if (!piece.keep_state && !piece.ends_prompt) return absl::OkStatus();
  const RequestSlot& slot = slots_[static_cast<size_t>(piece.slot)];
  SlotTotals totals;
  if (piece.keep_state || is_sparse) {
    HEADSTART_ASSIGN_OR_RETURN(SlotState state, slot.Read());
    if (is_sparse) totals = slot.TotalsOf(state);
    if (piece.keep_state) result.state = std::make_shared<const SlotState>(std::move(state));
  }
  if (!piece.ends_prompt) return absl::OkStatus();
  if (!is_sparse) totals = DenseTotals(config_, piece.prompt_tokens);
  AddTotals(totals,
            PredictedBlocks(totals.budget_ratios, config_.heads.num_heads, piece.prompt_tokens,
                            is_sparse ? piece.attention->floor_tokens : 0),
            result.result);
  result.result.layer_head_budget = std::move(totals.budget_ratios);
  return absl::OkStatus();
}

}  // namespace headstart
