// KV pages (kernels/attention_params.h) as a tensor for the copy engine: {d, token in page, KV
// head, page}.
#pragma once

#include "kernels/attention_params.h"
#include "kernels/cuda/device/numeric.cuh"
#include "kernels/cuda/device/tensor_map.h"

namespace headstart::cuda {

enum class KvPlane : uint8_t { kKeys, kValues };

inline TensorShape KvPlanes(const KvPages& kv, KvPlane plane) {
  // Page numbers come from the page table on the device, so the map can't bound them.
  constexpr int64_t kAnyPage = int64_t{1} << 24;
  const HeadShape& heads = kv.shape;
  const auto* data =
      static_cast<const Bf16*>(kv.pages) + (plane == KvPlane::kValues ? kv.plane_elements() : 0);
  return {data,
          {heads.head_dim, kBlockTokens, heads.num_kv_heads, kAnyPage},
          {heads.head_dim, kBlockTokens * heads.head_dim, kv.page_elements()}};
}

}  // namespace headstart::cuda
