#include "tests/e2e/child_process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <iterator>
#include <utility>

#include "kernels/base/check.h"

namespace headstart::testing {

ChildProcess::ChildProcess(const std::string& program, std::vector<std::string> arguments,
                           std::string log_file)
    : log_file_(std::move(log_file)) {
  arguments.insert(arguments.begin(), program);
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, log_file_.c_str(),
                                   O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_adddup2(&files, STDOUT_FILENO, STDERR_FILENO);
  HEADSTART_CHECK(posix_spawn(&pid_, program.c_str(), &files, nullptr, argv.data(), environ) == 0);
  posix_spawn_file_actions_destroy(&files);
}

ChildProcess::~ChildProcess() {
  if (pid_ < 0) return;
  Signal(SIGKILL);
  Wait();
}

void ChildProcess::Signal(int signal) const {
  HEADSTART_CHECK(pid_ > 0 && kill(pid_, signal) == 0);
}

bool ChildProcess::Reap(int options) {
  if (pid_ < 0) return true;
  int status = 0;
  pid_t waited;
  do {
    waited = waitpid(pid_, &status, options);
  } while (waited < 0 && errno == EINTR);
  if (waited == 0) return false;
  HEADSTART_CHECK(waited == pid_);
  pid_ = -1;
  exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  return true;
}

bool ChildProcess::HasEnded() { return Reap(WNOHANG); }

int ChildProcess::Wait() {
  Reap(0);
  return exit_code_;
}

std::string ChildProcess::Output() const {
  std::ifstream file(log_file_);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace headstart::testing
