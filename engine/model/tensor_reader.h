// One pass over stored tensors, by several threads: their bytes, their digests, and whether all
// values are finite. What is hashed is what is given out.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/safetensors.h"

namespace headstart {

using Sha256 = std::array<unsigned char, 32>;

// Bytes of a tensor that are hashed by themselves, so that threads can share a large one.
inline constexpr int64_t kHashedBytes = 1 << 20;

struct TensorRead {
  StoredTensor tensor;
  std::byte* into = nullptr;  // tensor.bytes bytes, or null: nothing is kept
};

// SHA-256 of the SHA-256 of each kHashedBytes of the tensors' bytes (the last ones may be fewer),
// one behind the other. By up to `num_threads` threads, this one included. INVALID_ARGUMENT names
// file and tensor: a value that is not finite, and whatever ModelFile::Read says.
absl::StatusOr<std::vector<Sha256>> ReadTensors(absl::Span<const TensorRead> reads,
                                                int32_t num_threads);

}  // namespace headstart
