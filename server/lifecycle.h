// What a server is doing: the one fact that health, readiness, probes and the end follow. Knows no
// gRPC.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"

namespace headstart {

// Thread-safe.
class Lifecycle {
 public:
  enum class Phase : uint8_t { kLoading, kServing, kDraining, kFailed };
  // Told of every change, one after the other and under a lock: short, and calls nothing of this.
  // `healthy`: requests are taken, and compute makes progress.
  using OnChange = std::function<void(Phase phase, bool healthy)>;

  // Compute that finishes no layer for `stuck_after` is stuck.
  Lifecycle(absl::Duration stuck_after, OnChange on_change)
      : stuck_after_(stuck_after), on_change_(std::move(on_change)) {}

  // ---- what happens

  // The model is there: kServing, unless the server drains or has failed already.
  void Load();
  // No request is taken from now on. False when that was so already.
  bool Drain();
  // For ever.
  void Fail(absl::Status why);
  // What compute is doing at `now`: whether a step runs, and layers finished since the start. To be
  // called regularly. Whether compute is stuck, when that has changed.
  std::optional<bool> WatchCompute(bool computing, int64_t layers_done, Instant now);

  // ---- what is

  Phase phase() const;
  bool healthy() const;
  bool stuck() const;
  // OK when the process is worth keeping, and when requests are taken; else why not, in words for
  // probes.
  absl::Status Live() const;
  absl::Status Ready() const;
  // OK when serving. UNAVAILABLE with the reason why not.
  absl::Status WhyClosed() const;
  // OK, or what Fail was given.
  absl::Status failure() const;
  // Neither loaded nor failed, whether it is told to drain or not.
  bool loading() const;

  // The model is loaded (OK) or never will be.
  absl::Status WaitUntilLoaded() const;
  // Waits for Drain or Fail.
  void WaitForEnd() const;

 private:
  void Enter(Phase phase) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool IsHealthy() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return phase_ == Phase::kServing && !stuck_;
  }

  const absl::Duration stuck_after_;
  const OnChange on_change_;
  mutable Mutex mutex_;
  mutable CondVar changed_;
  Phase phase_ ABSL_GUARDED_BY(mutex_) = Phase::kLoading;
  bool loaded_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);  // of kFailed
  bool stuck_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t layers_seen_ ABSL_GUARDED_BY(mutex_) = 0;
  Instant last_progress_ ABSL_GUARDED_BY(mutex_) = Instant::InfiniteFuture();
};

// As one word: loading, serving, draining, failed.
std::string_view PhaseName(Lifecycle::Phase phase);

// What requests get in a phase; OK for kServing.
absl::Status WhyClosedIn(Lifecycle::Phase phase);

}  // namespace headstart
