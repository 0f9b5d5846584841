// Accounting of KV pages: who holds which, and what the others still hold. Knows no memory.
// Thread-safe.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "engine/schedule/page_hash.h"
#include "engine/schedule/slot_state.h"
#include "kernels/base/mutex.h"

namespace headstart {

class PagePool;

// References to pages, of one holder, in order; they go back to the pool with the object, which
// must not outlive the pool.
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
  int64_t size() const { return static_cast<int64_t>(pages_.size()); }

  // Behind those that it has; of the same pool.
  void Append(PageRefs more);
  // One page in the place of another, which goes back.
  void Replace(int64_t index, PageRefs one);

 private:
  friend class PagePool;
  PageRefs(PagePool* pool, std::vector<int32_t> pages) : pool_(pool), pages_(std::move(pages)) {}

  PagePool* pool_ = nullptr;
  std::vector<int32_t> pages_;
};

struct CachedPage {
  PageRefs page;
  // What a request needs to go on behind the page; may be null.
  std::shared_ptr<const SlotState> state;
};

// A page may have many holders. One that was published is found by its name while somebody holds
// it, and after that until it is evicted: the prefix cache is what nobody holds.
class PagePool {
 public:
  explicit PagePool(int64_t num_pages);

  // Pages that nobody else has: first those without a name, then those that were let go longest
  // ago, which lose name and state. RESOURCE_EXHAUSTED when fewer than `count` pages are free;
  // FAILED_PRECONDITION when the pool never had as many.
  absl::StatusOr<PageRefs> Take(int64_t count);

  // One more reference to the page that has this name.
  std::optional<CachedPage> Find(const PageHash& name);
  // Whether Find would find it. Changes nothing.
  bool Has(const PageHash& name) const;
  // The page, which is held, gets the name; it has no other one. A name that is there already stays
  // with the page and the state that have it.
  void Publish(int32_t page, const PageHash& name, std::shared_ptr<const SlotState> state);

  int64_t num_pages() const { return num_pages_; }
  // Held by nobody, those with a name included.
  int64_t free_pages() const;
  // Of these, with a name.
  int64_t cached_pages() const;
  // References handed out and given back since the start; equal when nothing is in flight.
  int64_t acquired() const;
  int64_t released() const;
  // Pages that lost their name since the start.
  int64_t evicted() const;

 private:
  friend class PageRefs;
  struct Page {
    int64_t holders = 0;
    std::optional<PageHash> name;
    std::shared_ptr<const SlotState> state;
    std::list<int32_t>::iterator place;  // in cached_, with a name and without holders
  };

  // The deepest pages of a prefix come last in the list and must go first: the others are no use
  // without those before them.
  void Release(const std::vector<int32_t>& pages);
  int64_t CountFree() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int32_t TakeFree() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int64_t num_pages_;
  mutable Mutex mutex_;
  std::vector<Page> pages_ ABSL_GUARDED_BY(mutex_);
  std::vector<int32_t> free_ ABSL_GUARDED_BY(mutex_);  // without a name; taken from the back
  std::list<int32_t> cached_ ABSL_GUARDED_BY(mutex_);  // evicted from the front
  absl::flat_hash_map<PageHash, int32_t> by_name_ ABSL_GUARDED_BY(mutex_);
  int64_t acquired_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t released_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t evicted_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace headstart
