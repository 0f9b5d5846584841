#include "engine/model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/model/json_reader.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

using nlohmann::json;

constexpr int64_t kLengthBytes = 8;  // little-endian length of the header, first
constexpr int64_t kMaxIndexBytes = 16 << 20;
constexpr int64_t kMaxJsonValues = 500'000;  // about 40 000 tensors
constexpr int64_t kMaxNameBytes = 512;
constexpr int64_t kMaxElements = int64_t{1} << 56;  // times the widest dtype still fits int64_t

struct DTypeWidth {
  absl::string_view name;
  int64_t bits;
};

// Every dtype that the format knows; ranges are checked for all of them.
constexpr DTypeWidth kWidths[] = {
    {"BOOL", 8},        {"U8", 8},      {"I8", 8},      {"F4", 4},      {"F6_E2M3", 6},
    {"F6_E3M2", 6},     {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"I64", 64},    {"U64", 64},
    {"F64", 64},        {"C64", 64}};

std::string TensorWhere(absl::string_view file, absl::string_view name) {
  return absl::StrCat(file, ": tensor ", Quoted(name));
}

// Bytes of a tensor, every product checked.
absl::StatusOr<int64_t> TensorBytes(const TensorEntry& entry, absl::string_view where) {
  const auto* width = std::find_if(std::begin(kWidths), std::end(kWidths),
                                   [&](const auto& w) { return w.name == entry.dtype; });
  if (width == std::end(kWidths)) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": dtype=", Quoted(entry.dtype), " is unknown"));
  }
  int64_t elements = 1;
  for (const int64_t dim : entry.shape) {
    if (dim > kMaxElements / elements) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": shape is too large"));
    }
    elements *= dim;
  }
  if (elements * width->bits % 8 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": does not end at a whole byte"));
  }
  return elements * width->bits / 8;
}

// A list of `name`: whole numbers in [min, max].
absl::StatusOr<std::vector<int64_t>> ReadNumbers(const JsonFields& fields, absl::string_view name,
                                                 int64_t min) {
  const json* list = fields.Find(name);
  if (list == nullptr || !list->is_array()) return fields.Error(name, "is not a list");
  std::vector<int64_t> numbers;
  for (const json& value : *list) {
    if (!value.is_number_unsigned() ||
        value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ||
        value.get<int64_t>() < min) {
      return fields.Error(
          name, absl::StrCat("has an entry that is not a whole number from ", min, " on"));
    }
    numbers.push_back(value.get<int64_t>());
  }
  return numbers;
}

absl::StatusOr<TensorEntry> ParseEntry(const std::string& name, const json& value,
                                       int64_t data_bytes, absl::string_view file) {
  const std::string where = TensorWhere(file, name);
  if (name.empty() || static_cast<int64_t>(name.size()) > kMaxNameBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": name of ", name.size(), " bytes, allowed are 1 to ", kMaxNameBytes));
  }
  if (!value.is_object()) return absl::InvalidArgumentError(absl::StrCat(where, ": not an object"));
  const JsonFields fields(value, where);
  TensorEntry entry;
  HEADSTART_ASSIGN_OR_RETURN(entry.dtype, fields.String("dtype"));
  HEADSTART_ASSIGN_OR_RETURN(entry.shape, ReadNumbers(fields, "shape", /*min=*/1));
  HEADSTART_ASSIGN_OR_RETURN(const std::vector<int64_t> offsets,
                             ReadNumbers(fields, "data_offsets", /*min=*/0));
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    return fields.Error("data_offsets", "is not a range [begin, end]");
  }
  entry.begin = offsets[0];
  entry.end = offsets[1];
  if (entry.end > data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ends at byte ", entry.end, " of ",
                                                   data_bytes, " bytes of data; file truncated?"));
  }
  HEADSTART_ASSIGN_OR_RETURN(const int64_t bytes, TensorBytes(entry, where));
  if (entry.end - entry.begin != bytes) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": data_offsets span ",
                                                   entry.end - entry.begin,
                                                   " bytes, dtype and shape make ", bytes));
  }
  return entry;
}

absl::Status CheckMetadata(const json& metadata, absl::string_view file) {
  const bool fine =
      metadata.is_object() && std::all_of(metadata.begin(), metadata.end(),
                                          [](const json& value) { return value.is_string(); });
  if (fine) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(file, ": __metadata__ is not a map of strings"));
}

// The tensors lie one behind the other from byte 0 to the end of the file.
absl::Status CheckCoverage(const SafetensorsHeader& header, int64_t data_bytes,
                           absl::string_view file) {
  std::vector<std::pair<int64_t, absl::string_view>> order;  // begin, name
  for (const auto& [name, entry] : header.tensors) order.emplace_back(entry.begin, name);
  std::sort(order.begin(), order.end());
  int64_t covered = 0;
  absl::string_view previous = "the start of the data";
  for (const auto& [begin, name] : order) {
    if (begin != covered) {
      return absl::InvalidArgumentError(
          absl::StrCat(TensorWhere(file, name), ": begins at byte ", begin,
                       begin < covered ? ", overlaps " : ", leaves a hole behind ",
                       Quoted(previous), ", which ends at ", covered));
    }
    covered = header.tensors.at(name).end;
    previous = name;
  }
  if (covered == data_bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", data_bytes - covered,
                                                 " bytes behind the last tensor, ",
                                                 Quoted(previous), ", belong to none"));
}

// Length of the header and where the data begins.
absl::StatusOr<int64_t> ReadHeaderBytes(absl::Span<const std::byte> prefix, int64_t file_size,
                                        absl::string_view file) {
  if (file_size < kLengthBytes || static_cast<int64_t>(prefix.size()) < kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": ", file_size, " bytes are no safetensors file"));
  }
  uint64_t length = 0;
  std::memcpy(&length, prefix.data(), kLengthBytes);
  if (length > static_cast<uint64_t>(kMaxSafetensorsHeaderBytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": header of ", length, " bytes, limit ", kMaxSafetensorsHeaderBytes));
  }
  const auto bytes = static_cast<int64_t>(length);
  if (bytes > file_size - kLengthBytes ||
      bytes > static_cast<int64_t>(prefix.size()) - kLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        file, ": header of ", length, " bytes in a file of ", file_size, "; file truncated?"));
  }
  return bytes;
}

}  // namespace

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::Span<const std::byte> prefix,
                                                         int64_t file_size,
                                                         absl::string_view file) {
  HEADSTART_ASSIGN_OR_RETURN(const int64_t header_bytes, ReadHeaderBytes(prefix, file_size, file));
  const absl::string_view text(reinterpret_cast<const char*>(prefix.data()) + kLengthBytes,
                               static_cast<size_t>(header_bytes));
  if (!absl::StartsWith(text, "{")) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": header does not begin with {"));
  }
  HEADSTART_ASSIGN_OR_RETURN(const json root, ParseJson(text, file,
                                                        {.max_bytes = kMaxSafetensorsHeaderBytes,
                                                         .max_values = kMaxJsonValues}));
  SafetensorsHeader header;
  header.data_offset = kLengthBytes + header_bytes;
  const int64_t data_bytes = file_size - header.data_offset;
  for (const auto& [name, value] : root.items()) {
    if (name == "__metadata__") {
      HEADSTART_RETURN_IF_ERROR(CheckMetadata(value, file));
      continue;
    }
    HEADSTART_ASSIGN_OR_RETURN(header.tensors[name], ParseEntry(name, value, data_bytes, file));
  }
  HEADSTART_RETURN_IF_ERROR(CheckCoverage(header, data_bytes, file));
  return header;
}

absl::StatusOr<absl::flat_hash_map<std::string, std::string>> ParseSafetensorsIndex(
    absl::string_view text, absl::string_view file) {
  HEADSTART_ASSIGN_OR_RETURN(
      const json root,
      ParseJson(text, file, {.max_bytes = kMaxIndexBytes, .max_values = kMaxJsonValues}));
  if (!root.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": not a JSON object"));
  }
  const JsonFields fields(root, std::string{file});
  HEADSTART_ASSIGN_OR_RETURN(const JsonFields weight_map, fields.Object("weight_map"));
  absl::flat_hash_map<std::string, std::string> shards;
  for (const auto& [name, value] : weight_map.object().items()) {
    const std::string where = TensorWhere(file, name);
    if (!value.is_string()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": shard is not a string"));
    }
    const std::string& shard = value.get_ref<const std::string&>();
    const bool plain = absl::EndsWith(shard, ".safetensors") && shard.front() != '.' &&
                       shard.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
    if (!plain) {
      return absl::InvalidArgumentError(absl::StrCat(
          where, ": shard ", Quoted(shard), " is not the plain name of a .safetensors file"));
    }
    shards[name] = shard;
  }
  if (shards.empty()) return fields.Error("weight_map", "is empty");
  return shards;
}

}  // namespace headstart
