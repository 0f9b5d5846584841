#include "engine/model/model_hash.h"

#include <openssl/sha.h>

#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

std::string Hex(const Sha256& digest) {
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(digest.data()), digest.size()));
}

// Of RoPE, what its type reads.
std::string RopeLine(const RopeConfig& r) {
  std::string line = absl::StrFormat("rope %s theta=%.17g", RopeTypeName(r.type), r.theta);
  if (r.type == RopeType::kDefault) return line + "\n";
  absl::StrAppendFormat(&line, " factor=%.17g", r.factor);
  if (r.type == RopeType::kLlama3) {
    absl::StrAppendFormat(&line, " original=%d low=%.17g high=%.17g", r.original_max_positions,
                          r.low_freq_factor, r.high_freq_factor);
  }
  if (r.type == RopeType::kYarn) {
    absl::StrAppendFormat(&line, " original=%d fast=%.17g slow=%.17g truncate=%d scale=%.9g",
                          r.original_max_positions, r.beta_fast, r.beta_slow, r.truncate,
                          r.attention_factor);
  }
  return line + "\n";
}

std::string ConfigLines(const ModelConfig& c) {
  return absl::StrFormat("headstart.v1.model\n%s heads=%d kv_heads=%d head_dim=%d eps=%.9g\n%s",
                         c.architecture, c.heads.num_heads, c.heads.num_kv_heads, c.heads.head_dim,
                         c.rms_norm_eps, RopeLine(c.rope));
}

// A head that is the embedding once more says nothing.
bool IsTied(const ModelTensors& tensors, const absl::btree_map<std::string, Sha256>& digests) {
  return tensors.contains(kHead) && digests.at(kHead) == digests.at(kEmbedding) &&
         tensors.at(kHead).dtype == tensors.at(kEmbedding).dtype;
}

}  // namespace

std::string ModelHash(const ModelConfig& config, const ModelTensors& tensors,
                      const absl::btree_map<std::string, Sha256>& digests) {
  const bool tied = IsTied(tensors, digests);
  std::string text = ConfigLines(config);
  for (const auto& [name, tensor] : tensors) {
    if (tied && name == kHead) continue;
    absl::StrAppend(&text, name, " ", absl::AsciiStrToUpper(DTypeName(tensor.dtype)), " [",
                    absl::StrJoin(tensor.shape, ","), "] ", Hex(digests.at(name)), "\n");
  }
  Sha256 digest;
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return Hex(digest);
}

absl::StatusOr<std::string> HashModel(const ModelConfig& config, const WeightFiles& files,
                                      int32_t num_threads) {
  HEADSTART_ASSIGN_OR_RETURN(const ModelTensors tensors, FindModelTensors(config, files));
  std::vector<TensorRead> reads;
  for (const auto& [name, tensor] : tensors) reads.push_back({tensor, nullptr});
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<Sha256> read, ReadTensors(reads, num_threads));
  absl::btree_map<std::string, Sha256> digests;
  auto digest = read.begin();
  for (const auto& [name, tensor] : tensors) digests[name] = *digest++;
  return ModelHash(config, tensors, digests);
}

}  // namespace headstart
