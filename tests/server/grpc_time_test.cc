#include "proto/grpc_time.h"

#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <limits>
#include <tuple>

#include "server/rpc/describe.h"

namespace headstart {
namespace {

constexpr absl::Duration kLongestTimeout = absl::Hours(99'999'999);  // that a call may name

TEST(GrpcTimeTest, IsGrpcsOwnMonotonicClock) {
  const gpr_timespec before = gpr_now(GPR_CLOCK_MONOTONIC);
  const gpr_timespec now = ToGrpcTime(Instant::Now());
  const gpr_timespec after = gpr_now(GPR_CLOCK_MONOTONIC);
  EXPECT_LE(gpr_time_cmp(before, now), 0);
  EXPECT_LE(gpr_time_cmp(now, after), 0);
}

TEST(GrpcTimeTest, GoesBothWays) {
  const Instant now = Instant::Now();
  for (const Instant time :
       {now, now + absl::Hours(1), now + absl::Hours(24 * 365 * 300), now + kLongestTimeout}) {
    EXPECT_LT(absl::AbsDuration(FromGrpcTime(ToGrpcTime(time)) - time), absl::Nanoseconds(1));
  }
  EXPECT_EQ(FromGrpcTime(ToGrpcTime(Instant::InfiniteFuture())), Instant::InfiniteFuture());
}

TEST(GrpcTimeTest, TheFurthestIsNeverThePast) {
  const gpr_timespec never = gpr_inf_future(GPR_CLOCK_REALTIME);
  EXPECT_EQ(FromGrpcTime(never), Instant::InfiniteFuture());
  gpr_timespec far = gpr_now(GPR_CLOCK_MONOTONIC);
  far.tv_sec += absl::ToInt64Seconds(kLongestTimeout);
  EXPECT_GT(FromGrpcTime(far), Instant::Now() + kLongestTimeout / 2);
  EXPECT_LT(FromGrpcTime(gpr_inf_past(GPR_CLOCK_MONOTONIC)), Instant::Now());
  EXPECT_EQ(gpr_time_cmp(ToGrpcTime(Instant::InfinitePast()), gpr_inf_past(GPR_CLOCK_MONOTONIC)),
            0);
}

TEST(GrpcTimeTest, AContextTakesAnInstant) {
  grpc::ClientContext context;
  const Instant deadline = Instant::Now() + absl::Hours(24 * 365 * 300);
  context.set_deadline(deadline);
  EXPECT_EQ(FromGrpcTime(context.raw_deadline()), FromGrpcTime(ToGrpcTime(deadline)));
}

TEST(GrpcTimeTest, MillisecondsNeverWrap) {
  constexpr int kNever = std::numeric_limits<int>::max();
  EXPECT_EQ(ToGrpcMs(absl::Seconds(30)), 30'000);
  EXPECT_EQ(ToGrpcMs(absl::Hours(596)), 596 * 3'600'000);
  EXPECT_EQ(ToGrpcMs(absl::Hours(597)), kNever);  // 2^31 ms are 596.5 hours
  EXPECT_EQ(ToGrpcMs(absl::Hours(1200)), kNever);
  EXPECT_EQ(ToGrpcMs(absl::InfiniteDuration()), kNever);
  EXPECT_EQ(ToGrpcMs(absl::Microseconds(1500)), 2);
  EXPECT_EQ(ToGrpcMs(absl::Nanoseconds(1)), 1);
}

TEST(DurationTest, IsAlwaysAValidOne) {
  const absl::Duration longest =
      absl::Seconds(std::numeric_limits<int64_t>::max()) + absl::Milliseconds(999);
  for (const auto& [duration, seconds, nanos] :
       {std::tuple(absl::Milliseconds(1500), int64_t{1}, 500'000'000),
        {absl::Milliseconds(-1500), -1, -500'000'000},
        {longest, 315'576'000'000, 0},
        {absl::InfiniteDuration(), 315'576'000'000, 0},
        {-absl::InfiniteDuration(), -315'576'000'000, 0}}) {
    google::protobuf::Duration out;
    SetDuration(duration, &out);
    EXPECT_EQ(out.seconds(), seconds);
    EXPECT_EQ(out.nanos(), nanos);
  }
}

}  // namespace
}  // namespace headstart
