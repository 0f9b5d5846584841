#include "client/commands/load_progress.h"

#include "absl/strings/str_format.h"
#include "kernels/base/instant.h"

namespace headstart {

LoadProgress::LoadProgress() : start_(Instant::Now()) {}

void LoadProgress::Sent() {
  absl::MutexLock lock(&mutex_);
  ++sent_;
  Show();
}

void LoadProgress::Ended(const LoadSample& sample) {
  absl::MutexLock lock(&mutex_);
  ++(sample.ok() ? ok_ : sample.refused ? refused_ : failed_);
  if (sample.ok()) tokens_ += sample.prompt_tokens;
  Show();
}

void LoadProgress::Clear() {
  absl::MutexLock lock(&mutex_);
  line_.Clear();
}

void LoadProgress::Show() {
  if (!line_.Due()) return;
  const double seconds = absl::ToDoubleSeconds(Instant::Now() - start_);
  line_.Show(absl::StrFormat(
      "%.0f s: %d sent, %d under way, %d well, %d refused, %d failed, %.0f tokens/s", seconds,
      sent_, sent_ - ok_ - refused_ - failed_, ok_, refused_, failed_,
      static_cast<double>(tokens_) / seconds));
}

}  // namespace headstart
