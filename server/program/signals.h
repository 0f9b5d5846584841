// SIGTERM and SIGINT as function calls. A log that can't be written any more (a pipe without
// reader, a file at its limit) ends nothing: SIGPIPE and SIGXFSZ are ignored.
#pragma once

#include <functional>
#include <thread>

namespace headstart {

// Must be made before any other thread, so that no thread is interrupted: threads inherit that the
// signals are blocked.
class SignalWatcher {
 public:
  // Calls `on_signal` with the signal's number, on a thread of its own, for every SIGTERM and
  // SIGINT.
  explicit SignalWatcher(std::function<void(int)> on_signal);
  ~SignalWatcher();
  SignalWatcher(const SignalWatcher&) = delete;
  SignalWatcher& operator=(const SignalWatcher&) = delete;

 private:
  void Loop();

  std::function<void(int)> on_signal_;
  int signal_fd_;
  int stop_fd_;
  std::thread thread_;
};

}  // namespace headstart
