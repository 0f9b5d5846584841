#include "engine/model/json_reader.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxQuoted = 128;

// Watches the parser pass over the text and stops it at the first thing we don't take. Builds
// nothing but the key sets of the objects that are open.
class Guard : public nlohmann::json_sax<json> {
 public:
  Guard(absl::string_view text, int64_t max_values) : text_(text), max_values_(max_values) {}
  const std::string& error() const { return error_; }

  bool null() override { return Count(); }
  bool boolean(bool) override { return Count(); }
  bool number_integer(number_integer_t) override { return Count(); }
  bool number_unsigned(number_unsigned_t) override { return Count(); }
  bool number_float(number_float_t, const string_t&) override { return Count(); }
  bool string(string_t&) override { return Count(); }
  bool binary(binary_t&) override { return Fail("binary value"); }
  bool start_object(std::size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool start_array(std::size_t) override { return Open(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    if (!open_.back().insert(name).second) {
      return Fail(absl::StrCat("duplicate key ", Quoted(name)));
    }
    last_key_ = name;
    return Count();
  }
  bool parse_error(std::size_t position, const std::string&, const json::exception&) override {
    // `position` counts the byte that does not fit. Numbers like Infinity and NaN are Python's.
    const absl::string_view found = text_.substr(std::min(position - 1, text_.size()));
    const std::string token(found.substr(0, found.find_first_of(" ,:]}\r\n\t")));
    return Fail(absl::StrCat(
        "not JSON at byte ", position, token.empty() ? "" : absl::StrCat(": ", Quoted(token)),
        last_key_.empty() ? "" : ", after the key ", last_key_.empty() ? "" : Quoted(last_key_)));
  }

 private:
  bool Fail(std::string error) {
    error_ = std::move(error);
    return false;
  }
  bool Count() {
    if (++num_values_ <= max_values_) return true;
    return Fail(absl::StrCat("more than ", max_values_, " values"));
  }
  bool Open() {
    if (open_.size() >= kMaxDepth) return Fail(absl::StrCat("nested deeper than ", kMaxDepth));
    open_.emplace_back();
    return Count();
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  const absl::string_view text_;
  const int64_t max_values_;
  std::string last_key_;
  int64_t num_values_ = 0;
  std::vector<absl::flat_hash_set<std::string>> open_;  // keys of each open object or array
  std::string error_;
};

// A value for a message.
std::string Shown(const json& value) {
  if (value.is_object()) return "{…}";
  if (value.is_array()) return "[…]";
  if (value.is_string()) return Quoted(value.get_ref<const std::string&>());
  return value.dump();
}

}  // namespace

std::string Quoted(absl::string_view text) {
  const bool cut = text.size() > kMaxQuoted;
  return absl::StrCat("\"", absl::CHexEscape(text.substr(0, kMaxQuoted)), cut ? "…" : "", "\"");
}

absl::StatusOr<json> ParseJson(absl::string_view text, absl::string_view file,
                               const JsonLimits& limits) {
  if (static_cast<int64_t>(text.size()) > limits.max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": ", text.size(), " bytes of JSON, limit ", limits.max_bytes));
  }
  Guard guard(text, limits.max_values);
  if (!json::sax_parse(text.begin(), text.end(), &guard)) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": ", guard.error()));
  }
  return json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
}

const json* JsonFields::Find(absl::string_view name) const {
  const auto found = object_.find(std::string{name});
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

absl::Status JsonFields::Error(absl::string_view name, absl::string_view why) const {
  const json* value = Find(name);
  return absl::InvalidArgumentError(absl::StrCat(
      where_, ": ", name, value == nullptr ? "" : absl::StrCat("=", Shown(*value)), " ", why));
}

absl::StatusOr<int64_t> JsonFields::Integer(absl::string_view name, int64_t min,
                                            int64_t max) const {
  const json* value = Find(name);
  if (value == nullptr) return Error(name, "is missing");
  // Whole numbers beyond 64 bits arrive as floats and fail here.
  if (!value->is_number_integer()) return Error(name, "is not a whole number");
  const bool too_big = value->is_number_unsigned() &&
                       value->get<uint64_t>() > static_cast<uint64_t>(std::max(max, int64_t{0}));
  if (too_big || value->get<int64_t>() < min || value->get<int64_t>() > max) {
    return Error(name, absl::StrCat("is not in [", min, ", ", max, "]"));
  }
  return value->get<int64_t>();
}

absl::StatusOr<int64_t> JsonFields::IntegerOr(absl::string_view name, int64_t fallback, int64_t min,
                                              int64_t max) const {
  if (!Has(name)) return fallback;
  return Integer(name, min, max);
}

absl::StatusOr<double> JsonFields::Number(absl::string_view name, double min, double max) const {
  const json* value = Find(name);
  if (value == nullptr) return Error(name, "is missing");
  if (!value->is_number()) return Error(name, "is not a number");
  const double number = value->get<double>();
  if (!(number >= min && number <= max)) {
    return Error(name, absl::StrCat("is not in [", min, ", ", max, "]"));
  }
  return number;
}

absl::StatusOr<double> JsonFields::NumberOr(absl::string_view name, double fallback, double min,
                                            double max) const {
  if (!Has(name)) return fallback;
  return Number(name, min, max);
}

absl::StatusOr<bool> JsonFields::BoolOr(absl::string_view name, bool fallback) const {
  const json* value = Find(name);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return Error(name, "is not true or false");
  return value->get<bool>();
}

absl::StatusOr<std::string> JsonFields::String(absl::string_view name) const {
  const json* value = Find(name);
  if (value == nullptr) return Error(name, "is missing");
  if (!value->is_string()) return Error(name, "is not a string");
  return value->get<std::string>();
}

absl::StatusOr<std::string> JsonFields::StringOr(absl::string_view name,
                                                 absl::string_view fallback) const {
  if (!Has(name)) return std::string{fallback};
  return String(name);
}

absl::StatusOr<JsonFields> JsonFields::Object(absl::string_view name) const {
  const json* value = Find(name);
  if (value == nullptr) return Error(name, "is missing");
  if (!value->is_object()) return Error(name, "is not an object");
  return JsonFields(*value, absl::StrCat(where_, ": ", name));
}

}  // namespace headstart
