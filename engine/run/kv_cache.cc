#include "engine/run/kv_cache.h"

#include "kernels/base/status_macros.h"

namespace headstart {

absl::StatusOr<KvCache> KvCache::Create(const ModelConfig& config, int64_t num_pages,
                                        Backend& backend) {
  KvCache cache;
  cache.shape_ = config.heads;
  cache.dtype_ = backend.compute_dtype();
  cache.num_pages_ = num_pages;
  cache.page_bytes_ = cache.Layer(0).page_elements() * DTypeBytes(cache.dtype_);
  HEADSTART_ASSIGN_OR_RETURN(cache.pages_,
                             backend.Allocate(config.num_layers * num_pages * cache.page_bytes_));
  return cache;
}

KvPages KvCache::Layer(int32_t layer) const {
  KvPages kv;
  kv.pages = static_cast<std::byte*>(pages_.data()) + layer * num_pages_ * page_bytes_;
  kv.dtype = dtype_;
  kv.shape = shape_;
  return kv;
}

}  // namespace headstart
