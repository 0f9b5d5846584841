#include "client/commands/load.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "kernels/base/instant.h"

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

// Joins its threads where it ends.
class Workers {
 public:
  Workers(int count, const std::function<void(int)>& body) {
    for (int i = 0; i < count; ++i) threads_.emplace_back(body, i);
  }
  ~Workers() {
    for (std::thread& thread : threads_) thread.join();
  }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

 private:
  std::vector<std::thread> threads_;
};

LoadSample SendAt(Instant planned, const SendRequest& send) {
  LoadSample sample;
  sample.sent = Instant::Now();
  sample.planned = std::min(planned, sample.sent);
  send(&sample);
  sample.ended = Instant::Now();
  return sample;
}

// Every worker takes the next request when its last one is done.
Instant RunClosedLoop(const LoadOptions& options, const PrepareRequest& prepare, Samples* samples) {
  const Instant start = Instant::Now();
  std::atomic<int64_t> next{0};
  const Workers workers(options.concurrency, [&](int worker) {
    while (Instant::Now() < start + options.duration) {
      const int64_t index = next++;
      if (options.num_requests > 0 && index >= options.num_requests) return;
      const SendRequest send = prepare(index, worker);
      samples->Put(index, SendAt(Instant::InfiniteFuture(), send));
    }
  });
  return start;
}

// Every worker takes the next arrival and waits until it is due. The clock starts when all have
// made their first one ready.
Instant RunOpenLoop(const LoadOptions& options, const PrepareRequest& prepare, Samples* samples) {
  const std::vector<absl::Duration> arrivals = ArrivalTimes(options);
  const auto num_arrivals = static_cast<int64_t>(arrivals.size());
  const int num_workers =
      static_cast<int>(std::min<int64_t>(options.max_outstanding, num_arrivals));
  std::atomic<int64_t> next{0};
  absl::BlockingCounter ready(num_workers);
  absl::Notification started;
  Instant start;
  const Workers workers(num_workers, [&](int worker) {
    bool first = true;
    for (int64_t index = next++; index < num_arrivals; index = next++) {
      const SendRequest send = prepare(index, worker);
      if (first) ready.DecrementCount();
      first = false;
      started.WaitForNotification();
      const Instant due = start + arrivals[index];
      absl::SleepFor(due - Instant::Now());
      samples->Put(index, SendAt(due, send));
    }
  });
  ready.Wait();
  start = Instant::Now();
  started.Notify();
  return start;
}

}  // namespace

LoadResult RunLoad(const LoadOptions& options, const PrepareRequest& prepare) {
  Samples samples;
  const Instant start = options.open_loop() ? RunOpenLoop(options, prepare, &samples)
                                            : RunClosedLoop(options, prepare, &samples);
  const absl::Duration wall = Instant::Now() - start;
  return {samples.Take(), start, wall};
}

std::vector<absl::Duration> ArrivalTimes(const LoadOptions& options) {
  if (!options.arrivals.empty()) return options.arrivals;
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

}  // namespace headstart
