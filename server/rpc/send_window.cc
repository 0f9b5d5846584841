#include "server/rpc/send_window.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/error.h"

namespace headstart {

absl::StatusOr<absl::Duration> SendWindow::Take(int64_t bytes, absl::Time deadline) {
  MutexLock lock(&mutex_);
  const absl::Time began = absl::Now();
  bool waited = false;
  while (broken_.ok() && !HasRoom(bytes)) {
    waited = true;
    const absl::Time stalled = std::max(began, last_progress_) + stall_timeout_;
    const absl::Time now = absl::Now();
    if (now >= deadline) {
      return MakeError(absl::StatusCode::kDeadlineExceeded, ErrorReason::kDeadlineExceeded,
                       "the deadline passed while the client did not take KV");
    }
    if (now >= stalled) {
      return MakeError(
          absl::StatusCode::kCancelled, ErrorReason::kClientStalled,
          absl::StrCat("the client took no KV for ", absl::FormatDuration(stall_timeout_)));
    }
    changed_.WaitUntil(&mutex_, std::min(deadline, stalled));
  }
  if (!broken_.ok()) return broken_;
  held_bytes_ += bytes;
  return waited ? absl::Now() - began : absl::ZeroDuration();
}

void SendWindow::GiveBack(int64_t bytes) {
  MutexLock lock(&mutex_);
  held_bytes_ -= bytes;
  last_progress_ = absl::Now();
  changed_.Signal();
}

void SendWindow::Break(absl::Status why) {
  MutexLock lock(&mutex_);
  if (broken_.ok()) broken_ = std::move(why);
  changed_.Signal();
}

}  // namespace headstart
