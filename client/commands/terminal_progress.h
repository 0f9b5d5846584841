// One line on standard error that follows a request. Says nothing when standard error is no
// terminal.
#pragma once

#include <string>

#include "absl/time/time.h"
#include "client/kv_receiver.h"

namespace headstart {

class TerminalProgress {
 public:
  TerminalProgress();
  ~TerminalProgress() { Clear(); }
  TerminalProgress(const TerminalProgress&) = delete;
  TerminalProgress& operator=(const TerminalProgress&) = delete;

  // Sets on_accepted and on_progress; this object must outlive the call that uses them.
  void Follow(KvReceiverOptions* receive);

  // Takes the line away, before anything else is printed.
  void Clear();

 private:
  void Show(const std::string& text);

  const bool enabled_;
  absl::Time next_update_ = absl::InfinitePast();
};

}  // namespace headstart
