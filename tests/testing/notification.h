// absl::Notification that ThreadSanitizer can see (see kernels/base/mutex.h).
#pragma once

#include "kernels/base/check.h"
#include "kernels/base/mutex.h"

namespace headstart::testing {

class Notification {
 public:
  // Once.
  void Notify() {
    MutexLock lock(&mutex_);
    HEADSTART_CHECK(!notified_);
    notified_ = true;
    changed_.SignalAll();
  }
  bool HasBeenNotified() {
    MutexLock lock(&mutex_);
    return notified_;
  }
  void WaitForNotification() {
    MutexLock lock(&mutex_);
    while (!notified_) changed_.Wait(&mutex_);
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool notified_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace headstart::testing
