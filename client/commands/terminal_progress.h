// One line on standard error that follows what goes on. Says nothing when standard error is no
// terminal.
#pragma once

#include <string>

#include "client/kv_receiver.h"
#include "kernels/base/instant.h"

namespace headstart {

class TerminalLine {
 public:
  TerminalLine();
  ~TerminalLine() { Clear(); }
  TerminalLine(const TerminalLine&) = delete;
  TerminalLine& operator=(const TerminalLine&) = delete;

  bool enabled() const { return enabled_; }
  // There is a terminal, and the last time was a while ago.
  bool Due();
  void Show(const std::string& text);
  // Takes the line away, before anything else is printed.
  void Clear();

 private:
  const bool enabled_;
  Instant next_update_ = Instant::InfinitePast();
};

// Follows one request.
class TerminalProgress {
 public:
  // Sets on_accepted and on_progress; this object must outlive the call that uses them.
  void Follow(KvReceiverOptions* receive);

  void Clear() { line_.Clear(); }

 private:
  TerminalLine line_;
};

}  // namespace headstart
