// The server's Prometheus metrics. Their table is metric_table.h.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/error.h"
#include "engine/schedule/scheduler.h"
#include "kernels/base/instant.h"
#include "server/ops/metric_table.h"
#include "server/ops/objective.h"
#include "server/rpc/call_record.h"

namespace headstart {

// What is known of a server before its model is loaded.
struct ServerFacts {
  std::string model;  // the served name
  std::string backend;
  std::string options_hash;  // equal where options that matter to answers are
  Objective objective;
};

// What a loaded model adds to the metrics.
struct ModelFacts {
  std::string model_hash;
  std::string architecture;
  std::string kv_dtype;
  std::string backend;
  std::string device;
  int32_t num_layers = 0;
  int64_t block_tokens = 0;
  int64_t num_blocks = 0;
  absl::Duration load_time;
};

// State that is looked at when /metrics is asked for.
struct MetricsSnapshot {
  SchedulerLoad load;
  std::optional<absl::Duration> predicted_drain;
  int64_t max_queue_requests = 0;
  int64_t max_queue_tokens = 0;
  bool ready = false;
  bool draining = false;
  bool stuck = false;
  int64_t drain_deadline = 0;  // Unix time; 0: none
  int64_t layers_done = 0;
  int64_t pool_blocks = 0;
  int64_t pool_free = 0;  // cached ones included
  int64_t pool_cached = 0;
  int64_t pool_acquired = 0;
  int64_t pool_released = 0;
  int64_t pool_evicted = 0;
  int64_t host_kv_bytes = 0;
  int64_t host_kv_free_bytes = 0;
  int64_t trace_spans_exported = 0;
  int64_t trace_spans_dropped = 0;
  int64_t connections = 0;
  int64_t connections_accepted = 0;
  std::vector<std::pair<std::string, int64_t>> connections_shed;  // by reason
  std::vector<std::pair<std::string, int64_t>> connections_cut;   // likewise
  std::optional<int64_t> certificate_not_after;                   // Unix time; none: plain text
  std::optional<int64_t> client_ca_not_after;                     // none: clients need none
  int64_t certificates_loaded = 0;
  int64_t certificates_rejected = 0;
};

// What was counted since the start.
struct MetricTotals {
  int64_t prompt_tokens = 0;  // computed
  int64_t kv_bytes = 0;       // that connections have taken
};

// Thread-safe but for SetModel, which comes before the first request. Every series that can be
// known is there from the start with 0, so that rate() sees the first event.
class Metrics {
 public:
  // Requests for other models than the served one count under "_unknown".
  explicit Metrics(const ServerFacts& facts);
  void SetModel(const ModelFacts& facts);

  // A call ended. Once a call.
  void RecordCall(const CallRecord& record, const absl::Status& status);
  void RecordFetch(const FetchRecord& record, const absl::Status& status);

  void RecordComputeStart(absl::Duration queue);
  // A FetchKv call found its KV.
  void RecordFetchStart(bool resumes);
  // `stripes`: into how many the client has cut what it fetches.
  void RecordChunkSent(int64_t bytes, int32_t stripes);

  MetricTotals totals() const;

  // Prometheus text format 0.0.4.
  std::string Serialize(const MetricsSnapshot& snapshot) const;

 private:
  using Labels = prometheus::Labels;

  prometheus::Family<prometheus::Counter>& CounterFamily(const MetricSpec& spec);
  prometheus::Family<prometheus::Gauge>& GaugeFamily(const MetricSpec& spec);
  prometheus::Histogram& AddHistogram(const MetricSpec& spec,
                                      const prometheus::Histogram::BucketBoundaries& buckets);
  prometheus::Counter& AddCounter(const MetricSpec& spec, Labels labels);
  void AddRequestCounters();
  void AddStripeCounters();
  void RecordJudgement(Judgement judgement);
  void RecordComputed(const CallRecord& record);
  void RecordEstimate(const PrefillResult& result);
  void RecordBlocks(const PrefillResult& result);
  // How well a stream that carried all its KV was hidden behind compute.
  void RecordOverlap(const SendRecord& sent, Instant opened_at);

  const std::string model_;
  const Objective objective_;
  prometheus::Registry registry_;
  prometheus::Family<prometheus::Counter>& requests_;
  prometheus::Counter& valid_;
  prometheus::Counter& within_objective_;
  prometheus::Family<prometheus::Counter>& transfer_failures_;
  prometheus::Family<prometheus::Counter>& fetches_;
  prometheus::Histogram& time_to_first_chunk_;
  prometheus::Histogram& time_to_first_token_;
  prometheus::Histogram& queue_time_;
  prometheus::Histogram& compute_time_;
  prometheus::Histogram& selection_time_;
  prometheus::Histogram& attention_time_;
  prometheus::Histogram& other_compute_time_;
  prometheus::Histogram& gave_way_time_;
  prometheus::Histogram& exposed_transfer_time_;
  prometheus::Histogram& request_time_;
  prometheus::Histogram& estimate_error_;
  prometheus::Histogram& prompt_tokens_;
  prometheus::Histogram& room_wait_;
  prometheus::Histogram& overlap_;
  prometheus::Histogram& density_;
  prometheus::Counter& prompt_tokens_computed_;
  prometheus::Counter& prompt_tokens_cached_;
  std::vector<prometheus::Counter*> kv_bytes_sent_;  // by kStripeLabels
  prometheus::Counter& kv_chunks_sent_;
  prometheus::Counter& resumes_;
  prometheus::Gauge& fetch_streams_;
  prometheus::Counter& fallback_short_;
  prometheus::Counter& fallback_density_;
  prometheus::Counter& nonfinite_;
  // By layer; empty until SetModel.
  std::vector<prometheus::Counter*> executed_blocks_;
  std::vector<prometheus::Counter*> causal_blocks_;
  std::vector<prometheus::Counter*> predicted_blocks_;
  std::vector<prometheus::Gauge*> sparsity_;
};

}  // namespace headstart
