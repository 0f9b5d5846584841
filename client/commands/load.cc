#include "client/commands/load.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

namespace headstart {
namespace {

// Samples by the index of their request, from any thread.
class Samples {
 public:
  void Put(int64_t index, LoadSample sample) {
    absl::MutexLock lock(&mutex_);
    if (index >= static_cast<int64_t>(samples_.size())) samples_.resize(index + 1);
    samples_[index] = std::move(sample);
  }
  std::vector<LoadSample> Take() {
    absl::MutexLock lock(&mutex_);
    return std::move(samples_);
  }

 private:
  absl::Mutex mutex_;
  std::vector<LoadSample> samples_ ABSL_GUARDED_BY(mutex_);
};

void RunThreads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// Every worker takes the next request when its last one is done.
void RunClosedLoop(const LoadOptions& options, absl::Time start, const SendRequest& send,
                   Samples* samples) {
  std::atomic<int64_t> next{0};
  RunThreads(options.concurrency, [&](int worker) {
    while (absl::Now() < start + options.duration) {
      const int64_t index = next++;
      if (options.num_requests > 0 && index >= options.num_requests) return;
      samples->Put(index, send(index, worker));
    }
  });
}

// Every worker takes the next arrival and waits until it is due.
void RunOpenLoop(const LoadOptions& options, absl::Time start, const SendRequest& send,
                 Samples* samples) {
  const std::vector<absl::Duration> arrivals = ArrivalTimes(options);
  const int workers = static_cast<int>(std::min<int64_t>(options.max_outstanding, arrivals.size()));
  std::atomic<int64_t> next{0};
  RunThreads(workers, [&](int worker) {
    for (int64_t index = next++; index < static_cast<int64_t>(arrivals.size()); index = next++) {
      const absl::Time due = start + arrivals[index];
      absl::SleepFor(due - absl::Now());
      const absl::Duration late = absl::Now() - due;
      LoadSample sample = send(index, worker);
      sample.ttft += late;
      samples->Put(index, std::move(sample));
    }
  });
}

}  // namespace

LoadResult RunLoad(const LoadOptions& options, const SendRequest& send) {
  Samples samples;
  const absl::Time start = absl::Now();
  if (options.rate_per_second > 0) {
    RunOpenLoop(options, start, send, &samples);
  } else {
    RunClosedLoop(options, start, send, &samples);
  }
  const absl::Duration wall = absl::Now() - start;
  return {samples.Take(), wall};
}

std::vector<absl::Duration> ArrivalTimes(const LoadOptions& options) {
  std::mt19937_64 random(options.seed);
  std::vector<absl::Duration> times;
  absl::Duration at;
  while (options.num_requests == 0 || static_cast<int64_t>(times.size()) < options.num_requests) {
    const double uniform =
        static_cast<double>(random() >> 11) * 0x1p-53;  // [0, 1), the same with every library
    at += absl::Seconds(-std::log1p(-uniform) / options.rate_per_second);
    if (at >= options.duration) break;
    times.push_back(at);
  }
  return times;
}

double Percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<int64_t>(std::ceil(share * static_cast<double>(values.size())));
  return values[std::clamp<int64_t>(rank - 1, 0, static_cast<int64_t>(values.size()) - 1)];
}

LoadSummary Summarize(const LoadResult& result) {
  LoadSummary summary;
  std::vector<double> ttft, exposed;
  int64_t tokens = 0;
  int64_t kv_bytes = 0;
  for (const LoadSample& sample : result.samples) {
    if (!sample.error.empty()) {
      LoadSummary::Errors& errors = summary.errors[sample.error];
      if (errors.count++ == 0) errors.example = sample.message;
      continue;
    }
    ++summary.ok;
    tokens += sample.prompt_tokens;
    kv_bytes += sample.kv_bytes;
    summary.density += sample.density;
    ttft.push_back(absl::ToDoubleSeconds(sample.ttft));
    exposed.push_back(absl::ToDoubleSeconds(sample.exposed_transfer));
    summary.connections = std::max(summary.connections, sample.connections);
  }
  const double wall = absl::ToDoubleSeconds(result.wall);
  if (summary.ok > 0) {
    summary.density /= static_cast<double>(summary.ok);
    summary.tokens_per_second = static_cast<double>(tokens) / wall;
    summary.kv_gigabytes_per_second = static_cast<double>(kv_bytes) / wall / 1e9;
  }
  summary.exposed_transfer_p50 = Percentile(std::move(exposed), 0.5);
  summary.ttft_p50 = Percentile(ttft, 0.5);
  summary.ttft_p90 = Percentile(ttft, 0.9);
  summary.ttft_p99 = Percentile(std::move(ttft), 0.99);
  return summary;
}

}  // namespace headstart
