#include "engine/run/kv_cache.h"

#include "kernels/base/check.h"
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
  HEADSTART_ASSIGN_OR_RETURN(cache.page_table_,
                             backend.Allocate(num_pages * static_cast<int64_t>(sizeof(int32_t))));
  return cache;
}

absl::Status KvCache::Bind(const std::vector<int32_t>& pages, Backend& backend) {
  const auto num_pages = static_cast<int64_t>(pages.size());
  HEADSTART_CHECK(num_pages <= num_pages_);
  return backend.Upload(pages.data(), num_pages * static_cast<int64_t>(sizeof(int32_t)),
                        page_table_.data());
}

KvPages KvCache::Layer(int32_t layer) const {
  KvPages kv;
  kv.pages = static_cast<std::byte*>(pages_.data()) + layer * num_pages_ * page_bytes_;
  kv.dtype = dtype_;
  kv.page_table = static_cast<const int32_t*>(page_table_.data());
  kv.shape = shape_;
  return kv;
}

}  // namespace headstart
