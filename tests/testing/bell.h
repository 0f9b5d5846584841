// What a thread waits for again and again, where Notification is for once.
#pragma once

#include "absl/base/thread_annotations.h"
#include "kernels/base/mutex.h"

namespace headstart::testing {

class Bell {
 public:
  void Ring() {
    MutexLock lock(&mutex_);
    rung_ = true;
    changed_.Signal();
  }
  // Returns when it was rung since the last Wait.
  void Wait() {
    MutexLock lock(&mutex_);
    while (!rung_) changed_.Wait(&mutex_);
    rung_ = false;
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool rung_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace headstart::testing
