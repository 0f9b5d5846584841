#include "engine/run/kv_staging.h"

#include <algorithm>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace headstart {

std::optional<int64_t> PageRing::Take(int64_t count) {
  HEADSTART_CHECK(count > 0 && count <= num_pages_);
  if (used_ == 0) next_ = 0;
  const int64_t skipped = count > num_pages_ - next_ ? num_pages_ - next_ : 0;
  if (used_ + skipped + count > num_pages_) return std::nullopt;
  const int64_t begin = skipped > 0 ? 0 : next_;
  next_ = (begin + count) % num_pages_;
  used_ += skipped + count;
  runs_.push_back(skipped + count);
  return begin;
}

void PageRing::GiveBack() {
  HEADSTART_CHECK(!runs_.empty());
  used_ -= runs_.front();
  runs_.pop_front();
}

void PageRing::Clear() {
  runs_.clear();
  used_ = 0;
}

int64_t KvStaging::RunPages(const KvGeometry& geometry, int64_t max_rows) {
  return std::max(NumBlocks(max_rows), geometry.chunk_pages);
}

int64_t KvStaging::Bytes(const KvGeometry& geometry, int64_t max_rows) {
  return kRuns * RunPages(geometry, max_rows) * Fp8PageBytes(geometry.heads);
}

absl::StatusOr<KvStaging> KvStaging::Create(const KvGeometry& geometry, int64_t max_rows,
                                            Backend& backend) {
  HEADSTART_ASSIGN_OR_RETURN(Buffer memory, backend.Allocate(Bytes(geometry, max_rows)));
  return KvStaging(PageRing(kRuns * RunPages(geometry, max_rows)), Fp8PageBytes(geometry.heads),
                   std::move(memory), backend);
}

absl::StatusOr<const std::byte*> KvStaging::Stage(const KvPages& kv,
                                                  absl::Span<const KvPageTokens> pages) {
  const std::optional<int64_t> first = ring_.Take(static_cast<int64_t>(pages.size()));
  if (!first.has_value()) return nullptr;
  std::byte* const out = static_cast<std::byte*>(memory_.data()) + *first * page_bytes_;
  const absl::Status status = backend_->QuantizeKv({kv, pages, out});
  if (!status.ok()) return status;
  return out;
}

}  // namespace headstart
