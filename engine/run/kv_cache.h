// The memory of the KV pages of all layers, and the page table of the sequence that runs.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/model_config.h"
#include "kernels/backend.h"

namespace headstart {

class KvCache {
 public:
  // Room for `num_pages` pages in every layer, in the backend's compute_dtype. The backend must
  // outlive the cache. RESOURCE_EXHAUSTED when the memory is not there.
  static absl::StatusOr<KvCache> Create(const ModelConfig& config, int64_t num_pages,
                                        Backend& backend);

  // From now on token t of the sequence lives in page pages[t / kBlockTokens].
  absl::Status Bind(const std::vector<int32_t>& pages, Backend& backend);

  // A layer's KV of the bound sequence.
  KvPages Layer(int32_t layer) const;
  // Bytes of one page of one layer.
  int64_t page_bytes() const { return page_bytes_; }

 private:
  HeadShape shape_;
  DType dtype_ = DType::kBF16;
  int64_t page_bytes_ = 0;
  int64_t num_pages_ = 0;
  Buffer pages_;       // [num_layers][num_pages] pages
  Buffer page_table_;  // i32 [num_pages]
};

}  // namespace headstart
