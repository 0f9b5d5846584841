// Accounting of KV pages: which are free. Knows no memory. Thread-safe.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "kernels/base/mutex.h"

namespace headstart {

class PagePool;

// Pages of one request; they go back to the pool with the object, which must not outlive the pool.
class PageRefs {
 public:
  PageRefs() = default;
  PageRefs(PageRefs&& other) noexcept { *this = std::move(other); }
  PageRefs& operator=(PageRefs&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(pages_, other.pages_);
    return *this;
  }
  ~PageRefs();

  const std::vector<int32_t>& pages() const { return pages_; }

 private:
  friend class PagePool;
  PageRefs(PagePool* pool, std::vector<int32_t> pages) : pool_(pool), pages_(std::move(pages)) {}

  PagePool* pool_ = nullptr;
  std::vector<int32_t> pages_;
};

class PagePool {
 public:
  explicit PagePool(int64_t num_pages);

  // RESOURCE_EXHAUSTED when fewer than `count` pages are free; FAILED_PRECONDITION when the pool
  // never had as many.
  absl::StatusOr<PageRefs> Take(int64_t count);

  int64_t num_pages() const { return num_pages_; }
  int64_t free_pages() const;
  // Pages handed out and given back since the start; equal when nothing is in flight.
  int64_t acquired() const;
  int64_t released() const;

 private:
  friend class PageRefs;
  void Release(const std::vector<int32_t>& pages);

  const int64_t num_pages_;
  mutable Mutex mutex_;
  std::vector<int32_t> free_ ABSL_GUARDED_BY(mutex_);
  int64_t acquired_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t released_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace headstart
