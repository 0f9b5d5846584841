#include "server/ops/metrics.h"

#include <prometheus/text_serializer.h>

#include <array>

#include "absl/strings/str_cat.h"
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
    Ending{absl::StatusCode::kAlreadyExists, ErrorReason::kDuplicateRequestId},
    Ending{absl::StatusCode::kResourceExhausted, ErrorReason::kQueueFull},
    Ending{absl::StatusCode::kResourceExhausted, ErrorReason::kOutOfMemory},
    Ending{absl::StatusCode::kUnavailable, ErrorReason::kLoading},
    Ending{absl::StatusCode::kUnavailable, ErrorReason::kDraining},
    Ending{absl::StatusCode::kUnavailable, ErrorReason::kEngineLost},
    Ending{absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded},
    Ending{absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineUnreachable},
    Ending{absl::StatusCode::kCancelled, ErrorReason::kClientCancelled},
    Ending{absl::StatusCode::kCancelled, ErrorReason::kClientStalled},
    Ending{absl::StatusCode::kInternal, ErrorReason::kNonfiniteOutput},
    Ending{absl::StatusCode::kInternal, ErrorReason::kInternal},
    Ending{absl::StatusCode::kPermissionDenied, ErrorReason::kPeerNotAllowed},
};
// Those after compute has begun.
constexpr std::array kTransferFailures = {
    ErrorReason::kOutOfMemory,   ErrorReason::kDeadlineExceeded, ErrorReason::kClientCancelled,
    ErrorReason::kClientStalled, ErrorReason::kNonfiniteOutput,  ErrorReason::kInternal,
    ErrorReason::kEngineLost,
};

prometheus::Labels RequestLabels(const std::string& model, absl::StatusCode code,
                                 ErrorReason reason) {
  return {{"model", model},
          {"code", absl::StatusCodeToString(code)},
          {"reason", std::string(ErrorReasonName(reason))}};
}

double Seconds(absl::Duration duration) { return absl::ToDoubleSeconds(duration); }

}  // namespace

Metrics::Metrics(const std::string& model)
    : model_(model),
      requests_(CounterFamily(metric::kRequests)),
      transfer_failures_(CounterFamily(metric::kKvTransferFailures)),
      time_to_first_chunk_(AddHistogram(metric::kTimeToFirstChunk, TimeBuckets())),
      time_to_first_token_(AddHistogram(metric::kTimeToFirstToken, TimeBuckets())),
      queue_time_(AddHistogram(metric::kQueueTime, TimeBuckets())),
      compute_time_(AddHistogram(metric::kComputeTime, TimeBuckets())),
      selection_time_(AddHistogram(metric::kSelectionTime, TimeBuckets())),
      attention_time_(AddHistogram(metric::kAttentionTime, TimeBuckets())),
      other_compute_time_(AddHistogram(metric::kOtherComputeTime, TimeBuckets())),
      exposed_transfer_time_(AddHistogram(metric::kExposedTransferTime, TimeBuckets())),
      request_time_(AddHistogram(metric::kRequestTime, TimeBuckets())),
      prompt_tokens_(AddHistogram(metric::kPromptTokens, TokenBuckets())),
      chunk_stall_(AddHistogram(metric::kKvChunkStall, TimeBuckets())),
      density_(AddHistogram(metric::kAttentionDensity, ShareBuckets())),
      prompt_tokens_computed_(AddCounter(metric::kPromptTokensTotal, {{"source", "computed"}})),
      kv_bytes_sent_(AddCounter(metric::kKvBytesSent, {})),
      kv_chunks_sent_(AddCounter(metric::kKvChunksSent, {})),
      fallback_short_(AddCounter(metric::kAttentionFallback, {{"reason", "below_dense_limit"}})),
      fallback_density_(AddCounter(metric::kAttentionFallback, {{"reason", "density"}})),
      nonfinite_(AddCounter(metric::kNonfiniteOutputs, {})) {
  AddRequestCounters();
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
  GaugeFamily(metric::kBuildInfo)
      .Add({{"version", kVersion}, {"backend", facts.backend}, {"device", facts.device}})
      .Set(1);
  GaugeFamily(metric::kModelInfo)
      .Add({{"model", model_},
            {"model_hash", facts.model_hash},
            {"architecture", facts.architecture},
            {"kv_dtype", facts.kv_dtype}})
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
  if (reason == ErrorReason::kNonfiniteOutput) nonfinite_.Increment();
  if (!record.accepted) return;
  request_time_.Observe(Seconds(record.total));
  prompt_tokens_.Observe(static_cast<double>(record.num_tokens));
  if (record.first_chunk) time_to_first_chunk_.Observe(Seconds(*record.first_chunk));
  if (record.result) RecordBlocks(*record.result);
  if (status.ok()) {
    RecordComputed(record);
  } else if (record.queue) {
    transfer_failures_.Add({{"model", model_}, {"reason", std::string(ErrorReasonName(reason))}})
        .Increment();
  }
}

void Metrics::RecordComputed(const CallRecord& record) {
  const TimeShares shares = ShareTime(*record.queue, *record.result, record.total);
  time_to_first_token_.Observe(Seconds(record.total));
  compute_time_.Observe(Seconds(shares.compute()));
  selection_time_.Observe(Seconds(shares.selection));
  attention_time_.Observe(Seconds(shares.attention));
  other_compute_time_.Observe(Seconds(shares.other_compute));
  exposed_transfer_time_.Observe(Seconds(shares.exposed_transfer));
  prompt_tokens_computed_.Increment(static_cast<double>(record.num_tokens));
  if (record.below_dense_limit) fallback_short_.Increment();
  fallback_density_.Increment(static_cast<double>(record.result->dense_fallbacks));
}

void Metrics::RecordBlocks(const PrefillResult& result) {
  if (result.causal_blocks == 0) return;
  density_.Observe(static_cast<double>(result.executed_blocks) /
                   static_cast<double>(result.causal_blocks));
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

void Metrics::RecordChunkSent(int64_t bytes) {
  kv_chunks_sent_.Increment();
  kv_bytes_sent_.Increment(static_cast<double>(bytes));
}

void Metrics::RecordChunkStall(absl::Duration waited) { chunk_stall_.Observe(Seconds(waited)); }

std::string Metrics::Serialize(const MetricsSnapshot& snapshot) const {
  std::vector<prometheus::MetricFamily> families = registry_.Collect();
  for (prometheus::MetricFamily& family : SampleServer(model_, snapshot)) {
    families.push_back(std::move(family));
  }
  for (prometheus::MetricFamily& family : SampleProcess()) families.push_back(std::move(family));
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace headstart
