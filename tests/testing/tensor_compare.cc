#include "tests/testing/tensor_compare.h"

#include <cmath>
#include <cstdint>
#include <limits>

namespace headstart::testing {
namespace {

bool SameSpecial(float a, float e) {
  if (std::isnan(e)) return std::isnan(a);
  return a == e;
}

// How far an element is off, in multiples of what is allowed; infinity where only one is special.
double Excess(float a, float e, double allowed) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  if (!std::isfinite(a) || !std::isfinite(e)) return SameSpecial(a, e) ? 0 : kInfinite;
  const double error = std::abs(double{a} - e);
  if (error == 0) return 0;
  return allowed > 0 ? error / allowed : kInfinite;
}

struct Cosine {
  double dot = 0;
  double aa = 0;
  double ee = 0;
  void Add(float a, float e) {
    if (!std::isfinite(a) || !std::isfinite(e)) return;
    dot += double{a} * e;
    aa += double{a} * a;
    ee += double{e} * e;
  }
  double value() const { return aa == ee && dot == aa ? 1 : dot / std::sqrt(aa * ee); }
};

}  // namespace

::testing::AssertionResult TensorsMatch(absl::Span<const float> actual,
                                        absl::Span<const float> expected,
                                        const Tolerance& tolerance) {
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure()
           << actual.size() << " elements, expected " << expected.size();
  }
  int64_t num_off = 0;
  size_t worst = 0;
  double worst_excess = 0;
  Cosine cosine;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double scale = tolerance.scale.empty() ? 1 : tolerance.scale[i];
    const double allowed = tolerance.abs * scale + tolerance.rel * std::abs(double{expected[i]});
    const double excess = Excess(actual[i], expected[i], allowed);
    num_off += excess > 1;
    if (excess > worst_excess) {
      worst_excess = excess;
      worst = i;
    }
    cosine.Add(actual[i], expected[i]);
  }
  // Written so that a NaN (one tensor is zero, the other not) fails.
  if (num_off == 0 && (actual.empty() || cosine.value() >= tolerance.min_cosine)) {
    return ::testing::AssertionSuccess();
  }
  ::testing::AssertionResult failure = ::testing::AssertionFailure();
  failure << num_off << " of " << actual.size() << " elements off, cosine " << cosine.value();
  if (!actual.empty()) {
    failure << "; worst at [" << worst << "]: " << actual[worst] << ", expected " << expected[worst]
            << ", " << worst_excess << " times the tolerance";
  }
  return failure;
}

}  // namespace headstart::testing
