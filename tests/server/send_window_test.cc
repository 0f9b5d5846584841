#include "server/rpc/send_window.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "absl/time/clock.h"
#include "server/error.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;

constexpr absl::Duration kLong = absl::Minutes(5);

TEST(SendWindowTest, TakesUpToItsCapacityWithoutWaiting) {
  SendWindow window(100, kLong);
  EXPECT_OK(window.Take(60, absl::InfiniteFuture()));
  EXPECT_OK(window.Take(40, absl::InfiniteFuture()));
  // A deadline in the past: full, so it would have to wait.
  EXPECT_THAT(window.Take(1, absl::InfinitePast()), StatusIs(absl::StatusCode::kDeadlineExceeded));
}

TEST(SendWindowTest, TakesMoreThanItsCapacityWhenEmpty) {
  SendWindow window(100, kLong);
  EXPECT_OK(window.Take(1000, absl::InfinitePast()));
}

TEST(SendWindowTest, WaitsUntilBytesComeBack) {
  SendWindow window(100, kLong);
  ASSERT_OK(window.Take(100, absl::InfiniteFuture()));
  std::atomic<bool> gave_back = false;
  std::thread reader([&] {
    gave_back = true;
    window.GiveBack(100);
  });
  EXPECT_OK(window.Take(50, absl::InfiniteFuture()));
  EXPECT_TRUE(gave_back);
  reader.join();
}

TEST(SendWindowTest, CutsAReaderThatTakesNothing) {
  SendWindow window(100, absl::Milliseconds(20));
  ASSERT_OK(window.Take(100, absl::InfiniteFuture()));
  const absl::Status status = window.Take(1, absl::InfiniteFuture()).status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kCancelled, HasSubstr("20ms")));
  EXPECT_EQ(ReasonOf(status), ErrorReason::kClientStalled);
}

TEST(SendWindowTest, StallLimitCountsFromTheLastProgress) {
  const absl::Duration limit = absl::Milliseconds(600);
  SendWindow window(100, limit);
  ASSERT_OK(window.Take(100, absl::InfiniteFuture()));
  std::thread slow_reader([&] {  // one byte at a time, never longer apart than the limit
    for (int i = 0; i < 10; ++i) {
      absl::SleepFor(absl::Milliseconds(80));
      window.GiveBack(1);
    }
  });
  const absl::Time began = absl::Now();
  EXPECT_OK(window.Take(10, absl::InfiniteFuture()));
  EXPECT_GT(absl::Now() - began, limit);
  slow_reader.join();
}

TEST(SendWindowTest, DeadlineEndsTheWait) {
  SendWindow window(100, kLong);
  ASSERT_OK(window.Take(100, absl::InfiniteFuture()));
  EXPECT_THAT(window.Take(1, absl::Now() + absl::Milliseconds(20)),
              StatusIs(absl::StatusCode::kDeadlineExceeded));
}

TEST(SendWindowTest, BreakEndsTheWaitAndEverythingAfter) {
  SendWindow window(100, kLong);
  ASSERT_OK(window.Take(100, absl::InfiniteFuture()));
  std::thread canceller([&] {
    window.Break(absl::CancelledError("gone"));
    window.Break(absl::InternalError("too late"));
  });
  EXPECT_THAT(window.Take(1, absl::InfiniteFuture()),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("gone")));
  canceller.join();
  window.GiveBack(100);
  EXPECT_THAT(window.Take(1, absl::InfiniteFuture()), StatusIs(absl::StatusCode::kCancelled));
}

}  // namespace
}  // namespace headstart
