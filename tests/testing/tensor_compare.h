// Comparison of computed tensors with expected ones.
#pragma once

#include <gtest/gtest.h>

#include "absl/types/span.h"
#include "kernels/base/dtype.h"

namespace headstart::testing {

// Greatest relative error of one rounding to `dtype` (kF32 or kBF16), to nearest.
constexpr double UnitRoundoff(DType dtype) { return dtype == DType::kF32 ? 0x1p-24 : 0x1p-8; }

struct Tolerance {
  // |actual - expected| <= abs * scale + rel * |expected|, for every element.
  double abs = 0;
  double rel = 0;
  // Cosine of the angle between the two tensors, over their finite elements.
  double min_cosine = 0.999;
  // Per element, what `abs` is a multiple of (say, the sum of the absolute terms of a dot product);
  // empty: 1.
  absl::Span<const float> scale = {};
};

// NaN must meet NaN and an infinity its own sign; the rest is held to `tolerance`. A failure says
// how many elements are off, and the index and values of the worst.
::testing::AssertionResult TensorsMatch(absl::Span<const float> actual,
                                        absl::Span<const float> expected,
                                        const Tolerance& tolerance);

}  // namespace headstart::testing
