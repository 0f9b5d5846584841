// One line on standard error that follows a load. Says nothing when standard error is no terminal.
#pragma once

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/commands/load.h"
#include "client/commands/terminal_progress.h"
#include "kernels/base/instant.h"

namespace headstart {

// Thread-safe.
class LoadProgress {
 public:
  LoadProgress();

  void Sent();
  void Ended(const LoadSample& sample);
  // Takes the line away, before anything else is printed.
  void Clear();

 private:
  void Show() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Instant start_;
  absl::Mutex mutex_;
  TerminalLine line_ ABSL_GUARDED_BY(mutex_);
  int64_t sent_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t ok_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t refused_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t failed_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t tokens_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace headstart
