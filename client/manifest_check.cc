#include "client/manifest_check.h"

#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/util/message_differencer.h"

namespace headstart {
namespace {

// More than any model has. They bound the memory that the receiver's own accounting takes.
constexpr uint32_t kMaxLayers = 1024;
constexpr uint32_t kMaxKvHeads = 1024;
constexpr uint32_t kMaxHeadDim = 1 << 16;

absl::Status CheckRange(const char* field, uint32_t value, uint32_t limit) {
  if (value >= 1 && value <= limit) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("manifest: ", field, "=", value, " is not in [1, ", limit, "]"));
}

absl::Status CheckLayout(const v1::KvLayout& layout) {
  if (absl::Status s = CheckRange("num_layers", layout.num_layers(), kMaxLayers); !s.ok()) return s;
  if (absl::Status s = CheckRange("num_kv_heads", layout.num_kv_heads(), kMaxKvHeads); !s.ok())
    return s;
  if (absl::Status s = CheckRange("head_dim", layout.head_dim(), kMaxHeadDim); !s.ok()) return s;
  if (absl::Status s = CheckRange("block_tokens", layout.block_tokens(), INT32_MAX); !s.ok())
    return s;
  if (KvDtypeBytes(layout.dtype()) == 0) {
    return absl::DataLossError(absl::StrCat("manifest: dtype=", layout.dtype(), " is unknown"));
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status CheckEqual(const char* field, const T& got, const T& expected) {
  if (expected == T() || got == expected) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("manifest: ", field, "=", got, ", expected ", expected));
}

}  // namespace

absl::StatusOr<KvShape> CheckedShape(const v1::KvManifest& manifest, int64_t max_kv_bytes) {
  const v1::KvLayout& layout = manifest.layout();
  if (absl::Status status = CheckLayout(layout); !status.ok()) return status;
  if (absl::Status status = CheckRange("num_tokens", manifest.num_tokens(), INT32_MAX);
      !status.ok()) {
    return status;
  }
  const KvShape shape{.num_layers = layout.num_layers(),
                      .num_kv_heads = layout.num_kv_heads(),
                      .head_dim = layout.head_dim(),
                      .num_tokens = manifest.num_tokens(),
                      .element_bytes = KvDtypeBytes(layout.dtype())};
  // At most 2^10 layers, 2^10 heads, 2^16 elements of 4 bytes: the bytes of one token fit by far.
  const int64_t token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.row_bytes();
  // NOLINTNEXTLINE(clang-analyzer-core.DivideZero): CheckLayout lets no zero through
  if (shape.num_tokens > max_kv_bytes / token_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the KV of ", shape.num_tokens, " tokens at ", token_bytes,
                     " bytes is more than max_kv_bytes=", max_kv_bytes));
  }
  return shape;
}

absl::Status CheckExpectation(const v1::KvManifest& manifest, const KvExpectation& expected) {
  const v1::KvLayout& layout = manifest.layout();
  const auto hex = [](const std::string& bytes) { return absl::BytesToHexString(bytes); };
  using Int = int64_t;
  for (absl::Status status :
       {CheckEqual<std::string>("model", manifest.model(), expected.model),
        CheckEqual<std::string>("model_hash", manifest.model_hash(), expected.model_hash),
        CheckEqual<Int>("num_tokens", manifest.num_tokens(), expected.num_tokens),
        CheckEqual<std::string>("token_hash", hex(manifest.token_hash()), hex(expected.token_hash)),
        CheckEqual<Int>("num_layers", layout.num_layers(), expected.num_layers),
        CheckEqual<Int>("num_kv_heads", layout.num_kv_heads(), expected.num_kv_heads),
        CheckEqual<Int>("head_dim", layout.head_dim(), expected.head_dim),
        CheckEqual<Int>("dtype", layout.dtype(), expected.dtype)}) {
    if (!status.ok()) return status;
  }
  const auto algorithm = manifest.attention().algorithm();
  if (expected.dense && algorithm != v1::AttentionProvenance::ALGORITHM_DENSE) {
    return absl::DataLossError(
        absl::StrCat("manifest: attention algorithm=", algorithm, ", the request asked for dense"));
  }
  return absl::OkStatus();
}

absl::Status CheckFinalManifest(const v1::KvManifest& first, const v1::KvManifest& last) {
  if (last.layer_density_size() != static_cast<int64_t>(first.layout().num_layers())) {
    return absl::DataLossError(absl::StrCat("completed: layer_density has ",
                                            last.layer_density_size(), " values for ",
                                            first.layout().num_layers(), " layers"));
  }
  for (const float density : last.layer_density()) {
    if (!(density > 0.0f && density <= 1.0f)) {
      return absl::DataLossError(
          absl::StrCat("completed: layer_density ", density, " is not in (0, 1]"));
    }
  }
  v1::KvManifest expected = first;
  *expected.mutable_layer_density() = last.layer_density();
  if (!google::protobuf::util::MessageDifferencer::Equals(expected, last)) {
    return absl::DataLossError("completed: the manifest is not the one that the stream began with");
  }
  return absl::OkStatus();
}

}  // namespace headstart
