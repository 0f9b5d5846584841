// Wakes a thread that looks for work elsewhere. Holds no other lock, so anybody may notify.
#pragma once

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"

namespace headstart {

class WakeSignal {
 public:
  void Notify() {
    MutexLock lock(&mutex_);
    ++count_;
    changed_.SignalAll();
  }
  // To be asked before looking for work.
  uint64_t count() const {
    MutexLock lock(&mutex_);
    return count_;
  }
  // Waits until somebody notified since `seen`, or for `deadline`.
  void WaitBeyond(uint64_t seen, Instant deadline) {
    MutexLock lock(&mutex_);
    if (count_ == seen) changed_.WaitUntil(&mutex_, deadline);
  }

 private:
  mutable Mutex mutex_;
  CondVar changed_;
  uint64_t count_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace headstart
