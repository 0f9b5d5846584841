// A program of this build as a process of its own.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace headstart::testing {

class ChildProcess {
 public:
  // Starts `program` (a path) with its standard output and error in `log_file`.
  ChildProcess(const std::string& program, std::vector<std::string> arguments,
               std::string log_file);
  // Kills it if it still runs.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  pid_t pid() const { return pid_; }  // -1: it has ended
  void Signal(int signal) const;
  bool HasEnded();
  // Waits for the end. The exit code, or minus the signal that ended it.
  int Wait();
  // What it has printed so far.
  std::string Output() const;

 private:
  // Whether it has ended; waits for it unless `options` is WNOHANG.
  bool Reap(int options);

  const std::string log_file_;
  pid_t pid_ = -1;
  int exit_code_ = 0;
};

}  // namespace headstart::testing
