#include "client/commands/load.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

namespace headstart {
namespace {

using ::testing::_;
using ::testing::ElementsAre;
using ::testing::Pair;

// Runs a load whose requests are answered only when `expected` of them wait for their answer; how
// many did.
int MostAtATime(const LoadOptions& options, int expected) {
  absl::Mutex mutex;
  int waiting = 0;
  bool enough = false;
  RunLoad(options, [&](int64_t, int) {
    absl::MutexLock lock(&mutex);
    enough = ++waiting == expected;
    mutex.Await(absl::Condition(&enough));
    return LoadSample{};
  });
  return waiting;
}

TEST(LoadTest, ClosedLoopSendsEveryRequestOnceAndNeverMoreAtATime) {
  LoadOptions options;
  options.concurrency = 3;
  options.num_requests = 50;
  absl::Mutex mutex;
  std::set<int> busy;
  std::vector<int> seen(50);
  const LoadResult result = RunLoad(options, [&](int64_t index, int worker) {
    absl::MutexLock lock(&mutex);
    EXPECT_TRUE(busy.insert(worker).second);
    EXPECT_LT(worker, 3);
    ++seen[index];
    mutex.Unlock();
    mutex.Lock();
    busy.erase(worker);
    LoadSample sample;
    sample.prompt_tokens = index;
    return sample;
  });
  EXPECT_EQ(seen, std::vector<int>(50, 1));
  ASSERT_EQ(result.samples.size(), 50);
  for (int64_t i = 0; i < 50; ++i) EXPECT_EQ(result.samples[i].prompt_tokens, i);
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
  options.rate_per_second = 1e6;
  options.num_requests = 3;
  options.max_outstanding = 1;
  absl::Time first_end;
  absl::Time start = absl::Now();
  const LoadResult result = RunLoad(options, [&](int64_t index, int) {
    if (index == 0) absl::SleepFor(absl::Milliseconds(50));  // the work itself
    return LoadSample{};
  });
  EXPECT_LT(result.samples[0].ttft, absl::Now() - start);
  EXPECT_GE(result.samples[2].ttft, absl::Milliseconds(49));
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

TEST(LoadTest, PercentileIsNearestRank) {
  EXPECT_EQ(Percentile({}, 0.5), 0.0);
  EXPECT_EQ(Percentile({7}, 0.99), 7.0);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 0.5), 2.0);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 0.9), 4.0);
  std::vector<double> hundred;
  for (int i = 100; i > 0; --i) hundred.push_back(i);
  EXPECT_EQ(Percentile(hundred, 0.5), 50.0);
  EXPECT_EQ(Percentile(hundred, 0.99), 99.0);
}

TEST(LoadTest, SummaryCountsErrorsApart) {
  LoadResult result;
  result.wall = absl::Seconds(2);
  for (const int ttft : {1, 3}) {
    LoadSample sample;
    sample.ttft = absl::Seconds(ttft);
    sample.prompt_tokens = 1000;
    sample.kv_bytes = 1'000'000'000;
    sample.density = ttft == 1 ? 0.5 : 1.0;
    result.samples.push_back(sample);
  }
  for (int i = 0; i < 2; ++i) {
    LoadSample& sample = result.samples.emplace_back();
    sample.error = "UNAVAILABLE";
    sample.message = "message " + std::to_string(i);
  }
  const LoadSummary summary = Summarize(result);
  EXPECT_EQ(summary.ok, 2);
  ASSERT_THAT(summary.errors, ElementsAre(Pair("UNAVAILABLE", _)));
  EXPECT_EQ(summary.errors.at("UNAVAILABLE").count, 2);
  EXPECT_EQ(summary.errors.at("UNAVAILABLE").example, "message 0");
  EXPECT_DOUBLE_EQ(summary.tokens_per_second, 1000.0);
  EXPECT_DOUBLE_EQ(summary.kv_gigabytes_per_second, 1.0);
  EXPECT_DOUBLE_EQ(summary.density, 0.75);
  EXPECT_DOUBLE_EQ(summary.ttft_p50, 1.0);
  EXPECT_DOUBLE_EQ(summary.ttft_p99, 3.0);
}

}  // namespace
}  // namespace headstart
