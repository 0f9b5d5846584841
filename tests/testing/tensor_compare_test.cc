#include "tests/testing/tensor_compare.h"

#include <gmock/gmock.h>

#include <cmath>
#include <limits>
#include <vector>

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(TensorsMatchTest, AcceptsWhatLiesWithinTheTolerance) {
  EXPECT_TRUE(TensorsMatch({1.0f, 100.0f}, {1.1f, 101.0f}, {.abs = 0.11, .rel = 0.01}));
  EXPECT_TRUE(TensorsMatch({}, {}, {}));
  EXPECT_TRUE(TensorsMatch({0.0f, 0.0f}, {0.0f, 0.0f}, {}));
}

TEST(TensorsMatchTest, NamesTheWorstElement) {
  const auto result = TensorsMatch({1.0f, 2.0f, 3.0f}, {1.01f, 2.5f, 3.0f}, {.abs = 0.001});
  ASSERT_FALSE(result);
  EXPECT_THAT(result.message(), HasSubstr("2 of 3 elements off"));
  EXPECT_THAT(result.message(), HasSubstr("worst at [1]: 2, expected 2.5, 500 times"));
}

TEST(TensorsMatchTest, ScalesTheToleranceByElement) {
  const std::vector<float> scale = {1.0f, 100.0f};
  EXPECT_TRUE(
      TensorsMatch({5.0f, 5.5f}, {5.0f, 5.0f}, {.abs = 0.01, .min_cosine = 0, .scale = scale}));
  EXPECT_FALSE(
      TensorsMatch({5.5f, 5.0f}, {5.0f, 5.0f}, {.abs = 0.01, .min_cosine = 0, .scale = scale}));
}

TEST(TensorsMatchTest, ComparesNanAndInfinityExactly) {
  const Tolerance wide{.abs = 1e9, .rel = 1e9, .min_cosine = -1};
  EXPECT_TRUE(TensorsMatch({kNan, kInf, -kInf, 1.0f}, {kNan, kInf, -kInf, 1.0f}, wide));
  EXPECT_FALSE(TensorsMatch({kNan}, {1.0f}, wide));
  EXPECT_FALSE(TensorsMatch({1.0f}, {kNan}, wide));
  EXPECT_FALSE(TensorsMatch({kInf}, {-kInf}, wide));
  EXPECT_FALSE(TensorsMatch({1.0f}, {kInf}, wide));
}

TEST(TensorsMatchTest, RefusesAnotherDirection) {
  EXPECT_FALSE(TensorsMatch({1.0f, 0.0f}, {0.0f, 1.0f}, {.abs = 10}));
  EXPECT_FALSE(TensorsMatch({0.0f, 0.0f}, {0.1f, 0.1f}, {.abs = 10}));
}

TEST(TensorsMatchTest, RefusesAnotherSize) { EXPECT_FALSE(TensorsMatch({1.0f}, {}, {.abs = 10})); }

TEST(UnitRoundoffTest, BoundsOneRounding) {
  for (float x = 1.0f; x < 2.0f; x += 0.001f) {
    const auto rounded = static_cast<float>(BFloat16(x));
    EXPECT_LE(std::abs(rounded - x), UnitRoundoff(DType::kBF16) * x);
  }
}

}  // namespace
}  // namespace headstart::testing
