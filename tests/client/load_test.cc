#include "client/commands/load.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "kernels/base/instant.h"

namespace headstart {
namespace {

// Every request is sent by `send`, without getting ready.
PrepareRequest Sending(std::function<void(int64_t index, int worker, LoadSample*)> send) {
  return [send = std::move(send)](int64_t index, int worker) -> SendRequest {
    return [&send, index, worker](LoadSample* sample) { send(index, worker, sample); };
  };
}

// Runs a load whose requests are answered only when `expected` of them wait for their answer; how
// many did.
int MostAtATime(const LoadOptions& options, int expected) {
  absl::Mutex mutex;
  int waiting = 0;
  bool enough = false;
  RunLoad(options, Sending([&](int64_t, int, LoadSample*) {
            absl::MutexLock lock(&mutex);
            enough = ++waiting == expected;
            mutex.Await(absl::Condition(&enough));
          }));
  return waiting;
}

TEST(LoadTest, ClosedLoopSendsEveryRequestOnceAndNeverMoreAtATime) {
  LoadOptions options;
  options.concurrency = 3;
  options.num_requests = 50;
  absl::Mutex mutex;
  std::set<int> busy;
  std::vector<int> seen(50);
  const LoadResult result = RunLoad(options, Sending([&](int64_t index, int worker, LoadSample* s) {
                                      absl::MutexLock lock(&mutex);
                                      EXPECT_TRUE(busy.insert(worker).second);
                                      EXPECT_LT(worker, 3);
                                      ++seen[index];
                                      mutex.Unlock();
                                      mutex.Lock();
                                      busy.erase(worker);
                                      s->prompt_tokens = index;
                                    }));
  EXPECT_EQ(seen, std::vector<int>(50, 1));
  ASSERT_EQ(result.samples.size(), 50);
  for (int64_t i = 0; i < 50; ++i) {
    EXPECT_EQ(result.samples[i].prompt_tokens, i);
    EXPECT_EQ(result.samples[i].planned, result.samples[i].sent);
    EXPECT_LE(result.samples[i].sent, result.samples[i].ended);
  }
}

TEST(LoadTest, ClosedLoopKeepsAllWorkersBusy) {
  LoadOptions options;
  options.concurrency = 4;
  options.num_requests = 4;
  EXPECT_EQ(MostAtATime(options, 4), 4);
}

TEST(LoadTest, OpenLoopWaitsForNoAnswer) {
  LoadOptions options;
  options.rate_per_second = 1000;
  options.num_requests = 20;
  EXPECT_EQ(MostAtATime(options, 20), 20);
}

TEST(LoadTest, OpenLoopCountsTheWaitForAFreeWorker) {
  LoadOptions options;
  options.arrivals = {absl::ZeroDuration(), absl::Milliseconds(1), absl::Milliseconds(2)};
  options.max_outstanding = 1;
  Instant first_end;
  const LoadResult result = RunLoad(options, Sending([&](int64_t index, int, LoadSample*) {
                                      if (index > 0) return;
                                      absl::SleepFor(absl::Milliseconds(20));  // the work itself
                                      first_end = Instant::Now();
                                    }));
  ASSERT_EQ(result.samples.size(), 3);
  for (int64_t i = 0; i < 3; ++i)
    EXPECT_EQ(result.samples[i].planned, result.start + options.arrivals[i]);
  EXPECT_GE(result.samples[2].sent, first_end);
  EXPECT_GE(result.samples[2].lateness(), absl::Milliseconds(18));
}

TEST(LoadTest, OpenLoopStartsItsClockWhenRequestsAreReady) {
  LoadOptions options;
  options.arrivals.assign(8, absl::ZeroDuration());
  absl::Mutex mutex;
  Instant last_ready = Instant::InfinitePast();
  const LoadResult result = RunLoad(options, [&](int64_t, int) -> SendRequest {
    absl::MutexLock lock(&mutex);
    last_ready = Instant::Now();
    return [](LoadSample*) {};
  });
  EXPECT_GE(result.start, last_ready);
  for (const LoadSample& sample : result.samples) EXPECT_EQ(sample.planned, result.start);
}

TEST(LoadTest, ArrivalsArePoisson) {
  LoadOptions options;
  options.rate_per_second = 100;
  options.num_requests = 10000;
  const std::vector<absl::Duration> times = ArrivalTimes(options);
  ASSERT_EQ(times.size(), 10000);
  EXPECT_TRUE(std::is_sorted(times.begin(), times.end()));
  EXPECT_NEAR(absl::ToDoubleSeconds(times.back()), 100.0, 3.0);  // deviation 1
  // Of exponential gaps, 1/e are longer than the mean.
  int64_t longer = 0;
  for (size_t i = 1; i < times.size(); ++i)
    longer += times[i] - times[i - 1] > absl::Milliseconds(10);
  EXPECT_NEAR(static_cast<double>(longer) / 10000, 0.3679, 0.015);
  EXPECT_EQ(ArrivalTimes(options), times);
}

TEST(LoadTest, ArrivalsEndWithTheDuration) {
  LoadOptions options;
  options.rate_per_second = 100;
  options.duration = absl::Seconds(2);
  const std::vector<absl::Duration> times = ArrivalTimes(options);
  EXPECT_NEAR(static_cast<double>(times.size()), 200.0, 50.0);
  EXPECT_LT(times.back(), absl::Seconds(2));
}

}  // namespace
}  // namespace headstart
