#include "engine/run/local_runner.h"

#include <numeric>
#include <utility>

#include "engine/run/predicted_blocks.h"
#include "engine/run/sampling.h"
#include "engine/stopwatch.h"
#include "kernels/base/nonfinite.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// Layers whose KV is on its way to the host while the next ones compute: how far the host may be
// ahead of the device.
constexpr size_t kLayersUnderWay = 2;

bool IsOver(const Piece& piece, const PieceResult& result) {
  return !result.status.ok() ||
         (piece.cancelled != nullptr && piece.cancelled->load(std::memory_order_relaxed));
}

// Whether nobody wants what the step would go on to compute.
bool AllOver(const Step& step, const StepResult& results) {
  for (size_t i = 0; i < results.size(); ++i) {
    if (!IsOver(step.pieces[i], results[i])) return false;
  }
  return true;
}

}  // namespace

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
  HEADSTART_ASSIGN_OR_RETURN(decoder_, Decoder::Create(config_, weights_, kv_, options_.max_rows,
                                                       /*max_pieces=*/1, backend_));
  HEADSTART_ASSIGN_OR_RETURN(copy_out_,
                             CopyOut::Create(options_.geometry, options_.num_slots, kv_, backend_));
  return backend_.ReserveScratch(config_.heads, options_.max_rows, options_.max_prompt_tokens);
}

absl::Status LocalRunner::WarmUp() {
  std::vector<int32_t> pages(static_cast<size_t>(NumBlocks(options_.max_rows)));
  std::iota(pages.begin(), pages.end(), 0);
  const SamplingOptions greedy;
  for (int64_t rows = options_.max_rows; rows > 0; rows /= 2) {
    const std::vector<int32_t> ids(static_cast<size_t>(rows), 0);
    Step step;
    Piece& piece = step.pieces.emplace_back();
    piece.token_ids = ids;
    piece.prompt_tokens = rows;
    piece.ends_prompt = true;
    piece.pages = pages;
    piece.sampling = &greedy;
    const absl::Status status = Run(step)[0].status;
    if (!status.ok() && !IsNonFiniteError(status)) return status;
  }
  return absl::OkStatus();
}

StepResult LocalRunner::Run(Step& step) {
  const Stopwatch stopwatch;
  StepResult results(step.pieces.size());
  absl::Status status = RunLayers(step, results);
  if (status.ok()) status = ReadOutcomes(step, results);
  if (!status.ok()) copy_out_->Abandon();
  const absl::StatusOr<BackendTimes> times = backend_.TakeTimes();
  status.Update(times.status());
  for (PieceResult& result : results) {
    if (result.status.ok()) result.status = status;
    if (!result.status.ok()) continue;
    result.result.selection_seconds = times->selection_seconds;
    result.result.attention_seconds = times->attention_seconds;
    result.result.compute_seconds = stopwatch.seconds();
  }
  return results;
}

absl::StatusOr<std::vector<DecoderInput>> LocalRunner::Prepare(const Step& step) {
  std::vector<DecoderInput> inputs;
  for (const Piece& piece : step.pieces) {
    RequestSlot& slot = slots_[static_cast<size_t>(piece.slot)];
    if (piece.starts_prompt()) HEADSTART_RETURN_IF_ERROR(slot.Start(piece.pages));
    DecoderInput& input = inputs.emplace_back();
    input.token_ids = piece.token_ids;
    input.first_position = piece.first_position;
    input.ends_prompt = piece.ends_prompt;
    input.proxy_attn = piece.attention;
    input.slot = &slot;
  }
  return inputs;
}

absl::Status LocalRunner::RunLayers(Step& step, StepResult& results) {
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<DecoderInput> inputs, Prepare(step));
  HEADSTART_RETURN_IF_ERROR(decoder_->Embed(inputs));
  for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
    if (AllOver(step, results)) return CancelledBefore(layer);
    HEADSTART_RETURN_IF_ERROR(decoder_->RunLayer(layer, inputs));
    for (size_t i = 0; i < inputs.size(); ++i) {
      HEADSTART_RETURN_IF_ERROR(copy_out_->Take(layer, step.pieces[i], i, *inputs[i].slot));
    }
    if (layer + 1 == config_.num_layers) HEADSTART_RETURN_IF_ERROR(decoder_->RunHead(inputs));
    HEADSTART_RETURN_IF_ERROR(copy_out_->Publish(kLayersUnderWay * inputs.size(), results));
    layers_done_.fetch_add(1, std::memory_order_relaxed);
  }
  return copy_out_->Publish(0, results);
}

absl::Status LocalRunner::ReadOutcomes(const Step& step, StepResult& results) {
  int64_t prompt = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    const Piece& piece = step.pieces[i];
    if (!piece.ends_prompt) continue;
    HEADSTART_ASSIGN_OR_RETURN(const absl::Span<const float> logits, decoder_->Logits(prompt++));
    PieceResult& result = results[i];
    if (!result.status.ok()) continue;
    const absl::StatusOr<SampledToken> token = SampleToken(logits, *piece.sampling);
    result.status = token.status();
    if (!token.ok()) continue;
    result.result.first_token = *token;
    HEADSTART_RETURN_IF_ERROR(AddTotals(piece, result.result));
  }
  return absl::OkStatus();
}

absl::Status LocalRunner::AddTotals(const Piece& piece, PrefillResult& result) const {
  HEADSTART_ASSIGN_OR_RETURN(const SlotTotals totals,
                             slots_[static_cast<size_t>(piece.slot)].Read());
  const std::vector<int64_t> predicted =
      PredictedBlocks(totals.budget_ratios, config_.heads.num_heads, piece.prompt_tokens,
                      piece.attention == nullptr ? 0 : piece.attention->floor_tokens);
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
  return absl::OkStatus();
}

}  // namespace headstart
