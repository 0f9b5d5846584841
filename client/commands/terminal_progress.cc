#include "client/commands/terminal_progress.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "kernels/base/instant.h"

namespace headstart {
namespace {

bool StderrIsATerminal() {
  const char* term = std::getenv("TERM");  // NOLINT(concurrency-mt-unsafe): nobody sets it
  return isatty(STDERR_FILENO) == 1 && term != nullptr && absl::string_view(term) != "dumb";
}

}  // namespace

TerminalLine::TerminalLine() : enabled_(StderrIsATerminal()) {}

bool TerminalLine::Due() {
  if (!enabled_) return false;
  const Instant now = Instant::Now();
  if (now < next_update_) return false;
  next_update_ = now + absl::Milliseconds(100);
  return true;
}

void TerminalLine::Show(const std::string& text) {
  if (enabled_) std::fprintf(stderr, "\r\033[K%s", text.c_str());
}

void TerminalLine::Clear() {
  if (enabled_) std::fprintf(stderr, "\r\033[K");
}

void TerminalProgress::Follow(KvReceiverOptions* receive) {
  if (!line_.enabled()) return;
  receive->on_accepted = [this](const v1::Accepted& accepted) {
    line_.Show(accepted.queue_requests() == 0
                   ? "computing"
                   : absl::StrCat("queued behind ", accepted.queue_requests(), " requests, ",
                                  accepted.queue_tokens(), " tokens"));
    return absl::OkStatus();
  };
  receive->on_progress = [this](int64_t done_bytes, int64_t total_bytes) {
    if (!line_.Due()) return;
    line_.Show(absl::StrFormat("receiving KV: %3d %% of %.1f MB", 100 * done_bytes / total_bytes,
                               total_bytes / 1e6));
  };
}

}  // namespace headstart
