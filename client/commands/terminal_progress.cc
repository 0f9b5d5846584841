#include "client/commands/terminal_progress.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"

namespace headstart {
namespace {

bool StderrIsATerminal() {
  const char* term = std::getenv("TERM");  // NOLINT(concurrency-mt-unsafe): nobody sets it
  return isatty(STDERR_FILENO) == 1 && term != nullptr && absl::string_view(term) != "dumb";
}

}  // namespace

TerminalProgress::TerminalProgress() : enabled_(StderrIsATerminal()) {}

void TerminalProgress::Follow(KvReceiverOptions* receive) {
  if (!enabled_) return;
  receive->on_accepted = [this](const v1::Accepted& accepted) {
    Show(accepted.queue_requests() == 0
             ? "computing"
             : absl::StrCat("queued behind ", accepted.queue_requests(), " requests, ",
                            accepted.queue_tokens(), " tokens"));
    return absl::OkStatus();
  };
  receive->on_progress = [this](int64_t done_bytes, int64_t total_bytes) {
    const absl::Time now = absl::Now();
    if (now < next_update_) return;
    next_update_ = now + absl::Milliseconds(100);
    Show(absl::StrFormat("receiving KV: %3d %% of %.1f MB", 100 * done_bytes / total_bytes,
                         total_bytes / 1e6));
  };
}

void TerminalProgress::Show(const std::string& text) {
  std::fprintf(stderr, "\r\033[K%s", text.c_str());
}

void TerminalProgress::Clear() {
  if (enabled_) std::fprintf(stderr, "\r\033[K");
}

}  // namespace headstart
