#include "engine/ship/host_pages.h"

#include <numeric>

#include "kernels/base/check.h"

namespace headstart {

HostChunk::~HostChunk() {
  if (pages_ != nullptr) pages_->GiveBack(index_, owner_);
}

std::byte* HostChunk::data() const { return pages_->memory_.get() + index_ * pages_->chunk_bytes_; }

HostPages::HostPages(HostBuffer memory, int64_t chunk_bytes, int64_t num_chunks)
    : memory_(std::move(memory)), chunk_bytes_(chunk_bytes), num_chunks_(num_chunks) {
  MutexLock lock(&mutex_);
  free_.resize(static_cast<size_t>(num_chunks));
  std::iota(free_.rbegin(), free_.rend(), 0);
}

std::vector<HostChunk> HostPages::Take(int64_t count, uint64_t owner) {
  std::vector<HostChunk> chunks;
  if (count == 0) return chunks;
  MutexLock lock(&mutex_);
  if (count > static_cast<int64_t>(free_.size())) return chunks;
  chunks.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    chunks.push_back(HostChunk(this, free_.back(), owner));
    free_.pop_back();
  }
  held_[owner] += count;
  return chunks;
}

void HostPages::GiveBack(int64_t index, uint64_t owner) {
  {
    MutexLock lock(&mutex_);
    free_.push_back(index);
    const auto held = held_.find(owner);
    HEADSTART_CHECK(held != held_.end());
    if (--held->second == 0) held_.erase(held);
    ++giving_back_;
  }
  if (on_room_) on_room_();
  MutexLock lock(&mutex_);
  --giving_back_;
  came_back_.SignalAll();
}

void HostPages::WaitUntilAllBack() {
  MutexLock lock(&mutex_);
  while (static_cast<int64_t>(free_.size()) < num_chunks_ || giving_back_ > 0) {
    came_back_.Wait(&mutex_);
  }
}

int64_t HostPages::free_chunks() const {
  MutexLock lock(&mutex_);
  return static_cast<int64_t>(free_.size());
}

int64_t HostPages::held(uint64_t owner) const {
  MutexLock lock(&mutex_);
  const auto held = held_.find(owner);
  return held == held_.end() ? 0 : held->second;
}

}  // namespace headstart
