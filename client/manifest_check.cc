#include "client/manifest_check.h"

#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "client/prefix_check.h"
#include "google/protobuf/util/message_differencer.h"
#include "kernels/base/status_macros.h"

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

template <typename T>
absl::Status CheckEqual(const char* field, const T& got, const T& expected) {
  if (expected == T() || got == expected) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("manifest: ", field, "=", got, ", expected ", expected));
}

}  // namespace

int64_t KvDtypeBytes(v1::KvDtype dtype) {
  switch (dtype) {
    case v1::KV_DTYPE_FP8_E4M3:
      return 1;
    case v1::KV_DTYPE_BF16:
    case v1::KV_DTYPE_F16:
      return 2;
    case v1::KV_DTYPE_F32:
      return 4;
    default:
      return 0;
  }
}

absl::Status CheckLayout(const v1::KvManifest& manifest) {
  const v1::KvLayout& layout = manifest.layout();
  HEADSTART_RETURN_IF_ERROR(CheckRange("num_layers", layout.num_layers(), kMaxLayers));
  HEADSTART_RETURN_IF_ERROR(CheckRange("num_kv_heads", layout.num_kv_heads(), kMaxKvHeads));
  HEADSTART_RETURN_IF_ERROR(CheckRange("head_dim", layout.head_dim(), kMaxHeadDim));
  HEADSTART_RETURN_IF_ERROR(CheckRange("block_tokens", layout.block_tokens(), INT32_MAX));
  HEADSTART_RETURN_IF_ERROR(CheckRange("num_tokens", manifest.num_tokens(), INT32_MAX));
  if (KvDtypeBytes(layout.dtype()) > 0) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("manifest: dtype=", layout.dtype(), " is unknown"));
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

absl::StatusOr<v1::KvPart> WholeRanges(v1::KvPart part, const v1::KvLayout& layout) {
  if (part.layer_begin() >= layout.num_layers() || part.kv_head_begin() >= layout.num_kv_heads() ||
      part.layer_count() > layout.num_layers() - part.layer_begin() ||
      part.kv_head_count() > layout.num_kv_heads() - part.kv_head_begin()) {
    return absl::InvalidArgumentError(
        absl::StrCat("part: ", part.layer_count(), " layers from ", part.layer_begin(), " on, ",
                     part.kv_head_count(), " KV heads from ", part.kv_head_begin(), " on; of ",
                     layout.num_layers(), " layers and ", layout.num_kv_heads(), " heads"));
  }
  if (part.layer_count() == 0) part.set_layer_count(layout.num_layers() - part.layer_begin());
  if (part.kv_head_count() == 0)
    part.set_kv_head_count(layout.num_kv_heads() - part.kv_head_begin());
  return part;
}

KvShape ShapeOfPart(const v1::KvManifest& manifest, const v1::KvPart& part) {
  const v1::KvLayout& layout = manifest.layout();
  return KvShape{.num_layers = part.layer_count(),
                 .num_kv_heads = part.kv_head_count(),
                 .head_dim = layout.head_dim(),
                 .num_tokens = int64_t{manifest.num_tokens()} - manifest.skip_tokens(),
                 .element_bytes = KvDtypeBytes(layout.dtype()),
                 .token_begin = manifest.skip_tokens(),
                 .block_tokens = layout.block_tokens()};
}

absl::Status CheckFinalManifest(const v1::KvManifest& first, const v1::KvManifest& last,
                                const KvExpectation& expected) {
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
  HEADSTART_RETURN_IF_ERROR(CheckCachedPrefix(last, expected));
  v1::KvManifest before = last;
  before.clear_layer_density();
  before.clear_cached_tokens();
  before.clear_cached_algorithm();
  before.clear_page_hashes();
  if (!google::protobuf::util::MessageDifferencer::Equals(first, before)) {
    return absl::DataLossError("completed: the manifest is not the one that the stream began with");
  }
  return absl::OkStatus();
}

}  // namespace headstart
