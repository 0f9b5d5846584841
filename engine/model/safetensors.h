// Read-only access to model weights in safetensors files: one file, or shards with an index. They
// are not trusted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/model/model_file.h"
#include "kernels/base/dtype.h"

namespace headstart {

// One entry of a safetensors header.
struct TensorEntry {
  std::string dtype;  // as written: "BF16", "F32", "I64", …
  std::vector<int64_t> shape;
  int64_t begin = 0;  // bytes, relative to the data section
  int64_t end = 0;
};

struct SafetensorsHeader {
  absl::flat_hash_map<std::string, TensorEntry> tensors;
  int64_t data_offset = 0;  // of the data section in the file
};

// A header is read into memory before it is looked at. As much as all the JSON values that are
// taken can need; the safetensors library takes 100 MB.
inline constexpr int64_t kMaxSafetensorsHeaderBytes = 32 << 20;

// Parses the head of a safetensors file of `file_size` bytes, of which `prefix` holds at least the
// first 8 + header length bytes (or all that there is). INVALID_ARGUMENT names file and tensor:
// truncated, header too large, not JSON, duplicate names, unknown dtype, negative or overflowing
// shapes and offsets, ranges that don't match shape x dtype, overlap, leave holes or don't end at
// the end of the file.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::Span<const std::byte> prefix,
                                                         int64_t file_size, absl::string_view file);

// weight_map of a model.safetensors.index.json: tensor name -> shard, a plain base name in the same
// folder.
absl::StatusOr<absl::flat_hash_map<std::string, std::string>> ParseSafetensorsIndex(
    absl::string_view json, absl::string_view file);

// A tensor in a file, which lives as long as the WeightFiles it came from.
struct StoredTensor {
  const ModelFile* file = nullptr;
  std::string name;  // in the file
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  int64_t offset = 0;  // in the file; need not be a multiple of anything
  int64_t bytes = 0;

  std::string Where() const;  // "FILE: tensor NAME", for messages
};

// All tensors of a model directory.
class WeightFiles {
 public:
  // Opens DIR/model.safetensors, or the shards that DIR/model.safetensors.index.json names.
  static absl::StatusOr<std::unique_ptr<WeightFiles>> Open(const std::string& model_dir,
                                                           Links links = Links::kInside);

  ~WeightFiles();
  // NOT_FOUND names the tensor. INVALID_ARGUMENT when its dtype is not f32, bf16 or f16.
  absl::StatusOr<StoredTensor> Find(absl::string_view name) const;
  bool Contains(absl::string_view name) const;
  std::vector<std::string> Names() const;  // sorted
  // The file that a tensor lies in, for messages; empty when there is no such tensor.
  std::string FileOf(absl::string_view name) const;
  int64_t total_bytes() const;

 private:
  struct State;
  explicit WeightFiles(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace headstart
