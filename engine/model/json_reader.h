// JSON from files that are not trusted: size, depth, number of values and duplicate keys are
// checked before anything is built, and fields are read with their type and range.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headstart {

struct JsonLimits {
  int64_t max_bytes = 0;
  int64_t max_values = 0;  // keys, numbers, strings, objects, … in all
};

// Parses one JSON value nested at most 32 deep. INVALID_ARGUMENT names `file` and what is wrong.
absl::StatusOr<nlohmann::json> ParseJson(absl::string_view text, absl::string_view file,
                                         const JsonLimits& limits);

// `text` fit for a message: escaped and cut to 128 characters.
std::string Quoted(absl::string_view text);

// The fields of an object. A field that is null counts as absent, as in Hugging Face. Errors are
// INVALID_ARGUMENT: where, field, value, what is allowed.
class JsonFields {
 public:
  // `object` must be a JSON object and outlive this. `where` leads every message.
  JsonFields(const nlohmann::json& object, std::string where)
      : object_(object), where_(std::move(where)) {}

  // Null when absent.
  const nlohmann::json* Find(absl::string_view name) const;
  bool Has(absl::string_view name) const { return Find(name) != nullptr; }

  // A whole number in [min, max]. Without a fallback the field must be there.
  absl::StatusOr<int64_t> Integer(absl::string_view name, int64_t min, int64_t max) const;
  absl::StatusOr<int64_t> IntegerOr(absl::string_view name, int64_t fallback, int64_t min,
                                    int64_t max) const;
  // A number in [min, max].
  absl::StatusOr<double> Number(absl::string_view name, double min, double max) const;
  absl::StatusOr<double> NumberOr(absl::string_view name, double fallback, double min,
                                  double max) const;
  absl::StatusOr<bool> BoolOr(absl::string_view name, bool fallback) const;
  absl::StatusOr<std::string> String(absl::string_view name) const;
  absl::StatusOr<std::string> StringOr(absl::string_view name, absl::string_view fallback) const;
  // The fields of a nested object, which must be there.
  absl::StatusOr<JsonFields> Object(absl::string_view name) const;

  // "where: name=value, why"; `name` need not be there.
  absl::Status Error(absl::string_view name, absl::string_view why) const;

  const nlohmann::json& object() const { return object_; }

 private:
  const nlohmann::json& object_;
  std::string where_;
};

}  // namespace headstart
