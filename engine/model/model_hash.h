// The name of a model by what it computes. The recipe is written down in proto/README.md; the
// Python client follows it, too.
#pragma once

#include <cstdint>
#include <string>

#include "absl/container/btree_map.h"
#include "absl/status/statusor.h"
#include "engine/model/model_config.h"
#include "engine/model/model_tensors.h"
#include "engine/model/tensor_reader.h"

namespace headstart {

// Lower-case hex SHA-256 over what of the configuration changes the numbers that come out and, in
// order of name, each tensor's name, dtype, shape and digest. `digests`: of all `tensors`.
std::string ModelHash(const ModelConfig& config, const ModelTensors& tensors,
                      const absl::btree_map<std::string, Sha256>& digests);

// The same of a model that is not loaded, which is read once by `num_threads` threads.
absl::StatusOr<std::string> HashModel(const ModelConfig& config, const WeightFiles& files,
                                      int32_t num_threads);

}  // namespace headstart
