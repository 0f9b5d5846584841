#include "server/lifecycle.h"

#include <algorithm>
#include <utility>

#include "engine/error.h"
#include "kernels/base/instant.h"

namespace headstart {

std::string_view PhaseName(Lifecycle::Phase phase) {
  switch (phase) {
    case Lifecycle::Phase::kLoading:
      return "loading";
    case Lifecycle::Phase::kServing:
      return "serving";
    case Lifecycle::Phase::kDraining:
      return "draining";
    case Lifecycle::Phase::kFailed:
      return "failed";
  }
  return "";
}

absl::Status WhyClosedIn(Lifecycle::Phase phase) {
  constexpr auto kCode = absl::StatusCode::kUnavailable;
  switch (phase) {
    case Lifecycle::Phase::kLoading:
      return MakeError(kCode, ErrorReason::kLoading, "the model is being loaded");
    case Lifecycle::Phase::kServing:
      return absl::OkStatus();
    case Lifecycle::Phase::kDraining:
      return MakeRetryableError(kCode, ErrorReason::kDraining, "the server is draining",
                                absl::Seconds(1));
    case Lifecycle::Phase::kFailed:
      return MakeError(kCode, ErrorReason::kEngineLost,
                       "the server gave up its model and shuts down");
  }
  return absl::OkStatus();
}

void Lifecycle::Enter(Phase phase) {
  phase_ = phase;
  on_change_(phase_, IsHealthy());
  changed_.SignalAll();
}

void Lifecycle::Load() {
  MutexLock lock(&mutex_);
  loaded_ = true;
  Enter(phase_ == Phase::kLoading ? Phase::kServing : phase_);
}

bool Lifecycle::Drain() {
  MutexLock lock(&mutex_);
  if (phase_ == Phase::kDraining || phase_ == Phase::kFailed) return false;
  Enter(Phase::kDraining);
  return true;
}

void Lifecycle::Fail(absl::Status why) {
  MutexLock lock(&mutex_);
  failure_ = std::move(why);
  Enter(Phase::kFailed);
}

std::optional<bool> Lifecycle::WatchCompute(bool computing, int64_t layers_done, Instant now) {
  MutexLock lock(&mutex_);
  const bool moves = !computing || layers_done != layers_seen_;
  last_progress_ = moves ? now : std::min(last_progress_, now);
  layers_seen_ = layers_done;
  const bool stuck = now - last_progress_ > stuck_after_;
  if (stuck == stuck_) return std::nullopt;
  stuck_ = stuck;
  Enter(phase_);
  return stuck;
}

Lifecycle::Phase Lifecycle::phase() const {
  MutexLock lock(&mutex_);
  return phase_;
}

bool Lifecycle::healthy() const {
  MutexLock lock(&mutex_);
  return IsHealthy();
}

bool Lifecycle::stuck() const {
  MutexLock lock(&mutex_);
  return stuck_;
}

absl::Status Lifecycle::Live() const {
  MutexLock lock(&mutex_);
  if (stuck_) return absl::UnavailableError("stuck: no layer finishes");
  return phase_ == Phase::kFailed ? absl::UnavailableError("failed") : absl::OkStatus();
}

absl::Status Lifecycle::Ready() const {
  MutexLock lock(&mutex_);
  if (stuck_) return absl::UnavailableError("stuck: no layer finishes");
  switch (phase_) {
    case Phase::kLoading:
      return absl::UnavailableError("loading");
    case Phase::kServing:
      return absl::OkStatus();
    case Phase::kDraining:
      return absl::UnavailableError("draining");
    case Phase::kFailed:
      return absl::UnavailableError("failed");
  }
  return absl::OkStatus();
}

absl::Status Lifecycle::WhyClosed() const { return WhyClosedIn(phase()); }

absl::Status Lifecycle::failure() const {
  MutexLock lock(&mutex_);
  return failure_;
}

bool Lifecycle::loading() const {
  MutexLock lock(&mutex_);
  return !loaded_ && failure_.ok();
}

absl::Status Lifecycle::WaitUntilLoaded() const {
  MutexLock lock(&mutex_);
  while (!loaded_ && failure_.ok()) changed_.Wait(&mutex_);
  return failure_;
}

void Lifecycle::WaitForEnd() const {
  MutexLock lock(&mutex_);
  while (phase_ == Phase::kLoading || phase_ == Phase::kServing) changed_.Wait(&mutex_);
}

}  // namespace headstart
