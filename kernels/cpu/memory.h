// Host memory of the CPU backend.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

namespace headstart {

inline int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct FreeHostMemory {
  void operator()(void* data) const;
};
using HostMemory = std::unique_ptr<char, FreeHostMemory>;

// At least `bytes` bytes (and at least one), 64-byte aligned, in huge pages where they are large
// and the system has them. RESOURCE_EXHAUSTED with the number of bytes.
absl::StatusOr<HostMemory> AllocateHostMemory(int64_t bytes);

// Working memory that grows to the largest size asked for and keeps no contents when it does.
class Scratch {
 public:
  absl::StatusOr<char*> Get(int64_t bytes);

 private:
  HostMemory memory_;
  int64_t bytes_ = 0;
};

}  // namespace headstart
