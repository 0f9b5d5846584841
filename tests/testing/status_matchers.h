// GoogleTest matchers for absl::Status and absl::StatusOr; this Abseil has none of its own.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace headstart::testing {

inline const absl::Status& AsStatus(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& AsStatus(const absl::StatusOr<T>& status_or) {
  return status_or.status();
}

MATCHER(IsOk, negation ? "is not OK" : "is OK") {
  *result_listener << AsStatus(arg).ToString();
  return AsStatus(arg).ok();
}

// EXPECT_THAT(DoIt(), StatusIs(absl::StatusCode::kCancelled, HasSubstr("layer 3")));
MATCHER_P2(StatusIs, code, message_matcher, "has the code and a message that matches") {
  const absl::Status& status = AsStatus(arg);
  *result_listener << status.ToString();
  return status.code() == code &&
         ::testing::ExplainMatchResult(message_matcher, std::string(status.message()),
                                       result_listener);
}

inline auto StatusIs(absl::StatusCode code) { return StatusIs(code, ::testing::_); }

}  // namespace headstart::testing

// Fails the test when `expr`, an absl::Status or absl::StatusOr, is not OK.
#define EXPECT_OK(expr) EXPECT_THAT(expr, ::headstart::testing::IsOk())
#define ASSERT_OK(expr) ASSERT_THAT(expr, ::headstart::testing::IsOk())

// ASSERT_OK_AND_ASSIGN(auto config, ReadModelConfig(dir));
#define ASSERT_OK_AND_ASSIGN(lhs, expr) \
  ASSERT_OK_AND_ASSIGN_IMPL_(HEADSTART_TEST_CONCAT_(test_statusor_, __LINE__), lhs, expr)
#define ASSERT_OK_AND_ASSIGN_IMPL_(statusor, lhs, expr) \
  auto statusor = (expr);                               \
  ASSERT_OK(statusor);                                  \
  lhs = std::move(statusor).value()
#define HEADSTART_TEST_CONCAT_(a, b) HEADSTART_TEST_CONCAT_INNER_(a, b)
#define HEADSTART_TEST_CONCAT_INNER_(a, b) a##b
