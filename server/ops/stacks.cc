#include "server/ops/stacks.h"

#include <execinfo.h>
#include <semaphore.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>

#include "absl/debugging/symbolize.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"

namespace headstart {
namespace {

constexpr int kMaxFrames = 64;
// Of the handler itself and of the return from it.
constexpr int kOwnFrames = 2;

// What asker and handler share. The handler of thread t may write while `wanted` is -t, to which it
// has set it.
std::atomic<pid_t> wanted{0};
std::array<void*, kMaxFrames> frames;
int depth = 0;
sem_t written;

pid_t ThreadId() { return static_cast<pid_t>(syscall(SYS_gettid)); }

void WriteFrames(int /*signal*/) {
  const int error = errno;
  pid_t self = ThreadId();
  if (wanted.compare_exchange_strong(self, -self)) {
    depth = backtrace(frames.data(), kMaxFrames);
    sem_post(&written);
  }
  errno = error;
}

int StackSignal() { return SIGRTMIN + 7; }

void InstallHandler() {
  sem_init(&written, /*pshared=*/0, 0);
  backtrace(frames.data(), 1);  // loads the unwinder, which a handler must not
  struct sigaction action = {};
  action.sa_handler = WriteFrames;
  action.sa_flags = SA_RESTART;
  sigaction(StackSignal(), &action, nullptr);
}

bool WaitUntilWritten(Instant limit) {
  const timespec until = absl::ToTimespec(absl::FromChrono(limit.ToChrono().time_since_epoch()));
  int result = 0;
  do {
    result = sem_clockwait(&written, CLOCK_MONOTONIC, &until);
  } while (result != 0 && errno == EINTR);
  return result == 0;
}

// False when the thread does not answer. Then nobody may ask again if it has begun to write.
bool Ask(pid_t thread, Instant limit) {
  wanted.store(thread);
  if (syscall(SYS_tgkill, getpid(), thread, StackSignal()) != 0) return false;  // it has ended
  if (WaitUntilWritten(limit)) return true;
  pid_t unanswered = thread;
  return !wanted.compare_exchange_strong(unanswered, 0) &&
         WaitUntilWritten(limit + absl::Seconds(1));
}

std::string ReadLine(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

void AppendFrames(std::string* out) {
  std::array<char, 256> name;
  for (int i = kOwnFrames; i < depth; ++i) {
    // A return address is behind its call.
    const char* pc = static_cast<const char*>(frames[i]) - (i > kOwnFrames ? 1 : 0);
    const bool known = absl::Symbolize(pc, name.data(), static_cast<int>(name.size()));
    absl::StrAppendFormat(out, "  %p %s\n", frames[i], known ? name.data() : "?");
  }
}

}  // namespace

std::string AllStacks(absl::Duration patience) {
  static Mutex mutex;
  MutexLock lock(&mutex);
  static const bool installed = (InstallHandler(), true);
  (void)installed;
  std::string out;
  std::error_code error;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", error)) {
    pid_t thread = 0;
    if (!absl::SimpleAtoi(task.path().filename().string(), &thread)) continue;
    if (wanted.load() < 0) wanted.store(0);
    absl::StrAppend(&out, "thread ", thread, " ", ReadLine(task.path() / "comm"), "\n");
    if (Ask(thread, Instant::Now() + patience)) {
      AppendFrames(&out);
    } else if (wanted.load() < 0) {
      return out + "  began to answer and did not end: no more is asked for\n";
    } else {
      absl::StrAppend(&out, "  does not answer; in the kernel: ", ReadLine(task.path() / "wchan"),
                      ", ", ReadLine(task.path() / "syscall"), "\n");
    }
  }
  return out;
}

}  // namespace headstart
