// Points in time, of the clock that nobody sets. absl::Time is for what people and other programs
// are told.
#pragma once

#include <chrono>

#include "absl/time/time.h"

namespace headstart {

// Of the monotonic clock: a step of the wall clock (NTP, a VM that goes on) moves none. Arithmetic
// is absl::Duration's, so it saturates: beyond the ends lie InfinitePast and InfiniteFuture.
class Instant {
 public:
  // The clock's origin, which means nothing.
  constexpr Instant() = default;
  static Instant Now() {
    return Instant(absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch()));
  }
  static constexpr Instant InfinitePast() { return Instant(-absl::InfiniteDuration()); }
  static constexpr Instant InfiniteFuture() { return Instant(absl::InfiniteDuration()); }

  // For the standard library's waits; what it can't count is its furthest.
  std::chrono::steady_clock::time_point ToChrono() const {
    return std::chrono::steady_clock::time_point(absl::ToChronoNanoseconds(since_origin_));
  }

  friend Instant operator+(Instant a, absl::Duration d) { return Instant(a.since_origin_ + d); }
  friend Instant operator-(Instant a, absl::Duration d) { return Instant(a.since_origin_ - d); }
  friend absl::Duration operator-(Instant a, Instant b) {
    return a.since_origin_ - b.since_origin_;
  }
  Instant& operator+=(absl::Duration d) { return *this = *this + d; }

  friend constexpr bool operator==(Instant a, Instant b) {
    return a.since_origin_ == b.since_origin_;
  }
  friend constexpr bool operator!=(Instant a, Instant b) { return !(a == b); }
  friend constexpr bool operator<(Instant a, Instant b) {
    return a.since_origin_ < b.since_origin_;
  }
  friend constexpr bool operator>(Instant a, Instant b) { return b < a; }
  friend constexpr bool operator<=(Instant a, Instant b) { return !(b < a); }
  friend constexpr bool operator>=(Instant a, Instant b) { return !(a < b); }

 private:
  explicit constexpr Instant(absl::Duration since_origin) : since_origin_(since_origin) {}

  absl::Duration since_origin_ = absl::ZeroDuration();
};

}  // namespace headstart
