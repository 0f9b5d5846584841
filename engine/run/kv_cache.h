// The memory of the KV pages of all layers.
#pragma once

#include <cstdint>

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

  KvPages Layer(int32_t layer) const;
  // Bytes of one page of one layer.
  int64_t page_bytes() const { return page_bytes_; }

 private:
  HeadShape shape_;
  DType dtype_ = DType::kBF16;
  int64_t page_bytes_ = 0;
  int64_t num_pages_ = 0;
  Buffer pages_;  // [num_layers][num_pages] pages
};

}  // namespace headstart
