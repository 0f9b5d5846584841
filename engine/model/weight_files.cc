// The tensors of a model directory: open files and a table of names.
#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"
#include "absl/strings/str_cat.h"
#include "engine/model/json_reader.h"
#include "engine/model/model_file.h"
#include "engine/model/safetensors.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

constexpr absl::string_view kSingleFile = "model.safetensors";
constexpr absl::string_view kIndexFile = "model.safetensors.index.json";
constexpr int64_t kMaxIndexFileBytes = 16 << 20;

absl::StatusOr<DType> WeightDType(const TensorEntry& entry, absl::string_view where) {
  if (entry.dtype == "F32") return DType::kF32;
  if (entry.dtype == "BF16") return DType::kBF16;
  if (entry.dtype == "F16") return DType::kF16;
  return absl::InvalidArgumentError(
      absl::StrCat(where, ": dtype ", entry.dtype, " is not supported (F32, BF16, F16 are)"));
}

// As much as the header says that it is long, or less where that can't be.
absl::StatusOr<std::vector<std::byte>> ReadHead(const ModelFile& file) {
  uint64_t length = 0;
  std::vector<std::byte> head(std::min(file.bytes(), static_cast<int64_t>(sizeof(length))));
  HEADSTART_RETURN_IF_ERROR(file.Read(0, absl::MakeSpan(head)));
  if (head.size() < sizeof(length)) return head;
  std::memcpy(&length, head.data(), sizeof(length));
  const int64_t most =
      std::min(file.bytes() - static_cast<int64_t>(sizeof(length)), kMaxSafetensorsHeaderBytes);
  if (length > static_cast<uint64_t>(most)) return head;
  head.resize(sizeof(length) + length);
  HEADSTART_RETURN_IF_ERROR(file.Read(0, absl::MakeSpan(head)));
  return head;
}

}  // namespace

struct WeightFiles::State {
  struct Shard {
    ModelFile file;
    SafetensorsHeader header;
  };
  struct Place {
    size_t shard;
    const TensorEntry* entry;
  };
  std::vector<Shard> shards;
  absl::btree_map<std::string, Place> tensors;

  absl::Status OpenShard(const ModelDir& dir, absl::string_view name);
  absl::Status OpenIndexed(const ModelDir& dir);
  absl::Status CheckAgainstIndex(const ModelDir& dir,
                                 const absl::flat_hash_map<std::string, std::string>& index) const;
  absl::Status BuildTable();
  std::string Where(absl::string_view name, const Place& place) const {
    return absl::StrCat(shards[place.shard].file.name(), ": tensor ", Quoted(name));
  }
};

absl::Status WeightFiles::State::OpenShard(const ModelDir& dir, absl::string_view name) {
  HEADSTART_ASSIGN_OR_RETURN(const std::string real_path, dir.Resolve(name));
  HEADSTART_ASSIGN_OR_RETURN(ModelFile file, ModelFile::Open(real_path, dir.PathOf(name)));
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<std::byte> head, ReadHead(file));
  HEADSTART_ASSIGN_OR_RETURN(SafetensorsHeader header,
                             ParseSafetensorsHeader(head, file.bytes(), file.name()));
  shards.push_back({std::move(file), std::move(header)});
  return absl::OkStatus();
}

absl::Status WeightFiles::State::OpenIndexed(const ModelDir& dir) {
  HEADSTART_ASSIGN_OR_RETURN(const std::string text, dir.ReadText(kIndexFile, kMaxIndexFileBytes));
  HEADSTART_ASSIGN_OR_RETURN(const auto index, ParseSafetensorsIndex(text, dir.PathOf(kIndexFile)));
  absl::btree_set<std::string> names;
  for (const auto& [tensor, shard] : index) names.insert(shard);
  for (const std::string& name : names) HEADSTART_RETURN_IF_ERROR(OpenShard(dir, name));
  HEADSTART_RETURN_IF_ERROR(BuildTable());
  return CheckAgainstIndex(dir, index);
}

// The index and the shards name the same tensors in the same places.
absl::Status WeightFiles::State::CheckAgainstIndex(
    const ModelDir& dir, const absl::flat_hash_map<std::string, std::string>& index) const {
  for (const auto& [name, shard] : index) {
    const auto found = tensors.find(name);
    if (found == tensors.end() || shards[found->second.shard].file.name() != dir.PathOf(shard)) {
      return absl::InvalidArgumentError(absl::StrCat(dir.PathOf(shard), ": tensor ", Quoted(name),
                                                     " is missing; ", kIndexFile,
                                                     " says it is there"));
    }
  }
  for (const auto& [name, place] : tensors) {
    if (!index.contains(name)) {
      return absl::InvalidArgumentError(absl::StrCat(Where(name, place), ": not in ", kIndexFile));
    }
  }
  return absl::OkStatus();
}

absl::Status WeightFiles::State::BuildTable() {
  for (size_t i = 0; i < shards.size(); ++i) {
    for (const auto& [name, entry] : shards[i].header.tensors) {
      const Place place{i, &entry};
      const auto [known, is_new] = tensors.emplace(name, place);
      if (!is_new) {
        return absl::InvalidArgumentError(absl::StrCat(Where(name, place), ": also in ",
                                                       shards[known->second.shard].file.name()));
      }
    }
  }
  return absl::OkStatus();
}

std::string StoredTensor::Where() const {
  return absl::StrCat(file->name(), ": tensor ", Quoted(name));
}

WeightFiles::WeightFiles(std::unique_ptr<State> state) : state_(std::move(state)) {}
WeightFiles::~WeightFiles() = default;

absl::StatusOr<std::unique_ptr<WeightFiles>> WeightFiles::Open(const std::string& model_dir,
                                                               Links links) {
  HEADSTART_ASSIGN_OR_RETURN(const ModelDir dir, ModelDir::Open(model_dir, links));
  auto state = std::make_unique<State>();
  if (dir.Contains(kSingleFile)) {
    HEADSTART_RETURN_IF_ERROR(state->OpenShard(dir, kSingleFile));
    HEADSTART_RETURN_IF_ERROR(state->BuildTable());
  } else if (dir.Contains(kIndexFile)) {
    HEADSTART_RETURN_IF_ERROR(state->OpenIndexed(dir));
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat(model_dir, ": has neither ", kSingleFile, " nor ", kIndexFile));
  }
  return std::unique_ptr<WeightFiles>(new WeightFiles(std::move(state)));
}

absl::StatusOr<StoredTensor> WeightFiles::Find(absl::string_view name) const {
  const auto found = state_->tensors.find(name);
  if (found == state_->tensors.end()) {
    return absl::NotFoundError(absl::StrCat(state_->shards.front().file.name(),
                                            state_->shards.size() > 1 ? " and its siblings" : "",
                                            ": tensor ", Quoted(name), " is missing"));
  }
  const auto& [shard_index, entry] = found->second;
  const State::Shard& shard = state_->shards[shard_index];
  HEADSTART_ASSIGN_OR_RETURN(const DType dtype,
                             WeightDType(*entry, state_->Where(name, found->second)));
  return StoredTensor{&shard.file,
                      std::string(name),
                      dtype,
                      entry->shape,
                      shard.header.data_offset + entry->begin,
                      entry->end - entry->begin};
}

bool WeightFiles::Contains(absl::string_view name) const { return state_->tensors.contains(name); }

std::vector<std::string> WeightFiles::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : state_->tensors) names.push_back(name);
  return names;
}

std::string WeightFiles::FileOf(absl::string_view name) const {
  const auto found = state_->tensors.find(name);
  return found == state_->tensors.end() ? "" : state_->shards[found->second.shard].file.name();
}

int64_t WeightFiles::total_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, place] : state_->tensors) bytes += place.entry->end - place.entry->begin;
  return bytes;
}

}  // namespace headstart
