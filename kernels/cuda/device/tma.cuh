// The bulk tensor copy engine (PTX ISA, "cp.async.bulk.tensor"). All maps have four dimensions.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/device/mbarrier.cuh"

namespace headstart::cuda {

// L2 policies: data that other CTAs will read soon, and data that nobody reads again.
__device__ __forceinline__ uint64_t PolicyKeep() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t PolicyOnce() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Coordinates in elements, the fastest dimension first. A box may reach beyond the tensor: loads
// give zeros there, stores write nothing. Only loads may begin before it (a store there traps).
struct TmaCoord {
  int32_t c0, c1, c2, c3;
};

// Loads the map's box at `at` to `destination`; its bytes count on `barrier`.
__device__ __forceinline__ void TmaLoad(void* destination, const CUtensorMap& map,
                                        uint64_t* barrier, TmaCoord at, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(SharedAddress(destination)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(SharedAddress(barrier)), "r"(at.c0), "r"(at.c1),
      "r"(at.c2), "r"(at.c3), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void TmaStore(const CUtensorMap& map, const void* source, TmaCoord at) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          reinterpret_cast<uint64_t>(&map)),
      "r"(SharedAddress(source)), "r"(at.c0), "r"(at.c1), "r"(at.c2), "r"(at.c3)
      : "memory");
}

__device__ __forceinline__ void TmaStoreCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until this thread's stores have read shared memory.
__device__ __forceinline__ void TmaStoreWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Waits until this thread's stores are done.
__device__ __forceinline__ void TmaStoreWait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Shows this thread's ordinary stores to shared memory to TMA and wgmma; a barrier must follow.
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace headstart::cuda
