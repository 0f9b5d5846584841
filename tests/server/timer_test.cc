#include "server/rpc/timer.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "kernels/base/instant.h"
#include "tests/testing/notification.h"

namespace headstart {
namespace {

TEST(TimerTest, RunsInOrderOfTimeNotOfScheduling) {
  Timer timer;
  std::vector<int> order;
  testing::Notification done;
  const Instant now = Instant::Now();
  timer.Schedule(now + absl::Milliseconds(40), [&] {
    order.push_back(2);
    done.Notify();
  });
  timer.Schedule(now + absl::Milliseconds(20), [&] { order.push_back(1); });
  done.WaitForNotification();
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
}

TEST(TimerTest, NeverRunsBeforeItsTime) {
  Timer timer;
  testing::Notification done;
  const Instant when = Instant::Now() + absl::Milliseconds(30);
  Instant ran;
  timer.Schedule(when, [&] {
    ran = Instant::Now();
    done.Notify();
  });
  done.WaitForNotification();
  EXPECT_GE(ran, when);
}

TEST(TimerTest, CancelledFunctionNeverRuns) {
  std::atomic<bool> ran = false;
  testing::Notification later;
  Timer timer;
  const Instant now = Instant::Now();
  const Timer::Id id = timer.Schedule(now + absl::Milliseconds(20), [&] { ran = true; });
  timer.Cancel(id);
  timer.Schedule(now + absl::Milliseconds(30), [&] { later.Notify(); });
  later.WaitForNotification();
  EXPECT_FALSE(ran);
}

TEST(TimerTest, CancelWaitsForTheFunctionThatRuns) {
  Timer timer;
  testing::Notification running, go_on;
  std::atomic<bool> returned = false;
  const Timer::Id id = timer.Schedule(Instant::Now(), [&] {
    running.Notify();
    go_on.WaitForNotification();
    returned = true;
  });
  running.WaitForNotification();
  std::thread canceller([&] {
    timer.Cancel(id);
    EXPECT_TRUE(returned);
  });
  go_on.Notify();
  canceller.join();
}

TEST(TimerTest, FunctionMayCancelItself) {
  Timer timer;
  testing::Notification scheduled, done;
  Timer::Id id = Timer::kNone;
  id = timer.Schedule(Instant::Now(), [&] {
    scheduled.WaitForNotification();
    timer.Cancel(id);
    done.Notify();
  });
  scheduled.Notify();
  done.WaitForNotification();
}

TEST(TimerTest, CancelOfUnknownIdDoesNothing) {
  Timer timer;
  timer.Cancel(Timer::kNone);
  timer.Cancel(12345);
}

TEST(TimerTest, PendingFunctionsDieWithTheTimer) {
  std::atomic<bool> ran = false;
  {
    Timer timer;
    timer.Schedule(Instant::InfiniteFuture(), [&] { ran = true; });
  }
  EXPECT_FALSE(ran);
}

}  // namespace
}  // namespace headstart
