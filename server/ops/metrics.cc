#include "server/ops/metrics.h"

#include <prometheus/text_serializer.h>

#include <array>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "server/ops/sampled_metrics.h"
#include "server/version.h"

namespace headstart {
namespace {

using prometheus::Histogram;

constexpr char kUnknownModel[] = "_unknown";

// Edges of latency objectives (0.2, 0.5, 1, 2, 5 s) lie on a boundary.
Histogram::BucketBoundaries TimeBuckets() {
  return {0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120};
}

// Errors of estimates: 0.1 and 0.3 are objectives.
Histogram::BucketBoundaries ErrorBuckets() {
  return {0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5};
}

Histogram::BucketBoundaries TokenBuckets() {
  Histogram::BucketBoundaries buckets;
  for (double tokens = 128; tokens <= 1 << 20; tokens *= 2) buckets.push_back(tokens);
  return buckets;
}

Histogram::BucketBoundaries ShareBuckets() {
  Histogram::BucketBoundaries buckets;
  for (int i = 1; i <= 20; ++i) buckets.push_back(i / 20.0);
  return buckets;
}

// How calls can end; each of them is a series from the start.
struct Ending {
  absl::StatusCode code;
  ErrorReason reason;
};
constexpr std::array kEndings = {
    Ending{absl::StatusCode::kOk, ErrorReason::kNone},
    Ending{absl::StatusCode::kInvalidArgument, ErrorReason::kMalformedRequest},
    Ending{absl::StatusCode::kInvalidArgument, ErrorReason::kInvalidField},
    Ending{absl::StatusCode::kFailedPrecondition, ErrorReason::kKvDtypeUnavailable},
    Ending{absl::StatusCode::kFailedPrecondition, ErrorReason::kPromptExceedsPool},
    Ending{absl::StatusCode::kFailedPrecondition, ErrorReason::kHostMemoryFull},
    Ending{absl::StatusCode::kAlreadyExists, ErrorReason::kDuplicateRequestId},
    Ending{absl::StatusCode::kResourceExhausted, ErrorReason::kQueueFull},
    Ending{absl::StatusCode::kResourceExhausted, ErrorReason::kOutOfMemory},
    Ending{absl::StatusCode::kResourceExhausted, ErrorReason::kHostMemoryFull},
    Ending{absl::StatusCode::kUnavailable, ErrorReason::kLoading},
    Ending{absl::StatusCode::kUnavailable, ErrorReason::kDraining},
    Ending{absl::StatusCode::kUnavailable, ErrorReason::kEngineLost},
    Ending{absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded},
    Ending{absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineUnreachable},
    Ending{absl::StatusCode::kCancelled, ErrorReason::kClientCancelled},
    Ending{absl::StatusCode::kCancelled, ErrorReason::kClientStalled},
    Ending{absl::StatusCode::kAborted, ErrorReason::kKvReleased},
    Ending{absl::StatusCode::kInternal, ErrorReason::kNonfiniteOutput},
    Ending{absl::StatusCode::kInternal, ErrorReason::kInternal},
    Ending{absl::StatusCode::kPermissionDenied, ErrorReason::kPeerNotAllowed},
};
// Those after compute has begun.
constexpr std::array kTransferFailures = {
    ErrorReason::kOutOfMemory,   ErrorReason::kDeadlineExceeded, ErrorReason::kClientCancelled,
    ErrorReason::kClientStalled, ErrorReason::kNonfiniteOutput,  ErrorReason::kInternal,
    ErrorReason::kEngineLost,    ErrorReason::kKvReleased,       ErrorReason::kMalformedRequest,
};
// How FetchKv calls can end.
constexpr std::array kFetchCodes = {
    absl::StatusCode::kOk,
    absl::StatusCode::kInvalidArgument,
    absl::StatusCode::kNotFound,
    absl::StatusCode::kPermissionDenied,
    absl::StatusCode::kAborted,
    absl::StatusCode::kOutOfRange,
    absl::StatusCode::kCancelled,
    absl::StatusCode::kDeadlineExceeded,
    absl::StatusCode::kUnavailable,
    absl::StatusCode::kInternal,
    absl::StatusCode::kResourceExhausted,
};

// Label values for how many stripes a client fetches.
constexpr std::array kStripeLabels = {"1", "2-4", "5-8", "9+"};

size_t StripeLabel(int32_t stripes) {
  if (stripes <= 1) return 0;
  if (stripes <= 4) return 1;
  return stripes <= 8 ? 2 : 3;
}

prometheus::Labels RequestLabels(const std::string& model, absl::StatusCode code,
                                 ErrorReason reason) {
  return {{"model", model},
          {"code", absl::StatusCodeToString(code)},
          {"reason", std::string(ErrorReasonName(reason))}};
}

prometheus::Labels FetchLabels(const std::string& model, absl::StatusCode code) {
  return {{"model", model}, {"code", absl::StatusCodeToString(code)}};
}

double Seconds(absl::Duration duration) { return absl::ToDoubleSeconds(duration); }

}  // namespace

Metrics::Metrics(const ServerFacts& facts)
    : model_(facts.model),
      objective_(facts.objective),
      requests_(CounterFamily(metric::kRequests)),
      valid_(AddCounter(metric::kValidRequests, {})),
      within_objective_(AddCounter(metric::kWithinObjective, {})),
      transfer_failures_(CounterFamily(metric::kKvTransferFailures)),
      fetches_(CounterFamily(metric::kKvFetches)),
      time_to_first_chunk_(AddHistogram(metric::kTimeToFirstChunk, TimeBuckets())),
      time_to_first_token_(AddHistogram(metric::kTimeToFirstToken, TimeBuckets())),
      queue_time_(AddHistogram(metric::kQueueTime, TimeBuckets())),
      compute_time_(AddHistogram(metric::kComputeTime, TimeBuckets())),
      selection_time_(AddHistogram(metric::kSelectionTime, TimeBuckets())),
      attention_time_(AddHistogram(metric::kAttentionTime, TimeBuckets())),
      other_compute_time_(AddHistogram(metric::kOtherComputeTime, TimeBuckets())),
      gave_way_time_(AddHistogram(metric::kGaveWayTime, TimeBuckets())),
      exposed_transfer_time_(AddHistogram(metric::kExposedTransferTime, TimeBuckets())),
      request_time_(AddHistogram(metric::kRequestTime, TimeBuckets())),
      estimate_error_(AddHistogram(metric::kEstimateError, ErrorBuckets())),
      prompt_tokens_(AddHistogram(metric::kPromptTokens, TokenBuckets())),
      room_wait_(AddHistogram(metric::kKvRoomWait, TimeBuckets())),
      overlap_(AddHistogram(metric::kKvOverlap, ShareBuckets())),
      density_(AddHistogram(metric::kAttentionDensity, ShareBuckets())),
      prompt_tokens_computed_(AddCounter(metric::kPromptTokensTotal, {{"source", "computed"}})),
      prompt_tokens_cached_(AddCounter(metric::kPromptTokensTotal, {{"source", "prefix_cache"}})),
      kv_chunks_sent_(AddCounter(metric::kKvChunksSent, {})),
      resumes_(AddCounter(metric::kKvResumes, {})),
      fetch_streams_(GaugeFamily(metric::kKvFetchStreams).Add({{"model", facts.model}})),
      fallback_short_(AddCounter(metric::kAttentionFallback, {{"reason", "below_dense_limit"}})),
      fallback_density_(AddCounter(metric::kAttentionFallback, {{"reason", "density"}})),
      nonfinite_(AddCounter(metric::kNonfiniteOutputs, {})) {
  AddRequestCounters();
  AddStripeCounters();
  GaugeFamily(metric::kBuildInfo)
      .Add(
          {{"version", kVersion}, {"backend", facts.backend}, {"options_hash", facts.options_hash}})
      .Set(1);
}

prometheus::Family<prometheus::Counter>& Metrics::CounterFamily(const MetricSpec& spec) {
  return prometheus::BuildCounter().Name(spec.name).Help(spec.help).Register(registry_);
}

prometheus::Family<prometheus::Gauge>& Metrics::GaugeFamily(const MetricSpec& spec) {
  return prometheus::BuildGauge().Name(spec.name).Help(spec.help).Register(registry_);
}

Histogram& Metrics::AddHistogram(const MetricSpec& spec,
                                 const Histogram::BucketBoundaries& buckets) {
  return prometheus::BuildHistogram().Name(spec.name).Help(spec.help).Register(registry_).Add(
      {{"model", model_}}, buckets);
}

prometheus::Counter& Metrics::AddCounter(const MetricSpec& spec, Labels labels) {
  labels.emplace("model", model_);
  return CounterFamily(spec).Add(labels);
}

void Metrics::AddRequestCounters() {
  for (const Ending& ending : kEndings) {
    requests_.Add(RequestLabels(model_, ending.code, ending.reason));
  }
  requests_.Add(
      RequestLabels(kUnknownModel, absl::StatusCode::kNotFound, ErrorReason::kUnknownModel));
  for (const ErrorReason reason : kTransferFailures) {
    transfer_failures_.Add({{"model", model_}, {"reason", std::string(ErrorReasonName(reason))}});
  }
  for (const absl::StatusCode code : kFetchCodes) fetches_.Add(FetchLabels(model_, code));
}

void Metrics::AddStripeCounters() {
  auto& bytes = CounterFamily(metric::kKvBytesSent);
  for (const char* label : kStripeLabels) {
    kv_bytes_sent_.push_back(&bytes.Add({{"model", model_}, {"stripes", label}}));
  }
}

void Metrics::SetModel(const ModelFacts& facts) {
  auto& executed = CounterFamily(metric::kExecutedBlocks);
  auto& causal = CounterFamily(metric::kCausalBlocks);
  auto& predicted = CounterFamily(metric::kPredictedBlocks);
  auto& sparsity = GaugeFamily(metric::kLayerSparsity);
  for (int32_t layer = 0; layer < facts.num_layers; ++layer) {
    const Labels labels = {{"model", model_}, {"layer", absl::StrCat(layer)}};
    executed_blocks_.push_back(&executed.Add(labels));
    causal_blocks_.push_back(&causal.Add(labels));
    predicted_blocks_.push_back(&predicted.Add(labels));
    sparsity_.push_back(&sparsity.Add(labels));
  }
  GaugeFamily(metric::kModelInfo)
      .Add({{"model", model_},
            {"model_hash", facts.model_hash},
            {"architecture", facts.architecture},
            {"kv_dtype", facts.kv_dtype},
            {"device", facts.device}})
      .Set(1);
  GaugeFamily(metric::kCacheConfigInfo)
      .Add({{"block_size", absl::StrCat(facts.block_tokens)},
            {"num_blocks", absl::StrCat(facts.num_blocks)}})
      .Set(1);
  GaugeFamily(metric::kModelLoadTime).Add({}).Set(Seconds(facts.load_time));
}

void Metrics::RecordCall(const CallRecord& record, const absl::Status& status) {
  const ErrorReason reason = ReasonOf(status);
  requests_.Add(RequestLabels(record.unknown_model ? kUnknownModel : model_, status.code(), reason))
      .Increment();
  RecordJudgement(Judge(record, status, objective_));
  if (reason == ErrorReason::kNonfiniteOutput) nonfinite_.Increment();
  if (!record.accepted) return;
  request_time_.Observe(Seconds(record.total()));
  prompt_tokens_.Observe(static_cast<double>(record.num_tokens));
  if (record.sent.chunks > 0) {
    time_to_first_chunk_.Observe(Seconds(record.sent.first_chunk_at - record.accepted_at));
  }
  if (record.sent.result != nullptr) RecordBlocks(*record.sent.result);
  if (status.ok()) {
    RecordComputed(record);
  } else if (record.queue) {
    transfer_failures_.Add({{"model", model_}, {"reason", std::string(ErrorReasonName(reason))}})
        .Increment();
  }
}

void Metrics::RecordJudgement(Judgement judgement) {
  if (judgement == Judgement::kNotCounted) return;
  valid_.Increment();
  if (judgement == Judgement::kMet) within_objective_.Increment();
}

void Metrics::RecordComputed(const CallRecord& record) {
  const PrefillResult& result = *record.sent.result;
  const TimeShares shares = ShareTime(result, record.ended_at);
  time_to_first_token_.Observe(Seconds(record.ended_at - result.accepted_at));
  compute_time_.Observe(Seconds(shares.compute()));
  selection_time_.Observe(Seconds(shares.selection));
  attention_time_.Observe(Seconds(shares.attention));
  other_compute_time_.Observe(Seconds(shares.other_compute));
  gave_way_time_.Observe(Seconds(shares.gave_way));
  if (result.room_wait_seconds > 0) room_wait_.Observe(result.room_wait_seconds);
  if (!record.detached) RecordOverlap(record.sent, record.accepted_at);
  RecordEstimate(result);
  prompt_tokens_computed_.Increment(static_cast<double>(record.num_tokens - result.cached_tokens));
  prompt_tokens_cached_.Increment(static_cast<double>(result.cached_tokens));
  if (record.below_dense_limit) fallback_short_.Increment();
  fallback_density_.Increment(static_cast<double>(result.dense_fallbacks));
}

// Who waits for room waits for its readers, which nobody can predict.
void Metrics::RecordEstimate(const PrefillResult& result) {
  if (!result.predicted_ttft.has_value() || result.room_wait_seconds > 0) return;
  const absl::Duration actual = result.computed_at - result.accepted_at;
  estimate_error_.Observe(
      absl::FDivDuration(absl::AbsDuration(*result.predicted_ttft - actual), actual));
}

void Metrics::RecordBlocks(const PrefillResult& result) {
  if (result.causal_blocks == 0) return;
  density_.Observe(DensityOf(result));
  for (size_t layer = 0; layer < result.layer_causal_blocks.size(); ++layer) {
    const auto executed = static_cast<double>(result.layer_executed_blocks[layer]);
    const auto causal = static_cast<double>(result.layer_causal_blocks[layer]);
    executed_blocks_[layer]->Increment(executed);
    causal_blocks_[layer]->Increment(causal);
    predicted_blocks_[layer]->Increment(static_cast<double>(result.layer_predicted_blocks[layer]));
    sparsity_[layer]->Set(1.0 - executed / causal);
  }
}

void Metrics::RecordComputeStart(absl::Duration queue) { queue_time_.Observe(Seconds(queue)); }

void Metrics::RecordFetchStart(bool resumes) {
  fetch_streams_.Increment();
  if (resumes) resumes_.Increment();
}

void Metrics::RecordFetch(const FetchRecord& record, const absl::Status& status) {
  fetches_.Add(FetchLabels(model_, status.code())).Increment();
  if (!record.opened) return;
  fetch_streams_.Decrement();
  if (status.ok()) RecordOverlap(record.sent, record.opened_at);
}

void Metrics::RecordOverlap(const SendRecord& sent, Instant opened_at) {
  if (sent.kv_bytes == 0) return;
  exposed_transfer_time_.Observe(Seconds(ExposedTransfer(sent, opened_at)));
  overlap_.Observe(static_cast<double>(sent.kv_bytes_before_computed) /
                   static_cast<double>(sent.kv_bytes));
}

void Metrics::RecordChunkSent(int64_t bytes, int32_t stripes) {
  kv_chunks_sent_.Increment();
  kv_bytes_sent_[StripeLabel(stripes)]->Increment(static_cast<double>(bytes));
}

MetricTotals Metrics::totals() const {
  MetricTotals totals;
  totals.prompt_tokens = static_cast<int64_t>(prompt_tokens_computed_.Value());
  for (const prometheus::Counter* bytes : kv_bytes_sent_) {
    totals.kv_bytes += static_cast<int64_t>(bytes->Value());
  }
  return totals;
}

std::string Metrics::Serialize(const MetricsSnapshot& snapshot) const {
  std::vector<prometheus::MetricFamily> families = registry_.Collect();
  for (prometheus::MetricFamily& family : SampleServer(model_, snapshot)) {
    families.push_back(std::move(family));
  }
  for (prometheus::MetricFamily& family : SampleProcess()) families.push_back(std::move(family));
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace headstart
