#include "client/commands/load_summary.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace headstart {
namespace {

double RankOf(const std::vector<double>& sorted, double share) {
  const auto size = static_cast<int64_t>(sorted.size());
  const auto rank = static_cast<int64_t>(std::ceil(share * static_cast<double>(size)));
  return sorted[std::clamp<int64_t>(rank - 1, 0, size - 1)];
}

// Values of a class that become percentiles.
struct ClassTimes {
  std::vector<double> ttft, all_kv;
};

void Count(const LoadSample& sample, absl::Duration slo_ttft, ClassSummary* summary,
           ClassTimes* times) {
  ++summary->prompts;
  summary->accepted += sample.was_accepted() ? 1 : 0;
  if (!sample.ok()) return;
  ++summary->ok;
  summary->within_slo += sample.ttft() <= slo_ttft ? 1 : 0;
  times->ttft.push_back(absl::ToDoubleSeconds(sample.ttft()));
  times->all_kv.push_back(absl::ToDoubleSeconds(sample.time_to_all_kv()));
}

void SummarizeClasses(const LoadResult& result, absl::Duration slo_ttft, LoadSummary* summary) {
  summary->classes.resize(LengthClasses().size());
  ClassTimes of_all;
  std::vector<ClassTimes> of_class(summary->classes.size());
  for (const LoadSample& sample : result.samples) {
    const size_t place = ClassOf(sample.prompt_tokens);
    Count(sample, slo_ttft, &summary->all, &of_all);
    Count(sample, slo_ttft, &summary->classes[place], &of_class[place]);
  }
  const auto fill = [](ClassTimes times, ClassSummary* of) {
    of->ttft = PercentilesOf(std::move(times.ttft));
    of->all_kv = PercentilesOf(std::move(times.all_kv));
  };
  fill(std::move(of_all), &summary->all);
  for (size_t i = 0; i < of_class.size(); ++i) fill(std::move(of_class[i]), &summary->classes[i]);
}

void SummarizeErrors(const LoadResult& result, LoadSummary* summary) {
  std::map<std::string, std::vector<double>> times;
  std::vector<double> refusals;
  for (const LoadSample& sample : result.samples) {
    if (sample.ok()) continue;
    ErrorSummary& errors = summary->errors[sample.error];
    if (errors.count++ == 0) errors.example = sample.message;
    const double seconds = absl::ToDoubleSeconds(sample.ended - sample.planned);
    times[sample.error].push_back(seconds);
    if (!sample.refused) continue;
    ++errors.refused;
    refusals.push_back(seconds);
  }
  for (auto& [kind, of_kind] : times)
    summary->errors[kind].time = PercentilesOf(std::move(of_kind));
  summary->refusal_time = PercentilesOf(std::move(refusals));
  summary->refused = summary->refusal_time.count;
  summary->failed = summary->all.prompts - summary->all.ok - summary->refused;
}

// Rates, shares and means of what went well.
void SummarizeWork(const LoadResult& result, LoadSummary* summary) {
  std::vector<double> exposed, prediction_error;
  int64_t kv_bytes = 0;
  for (const LoadSample& sample : result.samples) {
    summary->late += sample.lateness() > kLate ? 1 : 0;
    summary->max_lateness =
        std::max(summary->max_lateness, absl::ToDoubleSeconds(sample.lateness()));
    if (!sample.ok()) continue;
    summary->prompt_tokens += sample.prompt_tokens;
    summary->cached_tokens += sample.cached_tokens;
    summary->skipped_tokens += sample.skipped_tokens;
    kv_bytes += sample.kv_bytes;
    summary->density += sample.density;
    exposed.push_back(absl::ToDoubleSeconds(sample.exposed_transfer));
    summary->connections = std::max(summary->connections, sample.connections);
    const absl::Duration seen = sample.first_token - sample.accepted;
    if (sample.predicted_ttft.has_value() && seen > absl::ZeroDuration())
      prediction_error.push_back(std::abs(absl::FDivDuration(*sample.predicted_ttft - seen, seen)));
  }
  summary->exposed_transfer_p50 = Percentile(std::move(exposed), 0.5);
  summary->prediction_error = PercentilesOf(std::move(prediction_error));
  if (summary->all.ok == 0) return;
  const double wall = absl::ToDoubleSeconds(result.wall);
  summary->density /= static_cast<double>(summary->all.ok);
  summary->tokens_per_second = static_cast<double>(summary->prompt_tokens) / wall;
  summary->requests_per_second = static_cast<double>(summary->all.ok) / wall;
  summary->kv_bytes_per_prompt =
      static_cast<double>(kv_bytes) / static_cast<double>(summary->all.ok);
  summary->kv_gigabytes_per_second = static_cast<double>(kv_bytes) / wall / 1e9;
}

}  // namespace

double Percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  return RankOf(values, share);
}

Percentiles PercentilesOf(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  return {.count = static_cast<int64_t>(values.size()),
          .p50 = RankOf(values, 0.5),
          .p90 = RankOf(values, 0.9),
          .p95 = RankOf(values, 0.95),
          .p99 = RankOf(values, 0.99),
          .max = values.back()};
}

const std::vector<LengthClass>& LengthClasses() {
  static const auto* classes =
      new std::vector<LengthClass>{{"<= 2K", 2048},
                                   {"<= 8K", 8192},
                                   {"<= 32K", 32768},
                                   {"> 32K", std::numeric_limits<int64_t>::max()}};
  return *classes;
}

size_t ClassOf(int64_t prompt_tokens) {
  size_t place = 0;
  while (prompt_tokens > LengthClasses()[place].most_tokens) ++place;
  return place;
}

LoadSummary Summarize(const LoadResult& result, absl::Duration slo_ttft) {
  LoadSummary summary;
  SummarizeClasses(result, slo_ttft, &summary);
  SummarizeErrors(result, &summary);
  SummarizeWork(result, &summary);
  return summary;
}

}  // namespace headstart
