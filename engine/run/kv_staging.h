// KV as fp8 on its way to the host: pages are quantised into device memory of their own, and copied
// from there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/ship/kv_part.h"
#include "kernels/backend.h"

namespace headstart {

// Which pages of a ring are in use: runs of pages side by side, given back in the order in which
// they were taken.
class PageRing {
 public:
  explicit PageRing(int64_t num_pages) : num_pages_(num_pages) {}

  // The first of `count` free pages, or none while older runs are in the way. An empty ring has
  // room for num_pages().
  std::optional<int64_t> Take(int64_t count);
  // The oldest run.
  void GiveBack();
  // All runs.
  void Clear();

  int64_t num_pages() const { return num_pages_; }

 private:
  int64_t num_pages_;
  int64_t next_ = 0;
  int64_t used_ = 0;
  std::deque<int64_t> runs_;  // their pages, those skipped at the ring's end included
};

// Belongs to the thread that computes.
class KvStaging {
 public:
  // For steps of up to `max_rows` tokens. `geometry`: of the KV as it is computed. The backend must
  // outlive this.
  static absl::StatusOr<KvStaging> Create(const KvGeometry& geometry, int64_t max_rows,
                                          Backend& backend);
  static int64_t Bytes(const KvGeometry& geometry, int64_t max_rows);

  // Most pages of a run: no less than a chunk has.
  int64_t max_run() const { return ring_.num_pages() / kRuns; }
  // Quantises up to max_run() pages, behind the operations so far. Says where they will lie, one
  // behind the other; null while there is no room: then GiveBack is due first.
  absl::StatusOr<const std::byte*> Stage(const KvPages& kv, absl::Span<const KvPageTokens> pages);
  // The oldest run was copied.
  void GiveBack() { ring_.GiveBack(); }
  // All were, or never will be.
  void Clear() { ring_.Clear(); }

 private:
  // Layers of a step that find room: those that are being copied, the next one, and one more for
  // what does not fit at the ring's end.
  static constexpr int64_t kRuns = 4;
  KvStaging(PageRing ring, int64_t page_bytes, Buffer memory, Backend& backend)
      : ring_(std::move(ring)),
        page_bytes_(page_bytes),
        memory_(std::move(memory)),
        backend_(&backend) {}
  static int64_t RunPages(const KvGeometry& geometry, int64_t max_rows);

  PageRing ring_;
  int64_t page_bytes_;
  Buffer memory_;  // [ring_.num_pages()] fp8 pages
  Backend* backend_;
};

}  // namespace headstart
