// Host memory in which KV waits for the network: buffers of equal size, each for one chunk (a run
// of whole pages of one layer). Compute never waits for a buffer; a request without them is not
// run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "kernels/backend.h"
#include "kernels/base/mutex.h"

namespace headstart {

class HostPages;

// One buffer; goes back with the object, which must not outlive the HostPages.
class HostChunk {
 public:
  HostChunk() = default;
  HostChunk(HostChunk&& other) noexcept { *this = std::move(other); }
  HostChunk& operator=(HostChunk&& other) noexcept {
    std::swap(owner_, other.owner_);
    std::swap(pages_, other.pages_);
    std::swap(index_, other.index_);
    return *this;
  }
  ~HostChunk();

  std::byte* data() const;

 private:
  friend class HostPages;
  HostChunk(HostPages* pages, int64_t index, uint64_t owner)
      : pages_(pages), index_(index), owner_(owner) {}

  HostPages* pages_ = nullptr;
  int64_t index_ = 0;
  uint64_t owner_ = 0;
};

// Thread-safe.
class HostPages {
 public:
  // `num_chunks` buffers of `chunk_bytes` each in `memory`, which may be null where nobody writes
  // (simulation).
  HostPages(HostBuffer memory, int64_t chunk_bytes, int64_t num_chunks);

  // `count` buffers for request `owner`, or none when fewer are free.
  std::vector<HostChunk> Take(int64_t count, uint64_t owner);

  // `on_room` is called whenever a buffer came back: on any thread, with no lock of this held.
  // Before the first Take.
  void NotifyRoom(std::function<void()> on_room) { on_room_ = std::move(on_room); }

  // Returns when all buffers are back and nobody is in `on_room` any more: the network holds some
  // for a moment after the last call has ended.
  void WaitUntilAllBack();

  int64_t chunk_bytes() const { return chunk_bytes_; }
  int64_t num_chunks() const { return num_chunks_; }
  int64_t free_chunks() const;
  // Buffers that a request holds, those on the wire included.
  int64_t held(uint64_t owner) const;

 private:
  friend class HostChunk;
  void GiveBack(int64_t index, uint64_t owner);

  const HostBuffer memory_;
  const int64_t chunk_bytes_;
  const int64_t num_chunks_;
  std::function<void()> on_room_;
  mutable Mutex mutex_;
  CondVar came_back_;
  int64_t giving_back_ ABSL_GUARDED_BY(mutex_) = 0;    // threads that do so now
  std::vector<int64_t> free_ ABSL_GUARDED_BY(mutex_);  // taken from the back: what was used last
  std::unordered_map<uint64_t, int64_t> held_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart
