#include "kernels/base/instant.h"

#include <gtest/gtest.h>

#include <limits>
#include <thread>
#include <type_traits>

#include "absl/time/time.h"
#include "kernels/base/mutex.h"

namespace headstart {
namespace {

constexpr absl::Duration kYear = absl::Hours(24 * 365);

// The wall clock and this one do not mix.
static_assert(!std::is_convertible_v<absl::Time, Instant>);
static_assert(!std::is_convertible_v<Instant, absl::Time>);
template <typename A, typename B>
concept Subtracts = requires(A a, B b) {
  a - b;
};
static_assert(Subtracts<Instant, Instant> && !Subtracts<Instant, absl::Time> &&
              !Subtracts<absl::Time, Instant>);

TEST(InstantTest, Counts) {
  const Instant now = Instant::Now();
  EXPECT_GE(Instant::Now(), now);
  EXPECT_EQ(now + absl::Seconds(3) - now, absl::Seconds(3));
  EXPECT_LT(now - absl::Nanoseconds(1), now);
  EXPECT_NE(now + absl::Nanoseconds(1), now);
}

TEST(InstantTest, Saturates) {
  const Instant now = Instant::Now();
  const absl::Duration longest =
      absl::Seconds(std::numeric_limits<int64_t>::max()) + absl::Milliseconds(999);
  EXPECT_EQ(now + absl::InfiniteDuration(), Instant::InfiniteFuture());
  EXPECT_EQ(now + longest + longest, Instant::InfiniteFuture());
  EXPECT_EQ(now - absl::InfiniteDuration(), Instant::InfinitePast());
  EXPECT_EQ(now - longest - longest, Instant::InfinitePast());
  EXPECT_EQ(Instant::InfiniteFuture() - now, absl::InfiniteDuration());
  EXPECT_EQ(Instant::InfiniteFuture() - absl::InfiniteDuration(), Instant::InfiniteFuture());
  EXPECT_LT(now + 10'000 * kYear, Instant::InfiniteFuture());
}

TEST(InstantTest, ToChronoSaturates) {
  using TimePoint = std::chrono::steady_clock::time_point;
  const Instant now = Instant::Now();
  EXPECT_EQ(now.ToChrono().time_since_epoch(), absl::ToChronoNanoseconds(now - Instant()));
  EXPECT_EQ((now + 300 * kYear).ToChrono(), TimePoint::max());
  EXPECT_EQ(Instant::InfiniteFuture().ToChrono(), TimePoint::max());
  EXPECT_EQ(Instant::InfinitePast().ToChrono(), TimePoint::min());
}

TEST(CondVarTest, DoesNotWaitForThePast) {
  Mutex mutex;
  CondVar changed;
  MutexLock lock(&mutex);
  changed.WaitUntil(&mutex, Instant::InfinitePast());
  changed.WaitUntil(&mutex, Instant::Now() - 300 * kYear);
  changed.WaitUntil(&mutex, Instant::Now());
}

// A wait that takes the furthest for the past would spin: one that waits is woken once.
TEST(CondVarTest, WaitsForTheFurthest) {
  for (const Instant until : {Instant::InfiniteFuture(), Instant::Now() + 300 * kYear}) {
    Mutex mutex;
    CondVar changed;
    bool told = false;
    int wakes = 0;
    mutex.Lock();  // until the wait begins: before that nobody can tell
    std::thread teller([&] {
      MutexLock lock(&mutex);
      told = true;
      changed.Signal();
    });
    for (; !told; ++wakes) changed.WaitUntil(&mutex, until);
    mutex.Unlock();
    teller.join();
    EXPECT_LE(wakes, 10) << "spurious ones are rare";
  }
}

}  // namespace
}  // namespace headstart
