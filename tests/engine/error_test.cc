#include "engine/error.h"

#include <gtest/gtest.h>

#include "kernels/base/nonfinite.h"

namespace headstart {
namespace {

TEST(ErrorTest, KeepsReasonAndMessage) {
  const absl::Status status =
      MakeError(absl::StatusCode::kNotFound, ErrorReason::kUnknownModel, "model: no such");
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "model: no such");
  EXPECT_EQ(ReasonOf(status), ErrorReason::kUnknownModel);
  EXPECT_FALSE(RetryAfter(status).has_value());
}

TEST(ErrorTest, KeepsRetryDelay) {
  const absl::Status status =
      MakeRetryableError(absl::StatusCode::kResourceExhausted, ErrorReason::kQueueFull, "full",
                         absl::Milliseconds(1500));
  EXPECT_EQ(ReasonOf(status), ErrorReason::kQueueFull);
  EXPECT_EQ(RetryAfter(status), absl::Milliseconds(1500));
}

TEST(ErrorTest, DerivesReasonOfForeignStatusFromItsCode) {
  EXPECT_EQ(ReasonOf(absl::OkStatus()), ErrorReason::kNone);
  EXPECT_EQ(ReasonOf(absl::InvalidArgumentError("")), ErrorReason::kInvalidField);
  EXPECT_EQ(ReasonOf(absl::FailedPreconditionError("")), ErrorReason::kPromptExceedsPool);
  EXPECT_EQ(ReasonOf(absl::ResourceExhaustedError("")), ErrorReason::kOutOfMemory);
  EXPECT_EQ(ReasonOf(absl::CancelledError("")), ErrorReason::kClientCancelled);
  EXPECT_EQ(ReasonOf(absl::DeadlineExceededError("")), ErrorReason::kDeadlineExceeded);
  EXPECT_EQ(ReasonOf(absl::InternalError("")), ErrorReason::kInternal);
  EXPECT_EQ(ReasonOf(NonFiniteError("layer 3")), ErrorReason::kNonfiniteOutput);
}

}  // namespace
}  // namespace headstart
