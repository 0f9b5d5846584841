#include "engine/schedule/page_pool.h"

#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace headstart {

PageRefs::~PageRefs() {
  if (pool_ != nullptr) pool_->Release(pages_);
}

void PageRefs::Append(PageRefs more) {
  if (more.pool_ == nullptr) return;
  HEADSTART_CHECK(pool_ == nullptr || pool_ == more.pool_);
  pool_ = more.pool_;
  pages_.insert(pages_.end(), more.pages_.begin(), more.pages_.end());
  more.pages_.clear();
}

void PageRefs::Replace(int64_t index, PageRefs one) {
  HEADSTART_CHECK(one.pool_ == pool_ && one.size() == 1 && index >= 0 && index < size());
  std::swap(pages_[static_cast<size_t>(index)], one.pages_.front());
}

PagePool::PagePool(int64_t num_pages) : num_pages_(num_pages) {
  HEADSTART_CHECK(num_pages >= 0);
  pages_.resize(static_cast<size_t>(num_pages));
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
  if (count > CountFree()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("needs ", count, " KV pages, ", CountFree(), " are free"));
  }
  std::vector<int32_t> taken(static_cast<size_t>(count));
  for (int32_t& page : taken) page = TakeFree();
  acquired_ += count;
  return PageRefs(this, std::move(taken));
}

int32_t PagePool::TakeFree() {
  int32_t index;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else {
    index = cached_.front();
    cached_.pop_front();
    Page& evicted = pages_[static_cast<size_t>(index)];
    by_name_.erase(*evicted.name);
    evicted.name.reset();
    evicted.state.reset();
    ++evicted_;
  }
  pages_[static_cast<size_t>(index)].holders = 1;
  return index;
}

std::optional<CachedPage> PagePool::Find(const PageHash& name) {
  MutexLock lock(&mutex_);
  const auto found = by_name_.find(name);
  if (found == by_name_.end()) return std::nullopt;
  Page& page = pages_[static_cast<size_t>(found->second)];
  if (page.holders++ == 0) cached_.erase(page.place);
  ++acquired_;
  return CachedPage{.page = PageRefs(this, {found->second}), .state = page.state};
}

bool PagePool::Has(const PageHash& name) const {
  MutexLock lock(&mutex_);
  return by_name_.contains(name);
}

void PagePool::Publish(int32_t page, const PageHash& name, std::shared_ptr<const SlotState> state) {
  MutexLock lock(&mutex_);
  HEADSTART_CHECK(page >= 0 && page < num_pages_);
  Page& published = pages_[static_cast<size_t>(page)];
  HEADSTART_CHECK(published.holders > 0 && published.name.value_or(name) == name);
  if (!by_name_.emplace(name, page).second) return;
  published.name = name;
  published.state = std::move(state);
}

void PagePool::Release(const std::vector<int32_t>& pages) {
  MutexLock lock(&mutex_);
  for (auto index = pages.rbegin(); index != pages.rend(); ++index) {
    Page& page = pages_[static_cast<size_t>(*index)];
    HEADSTART_CHECK(page.holders > 0);
    if (--page.holders > 0) continue;
    if (page.name.has_value()) {
      page.place = cached_.insert(cached_.end(), *index);
    } else {
      free_.push_back(*index);
    }
  }
  released_ += static_cast<int64_t>(pages.size());
}

int64_t PagePool::CountFree() const { return static_cast<int64_t>(free_.size() + cached_.size()); }

int64_t PagePool::free_pages() const {
  MutexLock lock(&mutex_);
  return CountFree();
}

int64_t PagePool::cached_pages() const {
  MutexLock lock(&mutex_);
  return static_cast<int64_t>(cached_.size());
}

int64_t PagePool::acquired() const {
  MutexLock lock(&mutex_);
  return acquired_;
}

int64_t PagePool::released() const {
  MutexLock lock(&mutex_);
  return released_;
}

int64_t PagePool::evicted() const {
  MutexLock lock(&mutex_);
  return evicted_;
}

}  // namespace headstart
