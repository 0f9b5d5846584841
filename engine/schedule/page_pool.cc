#include "engine/schedule/page_pool.h"

#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace headstart {

PageRefs::~PageRefs() {
  if (pool_ != nullptr) pool_->Release(pages_);
}

PagePool::PagePool(int64_t num_pages) : num_pages_(num_pages) {
  HEADSTART_CHECK(num_pages >= 0);
  // Pages are taken from the back; the first ones go first.
  free_.resize(static_cast<size_t>(num_pages));
  std::iota(free_.rbegin(), free_.rend(), 0);
}

absl::StatusOr<PageRefs> PagePool::Take(int64_t count) {
  HEADSTART_CHECK(count >= 0);
  if (count > num_pages_) {
    return absl::FailedPreconditionError(
        absl::StrCat("needs ", count, " KV pages, the pool has ", num_pages_));
  }
  MutexLock lock(&mutex_);
  const auto num_free = static_cast<int64_t>(free_.size());
  if (count > num_free) {
    return absl::ResourceExhaustedError(
        absl::StrCat("needs ", count, " KV pages, ", num_free, " are free"));
  }
  std::vector<int32_t> pages(free_.rbegin(), free_.rbegin() + count);
  free_.resize(static_cast<size_t>(num_free - count));
  acquired_ += count;
  return PageRefs(this, std::move(pages));
}

void PagePool::Release(const std::vector<int32_t>& pages) {
  MutexLock lock(&mutex_);
  free_.insert(free_.end(), pages.rbegin(), pages.rend());
  released_ += static_cast<int64_t>(pages.size());
}

int64_t PagePool::free_pages() const {
  MutexLock lock(&mutex_);
  return static_cast<int64_t>(free_.size());
}

int64_t PagePool::acquired() const {
  MutexLock lock(&mutex_);
  return acquired_;
}

int64_t PagePool::released() const {
  MutexLock lock(&mutex_);
  return released_;
}

}  // namespace headstart
